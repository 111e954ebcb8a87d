# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What ranks vision tokens: the learned module and the attention of text; selections, and the gates of training."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .attention_learnpruner import Attended
from .prompt_learnpruner import send

# Query rows scored at a time: bounds the memory of a long question over a long image.
ROWS_AT_A_TIME = 128
# Halvings of the interval in which the gates' common shift is sought.
BISECTIONS = 40


class LearnedPruningModule(nn.Module):
    """Scores every vision token from the vision encoder's features (LearnPruner, arXiv 2604.23950, stage 1).

    LayerNorm - Linear(d, h) - GELU - Linear(h, 2) over {drop, keep}: the project's reading of the paper, which gives
    the number of parameters, 527,874 for CLIP-L (d = 1024, h = 512).
    """

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(input_size)
        self.hidden = nn.Linear(input_size, hidden_size)
        self.output = nn.Linear(hidden_size, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Keep minus drop logits, `(...)` float32: their sigmoid is the keep probability, but would tie more often.

        `features` are the encoder's before the projector, `(..., d)` of any float dtype; NaN in and out is structure.
        """
        structure = features.isnan().any(-1)
        features = features.masked_fill(structure.unsqueeze(-1), 0)
        with torch.autocast(features.device.type, enabled=False):
            hidden = self.hidden(self.norm(features.to(self.norm.weight.dtype)))
            drop, keep = self.output(F.gelu(hidden)).float().unbind(-1)
        return (keep - drop).masked_fill(structure, torch.nan)


def best_first(scores: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Columns in each row's descending order, `(rows, columns)` int64; ties go to the lower index.

    Args:
        scores (`torch.Tensor` of shape `(rows, columns)`, float32): NaN comes behind every number, -inf too.
        candidates (`torch.Tensor` of shape `(rows, columns)`, bool): Columns that come before all others.
    """
    # NaN takes the lowest number, above which all others are kept.
    lowest = torch.finfo(scores.dtype)
    scores = scores.clamp(min=lowest.min * (1 - lowest.eps)).nan_to_num(nan=lowest.min, posinf=torch.inf)
    return torch.where(candidates, scores, -torch.inf).argsort(dim=1, descending=True, stable=True)


def rank(scores: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Place of each column in the order of [`best_first`], starting at 0; `(rows, columns)`, int64."""
    return best_first(scores, candidates).argsort(dim=1)


def top_k(scores: torch.Tensor, candidates: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Marks the first `counts`, `(rows,)` int64, of each row in the order of [`best_first`]; `(rows, columns)` bool."""
    return rank(scores, candidates) < counts.unsqueeze(1)


def top_k_with_diversity(
    scores: torch.Tensor, candidates: torch.Tensor, counts: list[int], features: torch.Tensor, diversity: float
) -> torch.Tensor:
    """Top-k by score and, for the rest of `counts`, the "diversity tokens" of the paper; `(rows, columns)`, bool.

    Those are `round(diversity * count)`, but leave one token to the score. Each is the candidate whose largest cosine
    similarity to those already chosen is smallest. Structure (NaN features) comes last, in order.

    Args:
        scores, candidates, counts: As in [`top_k`], but `counts` are a `list[int]` on the host.
        features (`torch.Tensor` of shape `(rows, columns, d)`, any float dtype): What similarity is measured on.
        diversity (`float`): Share of `counts`, in [0, 1].
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
    similarity = directions @ directions.take_along_dim(best.unsqueeze(-1), dim=1).mT
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


def attention_received(
    attended: Attended, rows: torch.Tensor, weights: torch.Tensor, key_valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean attention that each current token receives from the rows that can see it, and whether there is such a row.

    Softmax over all keys a row may see, mean over heads, then mean over rows (LearnPruner, arXiv 2604.23950, stage 2).
    Dividing by the rows that can see a column, not by all, keeps an early image from winning by its place. Both results
    are of shape `(batch, length)`, float32 and bool.

    Args:
        attended ([`Attended`]): By the layer.
        rows (`torch.Tensor` of shape `(batch, queries)`, int64): Indices of the query rows among `length`.
        weights (`torch.Tensor` of shape `(batch, queries)`, bool): Which of `rows` count.
        key_valid (`torch.Tensor` of shape `(batch, past + length)`, bool, *optional*): Keys that are not padding.
    """
    query, length = attended.query, attended.query.shape[2]
    # Counted from the first current row: the cache's columns are negative.
    columns = torch.arange(length - attended.keys.shape[2], length, device=rows.device)
    with torch.autocast(query.device.type, enabled=False):
        queries = query.take_along_dim(rows[:, None, :, None], dim=2).float() * attended.scaling
        keys = attended.keys.float().repeat_interleave(query.shape[1] // attended.keys.shape[1], dim=1).mT
        received, watchers = keys.new_zeros(len(rows), length), keys.new_zeros(len(rows), length)
        for start in range(0, rows.shape[1], ROWS_AT_A_TIME):
            chunk = slice(start, start + ROWS_AT_A_TIME)
            visible = columns <= rows[:, chunk].unsqueeze(-1)
            if key_valid is not None:
                visible = visible & key_valid.unsqueeze(1)
            # Not -inf: a row of a text-free sample sees nothing, and its softmax must stay a number.
            logits = (queries[:, :, chunk] @ keys).masked_fill(~visible.unsqueeze(1), torch.finfo(torch.float32).min)
            counted = weights[:, chunk].unsqueeze(-1)
            received += (logits.softmax(-1).mean(1) * counted)[..., -length:].sum(1)
            watchers += (visible & counted)[..., -length:].sum(1)
    return received / watchers.clamp(min=1), watchers > 0


def soft_top_k(scores: torch.Tensor, count: float) -> torch.Tensor:
    """Probabilities `sigmoid(score + t)` that sum to `count`, by bisection (VisionSelector, arXiv 2510.16598).

    Args:
        scores (`torch.Tensor` of shape `(tokens,)`, float32): Logits.
        count (`float`): In (0, tokens].

    Returns `(tokens,)`, float32, differentiable in `scores`: raising one score lowers all other probabilities.
    """
    with torch.no_grad():
        # Between these two shifts every probability goes from below count / tokens to above it.
        middle = math.inf if count >= len(scores) else math.log(count / (len(scores) - count))
        low, high = middle - scores.max(), middle - scores.min()
        for _ in range(BISECTIONS):
            shift = (low + high) / 2
            above = torch.sigmoid(scores + shift).sum() > count
            low, high = torch.where(above, low, shift), torch.where(above, shift, high)
        probabilities = torch.sigmoid(scores + shift)
        slopes = probabilities * (1 - probabilities)
        weights = slopes / slopes.sum().clamp_min(torch.finfo(scores.dtype).tiny)
    # The implicit derivative of the shift: the value is left as it is, its gradient is -weights.
    shift = shift - (weights * (scores - scores.detach())).sum()
    return torch.sigmoid(scores + shift)
