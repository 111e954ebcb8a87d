# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The one budget formula: from a ratio to the tokens that each cut keeps, and the mean that papers report."""

import math
from collections.abc import Sequence

# A ratio such as 1/9 is a float that is only near to what its author wrote, so a count that should be a whole number
# or a half comes out a little above or below. What is this near (in tokens) counts as reached. The errors of floats
# are below it as long as tokens times layers are below a thousand million.
SLACK = 1e-6


def half_up(count: float) -> int:
    """The nearest whole number of tokens; halves, up to `SLACK`, round up."""
    return math.floor(count + 0.5 + SLACK)


def keep_counts(
    num_tokens: int, ratio: float, *, num_layers: int, pruner_layer: int, stage_ratio: float
) -> tuple[int, int]:
    """Tokens of one image that survive the first and the second cut (LearnPruner, arXiv 2604.23950).

    The first `pruner_layer` decoder layers see R1 tokens and the others R2, with R1 near `stage_ratio` * R2 and a mean
    over all layers of `ratio * num_tokens`. It is [`spread_budget`] of two cuts. The mean is off by half a token at
    most, where it is 1 or more. Both are at least 1, so that no image disappears.

    Args:
        num_tokens (`int`): Vision tokens of the image (N).
        ratio (`float`): Mean share of tokens kept over the decoder's layers, in (0, 1].
        num_layers (`int`): Decoder layers (L).
        pruner_layer (`int`): Layers that see R1 (k, from 1 to L).
        stage_ratio (`float`): R1 / R2, at least 1.

    Returns:
        `tuple[int, int]`: (R1, R2), with 1 <= R2 <= R1 <= N. Both are the same where `pruner_layer` is `num_layers`.
    """
    budget = ratio * num_tokens
    if pruner_layer == num_layers:
        (count,) = spread_budget(num_tokens, budget, (0,), (1,), num_layers)
        return count, count
    first, second = spread_budget(num_tokens, budget, (0, pruner_layer), (stage_ratio, 1), num_layers)
    return first, second


def spread_budget(
    num_tokens: int, budget: float, layers: Sequence[int], weights: Sequence[float], num_layers: int
) -> tuple[int, ...]:
    """Tokens of one image that survive each cut, so that the mean over the decoder's layers is the budget.

    The cuts keep tokens in the proportion of `weights`, as nearly as whole numbers allow. They are rounded from the
    last to the first, and each takes up what the later ones were rounded by. A first cut that would keep the whole
    image does so, and the others share what is left. So no more than the rounding of one cut is left over, half a token
    in each layer from there to the next cut: the mean is off by at most half a token, unless the budget is below the
    mean of one token for each cut.

    Args:
        num_tokens (`int`): Vision tokens of the image.
        budget (`float`): Mean number of tokens over the decoder's layers, in (0, `num_tokens`].
        layers (`Sequence[int]`): The 0-based decoder layer before which each cut falls, ascending. The layers before
            the first see the whole image.
        weights (`Sequence[float]`): Of each cut, positive. LearnPruner's two cuts have the layers (0, k) and the
            weights (`stage_ratio`, 1).
        num_layers (`int`): Decoder layers.

    Returns:
        `tuple[int, ...]`: For each cut, from 1 to `num_tokens`, none more than the one before it.

    Raises:
        `ValueError`: where the layers before the first cut leave less than a token for the others.
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


def _round_backwards(
    total: float, num_tokens: int, layers: Sequence[int], weights: Sequence[float], num_layers: int
) -> tuple[int, ...]:
    """Counts of the cuts that sum to `total` rows over all layers, where those before the first see the whole image.
    The first count may be more than the image has."""
    bounds = (*layers, num_layers)
    spans = [end - start for start, end in zip(layers, bounds[1:])]
    left, later, counts = total - layers[0] * num_tokens, 1, []
    for step in reversed(range(len(layers))):
        shares = sum(span * (weight / weights[step]) for span, weight in zip(spans[: step + 1], weights))
        count = half_up(left / shares)
        if step:
            # The earlier cuts must be able to keep as many.
            count = min(count, math.floor(left / (bounds[step + 1] - layers[0]) + SLACK))
        later = max(later, count)
        left -= spans[step] * later
        counts.append(later)
    return tuple(reversed(counts))


def mean_tokens(counts: Sequence[int], layers: Sequence[int], num_tokens: int, num_layers: int) -> float:
    """Mean number of vision tokens over the decoder's layers: the "retained tokens" of papers.

    Args:
        counts (`Sequence[int]`): Tokens kept by each cut.
        layers (`Sequence[int]`): The 0-based decoder layer before which each cut falls, ascending.
        num_tokens (`int`): Vision tokens before the first cut.
        num_layers (`int`): Decoder layers.
    """
    starts, ends = (0, *layers), (*layers, num_layers)
    return sum((end - start) * seen for start, end, seen in zip(starts, ends, (num_tokens, *counts))) / num_layers
