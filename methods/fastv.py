# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""FastV (arXiv 2403.06764): one cut in an early decoder layer, by the last token's attention."""

from dataclasses import dataclass

from torch import nn

from learnpruner.cuts_learnpruner import TextAttention

from .base import Method, Place
from .decoder import cut_layer


@dataclass(unsafe_hash=True)
class FastV(Method):
    """FastV (https://arxiv.org/abs/2403.06764): after K decoder layers, keeps the tokens to which the prompt's last
    token paid most attention.

    With A `(heads, tokens)` the attention of the last row of the prompt in layer K-1 (0-based), the score of vision
    token i is the mean over the heads of A[h, i]. Here the row's attention is computed again from the layer's keys, so
    that no attention map is made. Positions are kept, as in the paper's code; layers from K on hold the short cache.

    Args:
        layer (`int`, *optional*): K, at least 1. Defaults to the paper's 2 of 32, at the same depth of the model.
    """

    layer: int | None = None

    def places(self, model: nn.Module) -> tuple[Place, ...]:
        return (Place(cut_layer("fastv", self.layer, 2, model), 1, TextAttention("last")),)
