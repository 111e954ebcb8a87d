# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What methods inside the decoder share: where they cut, what text they read, and what they gather on their way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import get_ident

import torch
from torch import nn

from learnpruner.attention_learnpruner import RUN, Attended, Note
from learnpruner.cuts_learnpruner import DecoderState, TextAttention

from .base import scaled_layer


def cut_layer(method: str, layer: int | None, default: int, model: nn.Module) -> int:
    """The layer before which a method cuts: as set, or what a paper names for a decoder of 32, at the same depth.

    Raises:
        `ValueError`: where it is no layer behind the decoder's first.
    """
    depth = model.config.text_config.num_hidden_layers
    layer = scaled_layer(default, model) if layer is None else layer
    if not (isinstance(layer, int) and 0 < layer < depth):
        raise ValueError(f"{method}: layer is one from 1 to {depth - 1} of this decoder's {depth}, got {layer!r}.")
    return layer


def scaled_layers(model: nn.Module, layers: Sequence[int]) -> list[int]:
    """Layers that a paper names for a decoder of 32, at the same depths of this one as far as they stay different.

    Raises:
        `ValueError`: where the decoder has not one layer more than `layers`.
    """
    depth, found = model.config.text_config.num_hidden_layers, [0]
    if depth <= len(layers):
        raise ValueError(
            f"{len(layers)} cuts inside a decoder need {len(layers) + 1} layers, and this one has {depth}."
        )
    for step, layer in enumerate(layers):
        # Each later cut needs a layer of its own behind this one.
        found.append(min(max(found[-1] + 1, scaled_layer(layer, model)), depth - len(layers) + step))
    return found[1:]


@dataclass
class _Look:
    note: Note


def look_ahead(layer: nn.Module, hidden_states: torch.Tensor, position_embeddings: tuple) -> Attended:
    """What the attention of a decoder layer that is about to run would be given, without the keys of a cache. Attention
    itself is not computed.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, length, hidden)`): What the layer is given.
        position_embeddings: cos and sin, each `(batch or 1, length, head_dim)`.
    """
    look, states = _Look(Note(wanted=True, only=True)), layer.input_layernorm(hidden_states)
    layer.self_attn(states, attention_mask=None, position_embeddings=position_embeddings, **{RUN: look})
    return look.note.take()


def in_layer(layer: nn.Module, row: torch.Tensor, work: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Runs a decoder layer on one row, and meanwhile `work`, whose result this is. `work` may call the layer's modules,
    which then have their weights, sharded or offloaded as they may be elsewhere; it is given a tensor on their device.

    Args:
        row (`torch.Tensor` of shape `(1, 1, hidden)`): Of the dtype that the layer is given.
    """
    results, thread = [], get_ident()

    def run(module: nn.Module, given: tuple, states: torch.Tensor) -> None:
        # Other threads may run the same layer; and `work` itself calls the norm.
        if get_ident() == thread and not results:
            results.append(None)
            results[0] = work(states)

    one = row.new_ones(1, 1, layer.self_attn.head_dim)
    with layer.input_layernorm.register_forward_hook(run):
        layer(row, attention_mask=None, position_embeddings=(one, torch.zeros_like(one)))
    return results[0]


def next_layer_attention(state: DecoderState, query: str) -> torch.Tensor:
    """What [`TextAttention`] finds in the layer behind the cut, on what it is about to be given: `(batch, length)`
    float32, NaN where no text row sees a vision token.

    Its keys are those of the current rows: in a later turn on one cache, its rows do not see the turns before.

    Args:
        query (`"all"` or `"last"`): All text rows of the query, or its last alone.
    """
    number, length = state.number + 1, state.output.shape[1]
    attended = look_ahead(state.decoder.layers[number], state.output, state.position_embeddings)
    following = replace(
        state,
        number=number,
        hidden_states=state.output,
        attended=attended.to(state.vision.device),
        key_valid=None if state.key_valid is None else state.key_valid[:, -length:],
    )
    return TextAttention(query)(following)


def text_behind(state: DecoderState) -> torch.Tensor:
    """Text rows of the query that see a vision token, `(batch, length)` bool."""
    return state.queries & (state.vision.cumsum(1) > 0)


class RowValues:
    """A value of each row, kept until a later layer of the same call, when some of the rows have left."""

    def put(self, values: torch.Tensor, state: DecoderState) -> None:
        """Takes `(batch, length)`, in place of what was there."""
        self._values, self._index = values, state.index

    def at(self, state: DecoderState) -> torch.Tensor:
        """Returns `(batch, length)`: of the rows that are still there."""
        ordered, order = self._index.to(state.index.device).sort(dim=1)
        places = order.gather(1, torch.searchsorted(ordered, state.index.contiguous()))
        return self._values.to(places.device).gather(1, places)
