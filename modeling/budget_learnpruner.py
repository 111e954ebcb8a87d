# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The one budget formula: from a ratio to the tokens that each cut keeps, and the mean that papers report."""

import math
from collections.abc import Sequence

# A float such as 1/9 is inexact, so a count that is this near (in tokens) to a whole number or a half counts as it.
# Rounding errors stay below this as long as tokens times layers are below a thousand million.
SLACK = 1e-6


def half_up(count: float) -> int:
    """The nearest whole number of tokens; halves, up to `SLACK`, round up."""
    return math.floor(count + 0.5 + SLACK)


def keep_counts(
    num_tokens: int, ratio: float, *, num_layers: int, pruner_layer: int, stage_ratio: float
) -> tuple[int, int]:
    """Tokens of one image that survive the first and the second cut, R1 and R2 (LearnPruner, arXiv 2604.23950).

    It is [`spread_budget`] of two cuts, with 1 <= R2 <= R1 <= `num_tokens` and R1 near `stage_ratio` (at least 1) * R2.

    Args:
        num_tokens, ratio: Vision tokens of the image, and the mean share kept over the decoder's layers, in (0, 1].
        num_layers, pruner_layer: Decoder layers, and how many of them see R1, at least 1. If all do, R1 is R2.
    """
    layers, weights = ((0, pruner_layer), (stage_ratio, 1)) if pruner_layer != num_layers else ((0,), (1,))
    counts = spread_budget(num_tokens, ratio * num_tokens, layers, weights, num_layers)
    return counts[0], counts[-1]


def spread_budget(
    num_tokens: int, budget: float, layers: Sequence[int], weights: Sequence[float], num_layers: int
) -> tuple[int, ...]:
    """Tokens of one image that survive each cut, so that the mean over the decoder's layers is the budget.

    The counts never increase; they follow the proportion of `weights` as nearly as whole numbers to `num_tokens` can.
    The mean is off by at most half a token, unless the budget is below one token for each cut: none keeps less. Raises
    `ValueError` where the layers before the first cut, which see the whole image, leave less than that for the others.

    Args:
        num_tokens, num_layers: Vision tokens of the image, and decoder layers.
        budget: Mean number of tokens over the decoder's layers, in (0, `num_tokens`].
        layers, weights: Of each cut, the 0-based decoder layer that it falls before (ascending), and a positive number.
    """
    least = (layers[0] * num_tokens + num_layers - layers[0]) / num_layers
    if layers[0] and budget < least - SLACK:
        raise ValueError(
            f"A mean of {budget:g} of {num_tokens} tokens is out of reach: {layers[0]} of {num_layers} layers see the "
            f"whole image, so that it is at least {least:.4g}."
        )
    for whole in range(len(layers)):
        counts = _round_backwards(budget * num_layers, num_tokens, layers[whole:], weights[whole:], num_layers)
        if counts[0] < num_tokens:
            return (num_tokens,) * whole + counts
    return (num_tokens,) * len(layers)


def _round_backwards(total, num_tokens, layers, weights, num_layers) -> tuple[int, ...]:
    """Counts for `total` rows over all layers, from the last to the first: each takes up the rounding of later ones."""
    ends = (*layers[1:], num_layers)
    spans = [end - start for start, end in zip(layers, ends)]
    left, kept, counts = total - layers[0] * num_tokens, 1, []
    for step in reversed(range(len(layers))):
        count = half_up(left / sum(span * (weight / weights[step]) for span, weight in zip(spans[: step + 1], weights)))
        if step:  # the earlier cuts must be able to keep as many
            count = min(count, math.floor(left / (ends[step] - layers[0]) + SLACK))
        kept = max(kept, count)
        left -= spans[step] * kept
        counts.insert(0, kept)
    return tuple(counts)


def mean_tokens(counts: Sequence[int], layers: Sequence[int], num_tokens: int, num_layers: int) -> float:
    """Mean vision tokens over all decoder layers, the "retained tokens" of papers. Arguments: see [`spread_budget`]."""
    spans = zip((0, *layers), (*layers, num_layers), (num_tokens, *counts))
    return sum((end - start) * seen for start, end, seen in spans) / num_layers
