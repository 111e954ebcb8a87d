# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""TransPrune (arXiv 2507.20630): three cuts by how layers change a token, and by what the text attends to."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from threading import get_ident

import torch
from torch import nn
from torch.nn import functional as F

from learnpruner.cuts_learnpruner import DecoderState

from .base import Method, Place, TopKSamples
from .decoder import RowValues, next_layer_attention, scaled_layers

LAYERS, KEEP = (7, 9, 12), (0.875, 0.625, 0.125)


@dataclass(unsafe_hash=True)
class TransPrune(Method):
    """TransPrune (https://arxiv.org/abs/2507.20630): after the decoder layers 7, 9 and 12 of 32, keeps 0.875, 0.625 and
    0.125 of the tokens (or counts in this proportion) whose representation the layers turn and stretch most (TTV) and
    that the text attends to (IGA).

    For attention and for MLP, each F, with in_i what F is given of token i (behind the norm) and out_i what it adds:
    d_i = cos(out_i, in_i), TTV_F(i) = softmax_i(1 - |d_i|) ||out_i|| / ||in_i||, over the vision tokens still there.
    TTV(i) is the sum over both F and over the layers from the one before the first cut (7 to 12, counted from 1) up to
    the cut. IGA(i) is the attention that token i receives in the layer behind the cut, mean over its heads and over the
    text rows that see i, its softmax over all keys. The score is TTV(i) / sum(TTV) + IGA(i) / sum(IGA).

    Departures: positions are kept, where the authors' code numbers the rows anew after each cut. The text that is not
    in the query mask guides nothing, and a token that no text sees takes the others' mean for its IGA. In a decoder of
    another depth the layers are at the same shares of it.

    Args:
        ratio: As in [`Method`]; by default that of the paper's schedule on 32 layers.
        variant (`"paper"` or `"code"`): With `"code"`, as in the authors' code, the softmax is one of 1 - d_i, not of
            its absolute value, over text rows, too: the vision tokens still there, and the rows of the query.
    """

    # 7 layers see all, 2, 3 and 20 the shares above.
    ratio: float = 13.125 / 32
    variant: str = "paper"

    def __post_init__(self):
        super().__post_init__()
        if self.variant not in ("paper", "code"):
            raise ValueError(f"variant is 'paper' or 'code', got {self.variant!r}.")

    def places(self, model: nn.Module) -> tuple[Place, ...]:
        layers = scaled_layers(model, LAYERS)
        score = TransitionScore(self.variant, layers[0] - 1)
        return tuple(
            Place(layer, share, score, watched=tuple(range(before, layer)))
            for (before, layer), share in zip(pairwise((layers[0] - 1, *layers)), KEEP)
        )


@dataclass(unsafe_hash=True)
class TransitionScore(TopKSamples):
    """One for the three cuts of a call.

    Attributes:
        variant (`str`): As in [`TransPrune`].
        first (`int`): The layer, 0-based, whose TTV is the first of the sum.
        total ([`RowValues`]): The sum up to the layer that ran last.
    """

    variant: str
    first: int
    total: RowValues = field(default_factory=RowValues)

    @contextmanager
    def watch(self, state: DecoderState) -> Iterator[None]:
        layer, thread, seen = state.decoder.layers[state.number], get_ident(), []

        def note(module, arguments, output):
            # Other threads may run the same model.
            if get_ident() == thread:
                seen.append(output[0] if isinstance(output, tuple) else output)

        with ExitStack() as hooks:
            for module in (layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp):
                hooks.enter_context(module.register_forward_hook(note))
            yield
        attention_input, attention_output, mlp_input, mlp_output = seen
        values = self._transition(attention_input, attention_output, state)
        values = values + self._transition(mlp_input, mlp_output, state)
        self.total.put(values if state.number == self.first else values + self.total.at(state), state)

    def _transition(self, given: torch.Tensor, added: torch.Tensor, state: DecoderState) -> torch.Tensor:
        """TTV of one F, `(batch, length)` float32, 0 for text."""
        given, added = given.float(), added.float()
        cosine = F.cosine_similarity(added, given, dim=-1).to(state.vision.device)
        stretch = (added.norm(dim=-1) / given.norm(dim=-1)).to(state.vision.device)
        rows = state.vision
        if self.variant == "paper":
            cosine = cosine.abs()
        else:
            rows = rows | state.queries
        turn = (1 - cosine).masked_fill(~rows, -torch.inf).softmax(-1)
        return (turn * stretch).masked_fill(~state.vision, 0)

    def __call__(self, state: DecoderState) -> torch.Tensor:
        guidance = next_layer_attention(state, "all")
        unseen = state.vision & guidance.isnan()
        guidance = guidance.nan_to_num(0)
        mean = guidance.sum(1, keepdim=True) / (state.vision & ~unseen).sum(1, keepdim=True).clamp(min=1)
        scores = _share(self.total.at(state), state) + _share(torch.where(unseen, mean, guidance), state)
        return scores.masked_fill(~state.vision, torch.nan)


def _share(values: torch.Tensor, state: DecoderState) -> torch.Tensor:
    """Of their sum over the sample's vision tokens; 0 where the sum is."""
    values = values.masked_fill(~state.vision, 0)
    return values / values.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
