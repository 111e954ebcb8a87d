# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""VisionZip (arXiv 2412.04467): the patches that [CLS] attends to, and means of the others."""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from learnpruner.cuts_learnpruner import EncodedImages
from learnpruner.prompt_learnpruner import send
from learnpruner.scores_learnpruner import top_k

from .base import Method, Place
from .images import ReadsEncoder, cls_attention, cls_layers, embeddings


@dataclass(unsafe_hash=True)
class VisionZip(Method):
    """VisionZip (https://arxiv.org/abs/2412.04467): dominant tokens as they are, and contextual tokens, each of which
    stands for several of the others.

    Of a budget of R tokens, C = round(`contextual` * R) are contextual, never all. Dominant are the R - C patches to
    which [CLS] pays most in the layer whose output the projector reads. Of the others, in their order, each
    (others // C)-th is a target, C in all. With k_i `(head_dim,)` the layer's key of patch i, mean over the heads,
    every patch j that is left is assigned to the target t of largest cos(k_j, k_t). With x `(patches, d)` the tower's
    features, target t becomes

        x_t + mean of x_j over those assigned to it,

    and then goes through the projector. This is what the authors' code does. The paper speaks of an average, which
    this is not: a target that stands for others is about twice as long as a patch.

    Departures: [CLS] itself, which is one of the authors' dominant tokens, has no place in a LLaVA prompt and is left
    out. In LLaVA-NeXT all crops of an image share one budget, and targets gather from all of them; the authors treat
    each crop alone. Positions are kept, and the order of the prompt: a contextual token stands where its target stood;
    the authors put all of them behind the dominant ones.

    Args:
        contextual (`float`): Share of the budget for contextual tokens, in [0, 1); the authors' 10 of 64.
    """

    contextual: float = 10 / 64

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.contextual < 1:
            raise ValueError(f"contextual is a share of the budget in [0, 1), got {self.contextual}.")

    def check(self, model: nn.Module) -> None:
        cls_layers(model, "visionzip")

    def places(self, model: nn.Module) -> tuple[Place, ...]:
        score = VisionZipScore(self.contextual)
        return (Place(0, 1, score, merge=score.merge, watched=(-1,)),)


@dataclass
class VisionZipScore(ReadsEncoder):
    """Of one call.

    Attributes:
        keys (`torch.Tensor` of shape `(images, tokens, head_dim)`, float32): Mean over the heads.
        places (`torch.Tensor` of shape `(images, most)`, int64): Where the targets are, `most` of them at most.
        real (`torch.Tensor` of shape `(images, most)`, bool): False where an image has fewer.
    """

    contextual: float
    keys: torch.Tensor | None = field(default=None, init=False)
    places: torch.Tensor | None = field(default=None, init=False)
    real: torch.Tensor | None = field(default=None, init=False)

    def __call__(self, images: EncodedImages) -> torch.Tensor:
        paid, self.keys = cls_attention(images)
        return paid

    def select(self, scores: torch.Tensor, images: EncodedImages, counts: list[int]) -> torch.Tensor:
        wanted = [min(count - 1, round(self.contextual * count)) for count in counts]
        contextual = send(wanted, scores.device).unsqueeze(1)
        counts = send(counts, scores.device)
        dominant = top_k(scores, images.present, counts - contextual.squeeze(1))
        others = images.present & ~dominant & ~images.features.isnan().any(-1)
        place = others.cumsum(1) - 1
        step = (others.sum(1, keepdim=True) // contextual.clamp(min=1)).clamp(min=1)
        targets = others & (place % step == 0) & (place // step < contextual)
        self.places = targets.int().argsort(dim=1, descending=True, stable=True)[:, : max(wanted)]
        self.real = targets.gather(1, self.places)
        # Structure fills what patches leave of the budget.
        return top_k((dominant | targets).float(), images.present, counts)

    def merge(self, images: EncodedImages, chosen: torch.Tensor) -> torch.Tensor:
        states = embeddings(images)
        if not self.places.shape[1]:
            return states
        directions = F.normalize(self.keys.nan_to_num(), dim=-1)
        left = images.present & ~chosen & ~images.features.isnan().any(-1)
        features = images.features.float().nan_to_num()
        with torch.autocast(features.device.type, enabled=False):
            similarity = directions @ _rows(directions, self.places).mT
            nearest = similarity.masked_fill(~self.real.unsqueeze(1), -torch.inf).argmax(-1)
            member = F.one_hot(nearest, self.places.shape[1]).float() * left.unsqueeze(-1)
            means = member.mT @ features / member.sum(1).clamp(min=1).unsqueeze(-1)
        merged = (_rows(features, self.places) + means).to(images.features.dtype)
        projected = images.model.multi_modal_projector(merged).to(states.dtype)
        # What is no target gets its own value back.
        projected = torch.where(self.real.unsqueeze(-1), projected, _rows(states, self.places))
        return states.scatter(1, self.places.unsqueeze(-1).expand_as(projected), projected)


def _rows(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return values.gather(1, places.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
