# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The budget formula for any number of cuts, and the mean that papers report."""

import math
from collections.abc import Sequence

from .budget_learnpruner import SLACK, half_up


def spread_budget(
    num_tokens: int, budget: float, layers: Sequence[int], weights: Sequence[float], num_layers: int
) -> tuple[int, ...]:
    """Tokens of one image that survive each cut, so that the mean over the decoder's layers is the budget.

    Of LearnPruner's two cuts these are the counts of [`keep_counts`]. They never increase, and follow the proportion of
    `weights` as nearly as whole numbers to `num_tokens` can. The mean is off by at most half a token, unless the budget
    is below one token for each cut: none keeps less. Raises `ValueError` where the layers before the first cut, which
    see the whole image, leave less than that for the others.

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
