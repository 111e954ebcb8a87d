# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""From one ratio to the exact number of tokens that each cut keeps."""


def keep_counts(
    num_tokens: int, ratio: float, *, num_layers: int, pruner_layer: int, stage_ratio: float
) -> tuple[int, int]:
    """Tokens of one image that survive the first and the second cut (LearnPruner, arXiv 2604.23950).

    The first `pruner_layer` decoder layers see R1 tokens and the others R2, with R1 = `stage_ratio` * R2 and a mean
    over all layers of `ratio * num_tokens`. Where R1 would exceed the image, it is the whole image and R2 alone makes
    the mean. Both are at least 1, so that no image disappears.

    Args:
        num_tokens (`int`): Vision tokens of the image (N).
        ratio (`float`): Mean share of tokens kept over the decoder's layers, in (0, 1].
        num_layers (`int`): Decoder layers (L).
        pruner_layer (`int`): Layers that see R1 (k, from 1 to L).
        stage_ratio (`float`): R1 / R2, at least 1.

    Returns:
        `tuple[int, int]`: (R1, R2), with 1 <= R2 <= R1 <= N.
    """
    rest = num_layers - pruner_layer
    total = ratio * num_tokens * num_layers
    r2 = total / (stage_ratio * pruner_layer + rest)
    if rest == 0:
        r1 = r2 = ratio * num_tokens
    elif stage_ratio * r2 > num_tokens:
        r1, r2 = num_tokens, (total - pruner_layer * num_tokens) / rest
    else:
        r1 = stage_ratio * r2
    first = min(num_tokens, max(1, round(r1)))
    return first, min(first, max(1, round(r2)))
