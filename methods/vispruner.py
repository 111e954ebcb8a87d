# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""VisPruner (arXiv 2412.01818): patches that [CLS] attends to, and patches that differ from one another."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from learnpruner.cuts_learnpruner import EncodedImages
from learnpruner.prompt_learnpruner import send
from learnpruner.scores_learnpruner import top_k

from .base import Method, Place
from .images import ReadsEncoder, clip_encoder, cls_attention

REMOVED_AT_A_TIME = 8


@dataclass(unsafe_hash=True)
class VisPruner(Method):
    """VisPruner (https://arxiv.org/abs/2412.01818, ICCV 2025): a share of the budget for the patches to which [CLS]
    pays most, the rest for what is left of the others when near duplicates are removed.

    Of a budget of R tokens, the floor(`important` * R + 1/2) of highest [CLS] attention (that of
    [`ClsAttention`]) are kept, one at least. The others, in the order of the image, are split into those at even and at
    odd places; with x `(patches, d)` the tower's features, an even patch i is as redundant as its largest cos(x_i, x_j)
    over the odd ones, and the 8 most redundant are removed. What is left is split anew, until the budget is met; the
    last round removes fewer.

    The paper describes the rounds in words; the order before each split, and that even patches are the ones that go,
    are this project's reading of them. Features are those before the projector.

    Departures: in LLaVA-NeXT all crops of an image share one budget, and newlines, which take no part, are kept last;
    the authors leave newlines out.

    Args:
        important (`float`): Share of the budget that attention chooses, in [0, 1].
    """

    important: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.important <= 1:
            raise ValueError(f"important is a share of the budget in [0, 1], got {self.important}.")

    def check(self, model: nn.Module) -> None:
        clip_encoder(model, "vispruner")

    def places(self, model: nn.Module) -> tuple[Place, ...]:
        return (Place(0, 1, VisPrunerScore(self.important), watched=(-1,)),)


@dataclass(unsafe_hash=True)
class VisPrunerScore(ReadsEncoder):
    important: float

    def __call__(self, images: EncodedImages) -> torch.Tensor:
        return cls_attention(images)[0]

    def select(self, scores: torch.Tensor, images: EncodedImages, counts: list[int]) -> torch.Tensor:
        by_attention = [max(1, int(self.important * count + 0.5)) for count in counts]
        diverse = [count - first for count, first in zip(counts, by_attention)]
        important = top_k(scores, images.present, send(by_attention, scores.device))
        structure = images.features.isnan().any(-1)
        left = images.present & ~important & ~structure
        # One image at a time: of its patches all pairs are compared.
        for row, features in enumerate(images.features):
            patches = left[row].nonzero().squeeze(1)
            left[row] = torch.zeros_like(left[row]).scatter(0, _distinct(patches, features, diverse[row]), True)
        # Structure fills what patches leave of the budget.
        counts = send(counts, scores.device)
        return top_k((important | left).float(), images.present, counts)


def _distinct(left: torch.Tensor, features: torch.Tensor, goal: int) -> torch.Tensor:
    """`goal` of the places `left` of an image's patches, ascending, int64: without near duplicates."""
    directions = F.normalize(features.float().nan_to_num(), dim=-1)
    with torch.autocast(directions.device.type, enabled=False):
        similarity = directions @ directions.mT
    while len(left) > goal > 0:
        even, odd = left[0::2], left[1::2]
        redundant = similarity.take(even.unsqueeze(1) * len(similarity) + odd).amax(1)
        removed = min(REMOVED_AT_A_TIME, len(left) - goal)
        stay = even[redundant.argsort(descending=True, stable=True)[removed:]]
        left = torch.cat([stay, odd]).sort().values
    return left[:goal]
