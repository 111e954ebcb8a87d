# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Cut 1: the learned pruning module (LPM), the selection that follows it, and its differentiable form."""

import torch
from torch import nn
from torch.nn import functional as F

from .layout_learnpruner import send

# Weight of the squared budget error in the training loss. The paper gives no budget term; this is the form and weight
# of Dynamic-LLaVA (arXiv 2412.00876).
BUDGET_WEIGHT = 100.0


class LearnedPruningModule(nn.Module):
    """Scores every vision token from the vision encoder's features (LearnPruner, arXiv 2604.23950, stage 1).

    LayerNorm - Linear(d, h) - GELU - Linear(h, 2) over {drop, keep}; 527,874 parameters for CLIP-L (d = 1024,
    h = 512). The paper gives the count; the layout is the project's reading of it.
    """

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(input_size)
        self.hidden = nn.Linear(input_size, hidden_size)
        self.output = nn.Linear(hidden_size, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features (`torch.Tensor` of shape `(..., d)`, any float dtype):
                Vision encoder features, before the projector. Rows of NaN are structure, not patches.

        Returns:
            `torch.Tensor` of shape `(...)`, float32: keep logit minus drop logit, so that its sigmoid is the keep
            probability. A probability would tie in low precision, the difference does not. NaN for structure.
        """
        structure = features.isnan().any(-1)
        features = features.masked_fill(structure.unsqueeze(-1), 0)
        with torch.autocast(features.device.type, enabled=False):
            hidden = self.hidden(self.norm(features.to(self.norm.weight.dtype)))
            drop, keep = self.output(F.gelu(hidden)).float().unbind(-1)
        return (keep - drop).masked_fill(structure, torch.nan)


def best_first(scores: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Columns in each row's descending order; ties go to the lower index.

    Args:
        scores (`torch.Tensor` of shape `(rows, columns)`, float32): NaN comes behind every number.
        candidates (`torch.Tensor` of shape `(rows, columns)`, bool): Columns that come before all others.

    Returns:
        `torch.Tensor` of shape `(rows, columns)`, int64.
    """
    scores = scores.nan_to_num(nan=torch.finfo(scores.dtype).min, posinf=torch.inf, neginf=-torch.inf)
    return torch.where(candidates, scores, -torch.inf).argsort(dim=1, descending=True, stable=True)


def rank(scores: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Place of each column in the order of [`best_first`], starting at 0; `(rows, columns)`, int64."""
    return best_first(scores, candidates).argsort(dim=1)


def top_k(scores: torch.Tensor, candidates: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Marks the best candidates of each row, in the order of [`best_first`]; `(rows, columns)`, bool.

    Args:
        counts (`torch.Tensor` of shape `(rows,)`, int64): How many to mark, at most the row's candidates.
    """
    return rank(scores, candidates) < counts.unsqueeze(1)


def top_k_with_diversity(
    scores: torch.Tensor, candidates: torch.Tensor, counts: list[int], features: torch.Tensor, diversity: float
) -> torch.Tensor:
    """Top-k by score, then a share of `counts` filled greedily with the token least similar to those chosen.

    The "diversity tokens" of the paper (stage 1, inference only): repeatedly add the candidate whose largest cosine
    similarity to the chosen set is smallest. The share is `round(diversity * count)`, and at least one token is
    chosen by score. Structure rows (NaN features) are chosen last, in order.

    Args:
        scores, candidates: As in [`best_first`].
        counts (`list[int]` of length `rows`): How many to mark; on the host, which runs the greedy rounds.
        features (`torch.Tensor` of shape `(rows, columns, d)`, any float dtype): What similarity is measured on.
        diversity (`float`): Share of `counts`, in [0, 1].

    Returns:
        `torch.Tensor` of shape `(rows, columns)`, bool.
    """
    by_score = [max(1, count - round(diversity * count)) for count in counts]
    order = best_first(scores, candidates)
    extra = [count - first for count, first in zip(counts, by_score)]
    wanted = send([by_score, extra], scores.device).unsqueeze(-1)
    chosen = order.argsort(dim=1) < wanted[0]
    if not any(extra):
        return chosen
    structure = features.isnan().any(-1)
    directions = F.normalize(features.float().nan_to_num(), dim=-1)
    best = order[:, : max(by_score)]
    chosen_directions = directions.gather(1, best.unsqueeze(-1).expand(-1, -1, directions.shape[-1]))
    similarity = directions @ chosen_directions.mT
    similarity = similarity.masked_fill(~(chosen & ~structure).gather(1, best).unsqueeze(1), -torch.inf)
    # A cosine never reaches 2: structure comes after every patch that is left.
    nearest = similarity.amax(-1).masked_fill(structure, 2.0).masked_fill(chosen | ~candidates, torch.inf)
    rows = torch.arange(len(scores), device=scores.device)
    picks = []
    for _ in range(max(extra)):
        picks.append(nearest.argmin(1))
        similarity = torch.einsum("rcd,rd->rc", directions, directions[rows, picks[-1]])
        nearest = torch.maximum(nearest, similarity).scatter_(1, picks[-1].unsqueeze(1), torch.inf)
    still_wanted = torch.arange(max(extra), device=scores.device) < wanted[1]
    # A row without a candidate left picks its first column again, so what is still wanted is added up.
    added = torch.zeros_like(order).scatter_add(1, torch.stack(picks, dim=1), still_wanted.long())
    return chosen | (added > 0)


def budget_loss(probabilities: list[torch.Tensor], shares: list[float]) -> torch.Tensor:
    """Squared error between the mean keep probability of each image and its share, times [`BUDGET_WEIGHT`].

    Args:
        probabilities (`list[torch.Tensor]` of shape `(tokens,)`, float32): Keep probabilities of each image.
        shares (`list[float]`): R1 / patches of each image.
    """
    errors = torch.stack([p.mean() - share for p, share in zip(probabilities, shares)])
    return BUDGET_WEIGHT * errors.square().mean()
