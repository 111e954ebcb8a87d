# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""VisPruner (arXiv 2412.01818): patches that [CLS] attends to, and patches that differ from one another."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from learnpruner.cuts_learnpruner import EncodedImages
from learnpruner.scores_learnpruner import best_first

from .base import Method, Place
from .images import ReadsEncoder, cls_attention, cls_layers

REMOVED_AT_A_TIME = 8


@dataclass(unsafe_hash=True)
class VisPruner(Method):
    """VisPruner (https://arxiv.org/abs/2412.01818, ICCV 2025): a share of the budget for the patches to which [CLS]
    pays most, the rest for what is left of the others when near duplicates are removed.

    Of a budget of R tokens, the floor(`important` * R) of highest [CLS] attention (that of [`ClsAttention`]) are kept.
    The others stand in a list, in descending order of that attention, and are split into those at even and at odd
    places; with x `(patches, d)` the tower's features before the projector, an even patch i is as redundant as its
    largest cos(x_i, x_j) over the odd ones, and the 8 most redundant are removed. The next list is what is left of the
    even ones, in descending order of their redundancy, and the odd ones behind them, as they were. It is split anew,
    until the budget is met; the last round removes fewer.

    Departures: in LLaVA-NeXT all crops of an image share one budget, and newlines, which take no part, are kept last;
    in the authors' code each crop has the budget, and every newline is kept. Where a sample ends in a vision token,
    that one must stay, and is the first of the important ones, even where `important` gives none a place. Where an odd
    number is left, which the authors' code cannot split, there is an even patch more.

    Args:
        important (`float`): Share of the budget that attention chooses, in [0, 1].
        variant (`"code"` or `"paper"`): The paper describes the rounds in words, without an order. `"code"` has that of
            the authors' code, as above; with `"paper"`, this project's first reading and that of other
            re-implementations, lists are in the order of the image in every round.
    """

    # Until revision 2, lists were in the order of the image.
    revision: ClassVar[int] = 2
    important: float = 0.5
    variant: str = "code"

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.important <= 1:
            raise ValueError(f"important is a share of the budget in [0, 1], got {self.important}.")
        if self.variant not in ("paper", "code"):
            raise ValueError(f"vispruner: variant is 'paper' or 'code', got {self.variant!r}.")

    def check(self, model: nn.Module) -> None:
        cls_layers(model, "vispruner")

    def places(self, model: nn.Module) -> tuple[Place, ...]:
        return (Place(0, 1, VisPrunerScore(self.important, self.variant), watched=(-1,)),)


@dataclass(unsafe_hash=True)
class VisPrunerScore(ReadsEncoder):
    important: float
    variant: str

    def __call__(self, images: EncodedImages) -> torch.Tensor:
        return cls_attention(images)[0]

    def select(self, scores: torch.Tensor, images: EncodedImages, counts: list[int]) -> torch.Tensor:
        # Structure, whose score is NaN, fills what patches leave of the budget.
        orders, patches = best_first(scores, images.present), images.present & ~scores.isnan()
        musts, numbers = torch.stack([(scores == torch.inf).any(1).int(), patches.sum(1)]).tolist()
        chosen = torch.zeros_like(images.present)
        # One image at a time: of its patches all pairs are compared.
        for row, (order, count, must, number) in enumerate(zip(orders, counts, musts, numbers)):
            first = max(int(self.important * count), must)
            left = order[first:number]
            if self.variant == "paper":
                left = left.sort().values
            left = self._distinct(left, images.features[row], count - first)
            kept = torch.cat([order[:first], left, order[max(first, number) :]])[:count]
            chosen[row, kept] = True
        return chosen

    def _distinct(self, left: torch.Tensor, features: torch.Tensor, goal: int) -> torch.Tensor:
        """`goal` of the places `left` of an image's patches, int64, or all where these are fewer: without near
        duplicates."""
        directions = F.normalize(features.float().nan_to_num(), dim=-1)
        with torch.autocast(directions.device.type, enabled=False):
            similarity = directions @ directions.mT
        while len(left) > goal > 0:
            even, odd = left[0::2], left[1::2]
            redundant = similarity.take(even.unsqueeze(1) * len(similarity) + odd).amax(1)
            removed = min(REMOVED_AT_A_TIME, len(left) - goal)
            left = torch.cat([even[redundant.argsort(descending=True, stable=True)[removed:]], odd])
            if self.variant == "paper":
                left = left.sort().values
        return left[:goal]
