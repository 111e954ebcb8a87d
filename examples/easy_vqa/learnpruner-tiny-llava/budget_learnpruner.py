# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The budget formula: from a ratio to the tokens that each cut keeps."""

import math

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

    Their mean over the decoder's layers is the budget, to half a token where that is one token or more; 1 <= R2 <= R1
    <= `num_tokens`, and R1 is near `stage_ratio` (at least 1) * R2: the first cut takes up the second's rounding.

    Args:
        num_tokens, ratio: Vision tokens of the image, and the mean share kept over the decoder's layers, in (0, 1].
        num_layers, pruner_layer: Decoder layers, and how many of them see R1, at least 1. If all do, R1 is R2.
    """
    mean, behind = ratio * num_tokens, num_layers - pruner_layer
    if behind == 0:
        return (max(1, half_up(mean)),) * 2
    total = mean * num_layers
    second = max(1, min(math.floor(mean + SLACK), half_up(total / (stage_ratio * pruner_layer + behind))))
    first = max(second, half_up((total - behind * second) / pruner_layer))
    if first >= num_tokens:
        return num_tokens, max(1, half_up((total - pruner_layer * num_tokens) / behind))
    return first, second
