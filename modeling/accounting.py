# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Budgets of any schedule: the tokens that its cuts keep, and the mean over the layers that papers report."""

from collections.abc import Sequence
from itertools import pairwise


def spread_budget(
    num_tokens: int, budget: float, layers: Sequence[int], weights: Sequence[float], num_layers: int
) -> tuple[int, ...]:
    """Tokens that survive each cut, so that the mean over the decoder's layers is the budget.

    The cuts keep tokens in the proportion of `weights`, none more than the image has. LearnPruner's two are the layers
    (0, k) with the weights (3, 1).

    Args:
        num_tokens (`int`): Vision tokens of the image.
        budget (`float`): Mean number of tokens over the decoder's layers, in (0, `num_tokens`].
        layers (`Sequence[int]`): The 0-based decoder layer before which each cut falls, ascending. The layers before
            the first see the whole image.
        weights (`Sequence[float]`): Of each cut, positive, not ascending.
        num_layers (`int`): Decoder layers.

    Returns:
        `tuple[int, ...]`: For each cut, from 1 to `num_tokens`.

    Raises:
        `ValueError`: where the layers before the first cut leave less than a token for the others.
    """
    spans = [after - before for before, after in pairwise((*layers, num_layers))]
    total = budget * num_layers - layers[0] * num_tokens
    if layers[0] and total < sum(spans):
        least = (layers[0] * num_tokens + sum(spans)) / num_layers
        raise ValueError(
            f"A mean of {budget:g} of {num_tokens} tokens is out of reach: {layers[0]} of {num_layers} layers see the "
            f"whole image, so that it is at least {least:.4g}."
        )
    # Cuts that would keep more than the image keep the image, and the others share what is left.
    for whole in range(len(weights) + 1):
        rest = sum(span * weight for span, weight in zip(spans[whole:], weights[whole:]))
        left = total - num_tokens * sum(spans[:whole])
        if rest == 0 or left / rest * weights[whole] <= num_tokens:
            break
    scale = left / rest if rest else 0.0
    counts = [num_tokens] * whole + [round(scale * weight) for weight in weights[whole:]]
    return tuple(min(num_tokens, max(1, count)) for count in counts)


def mean_tokens(counts: tuple[int, ...], layers: tuple[int, ...], num_tokens: int, num_layers: int) -> float:
    """Mean number of vision tokens over the decoder's layers: the "retained tokens" of papers.

    Args:
        counts (`tuple[int, ...]`): Tokens kept by each cut.
        layers (`tuple[int, ...]`): The 0-based decoder layer before which each cut falls, ascending.
        num_tokens (`int`): Vision tokens before the first cut.
        num_layers (`int`): Decoder layers.
    """
    bounds = (0, *layers, num_layers)
    spans = [end - start for start, end in pairwise(bounds)]
    return sum(span * count for span, count in zip(spans, (num_tokens, *counts))) / num_layers
