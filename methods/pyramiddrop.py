# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""PyramidDrop (arXiv 2410.17247): half of the tokens leave at each quarter of the decoder."""

from dataclasses import dataclass

import torch
from torch import nn

from learnpruner.cuts_learnpruner import DecoderState, TextAttention

from .base import Method, Place
from .decoder import next_layer_attention, scaled_layers

LAYERS, KEEP = (8, 16, 24), (0.5, 0.25, 0.125)


@dataclass(unsafe_hash=True)
class PyramidDrop(Method):
    """PyramidDrop (https://arxiv.org/abs/2410.17247): after a quarter, a half and three quarters of the decoder, keeps
    0.5, 0.25 and 0.125 of the tokens (or counts in this proportion), those to which the prompt's last token pays most.

    With A `(heads, tokens)` the attention of the prompt's last text row in the layer behind the cut, computed with its
    q and k from what the layer before it put out, the score of vision token i is the mean over the heads of A[h, i].

    Departures: positions are kept, where the authors' code numbers the rows anew after each cut; and in a later turn on
    one cache, the last row's softmax is over the keys of that turn alone.

    Args:
        ratio: As in [`Method`]; by default that of the paper's schedule, which is the mean of 1, 0.5, 0.25 and 0.125.
    """

    ratio: float = 1.875 / 4

    def places(self, model: nn.Module) -> tuple[Place, ...]:
        score = NextLayerAttention("last")
        return tuple(Place(layer, share, score) for layer, share in zip(scaled_layers(model, LAYERS), KEEP))


@dataclass(unsafe_hash=True)
class NextLayerAttention(TextAttention):
    def __call__(self, state: DecoderState) -> torch.Tensor:
        return next_layer_attention(state, self.query)
