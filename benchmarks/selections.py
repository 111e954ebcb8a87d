"""Selections that were tried behind a first cut's scores, as a method that benchmarks/photo.py asks.

`marginal` takes tokens one by one, the best of relevance minus likeness to those taken (maximal marginal relevance;
Carbonell and Goldstein, 1998); `facility` those that stand best for all tokens, the relevant ones first (facility
location). Relevance is the rank of a token's score in its image, from 1 (best) down to 0; likeness the cosine of the
tower's features. What wins becomes part of the core; what does not stays a row of a table.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from learnpruner.cuts_learnpruner import EncodedImages, LearnedScore
from learnpruner.methods import Method, Place
from learnpruner.methods.cls_attention import ClsScore
from learnpruner.methods.images import cls_layers
from learnpruner.scores_learnpruner import rank


def relevance(scores: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """`(images, tokens)` float32 in [0, 1]; an infinite score's is infinite, that of what is not there -inf."""
    counts = present.sum(1, keepdim=True)
    ranks = 1 - rank(scores, present) / (counts - 1).clamp_min(1)
    return ranks.masked_fill(scores == torch.inf, torch.inf).masked_fill(~present, -torch.inf)


def likeness(images: EncodedImages) -> torch.Tensor:
    """Cosine of each pair of an image's tokens, `(images, tokens, tokens)` float32."""
    directions = F.normalize(images.features.float().nan_to_num(), dim=-1)
    return directions @ directions.mT


def select_marginal(scores: torch.Tensor, images: EncodedImages, counts: list[int], weight: float) -> torch.Tensor:
    """`weight` is that of relevance, in [0, 1]; the rest is that of likeness to the nearest token taken."""
    gains, alike = weight * relevance(scores, images.present), likeness(images)
    chosen, nearest = torch.zeros_like(images.present), torch.zeros_like(gains)
    rows = torch.arange(len(gains))
    for step in range(max(counts)):
        value = (gains - (1 - weight) * nearest).masked_fill(chosen | ~images.present, -torch.inf)
        best = value.argmax(1)
        chosen[rows, best] |= torch.tensor([step < count for count in counts])
        likes = alike[rows, best]
        nearest = likes if step == 0 else torch.maximum(nearest, likes)
    return chosen


def select_facility(scores: torch.Tensor, images: EncodedImages, counts: list[int], weight: float) -> torch.Tensor:
    """Greedy: each token adds the sum over all of relevance^(1 / `weight`) times what it is more like them than any
    taken, which is 0 at least. A small `weight` looks at the most relevant ones alone."""
    ranks, alike = relevance(scores, images.present), likeness(images)
    worth = ranks.clamp(0, 1).nan_to_num() ** (1 / weight)
    chosen, covered = torch.zeros_like(images.present), torch.zeros_like(worth)
    rows = torch.arange(len(ranks))
    for step in range(max(counts)):
        value = (worth.unsqueeze(1) * (alike - covered.unsqueeze(1)).clamp_min(0)).sum(2)
        value = value.masked_fill(ranks == torch.inf, torch.inf)
        best = value.masked_fill(chosen | ~images.present, -torch.inf).argmax(1)
        chosen[rows, best] |= torch.tensor([step < count for count in counts])
        covered = torch.maximum(covered, alike[rows, best])
    return chosen


SELECTIONS = {"marginal": select_marginal, "facility": select_facility}


class Selects:
    def select(self, scores: torch.Tensor, images: EncodedImages, counts: list[int]) -> torch.Tensor:
        return SELECTIONS[self.selection](scores, images, counts, self.weight)


@dataclass(unsafe_hash=True)
class SelectedLearned(Selects, LearnedScore):
    selection: str
    weight: float


@dataclass(unsafe_hash=True)
class SelectedClass(Selects, ClsScore):
    selection: str
    weight: float


@dataclass(unsafe_hash=True)
class Selected(Method):
    """One cut before the decoder.

    Args:
        by (`"pruner"` or `"cls"`): What scores: the learned module, or [CLS] attention.
        selection (`str`): One of [`SELECTIONS`].
        weight (`float`): As the selection reads it.
    """

    by: str = "pruner"
    selection: str = "marginal"
    weight: float = 0.5

    def check(self, model: nn.Module) -> None:
        if self.by == "cls":
            cls_layers(model, "selected")

    def places(self, model: nn.Module) -> tuple[Place, ...]:
        if self.by == "cls":
            return (Place(0, 1, SelectedClass(self.selection, self.weight), watched=(-1,)),)
        return (Place(0, 1, SelectedLearned(0.0, self.selection, self.weight)),)
