# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""SparseVLM (arXiv 2410.04417): three cuts by the attention of those text tokens that have to do with the picture."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from learnpruner.cuts_learnpruner import DecoderState, TextAttention
from learnpruner.scores_learnpruner import ROWS_AT_A_TIME

from .base import Method, Place
from .decoder import RowValues, scaled_layers, text_behind

# The authors' code numbers the layers that rank 2, 6 and 15, from 0: cuts fall behind them.
LAYERS, KEEP = (3, 7, 16), (300, 200, 110)


@dataclass(unsafe_hash=True)
class SparseVLM(Method):
    """SparseVLM (https://arxiv.org/abs/2410.04417): behind the decoder layers 2, 6 and 15 of 32, counted from 0, keeps
    the tokens to which the raters among the text rows pay most attention there.

    With the decoder's input embeddings V `(tokens, hidden)` of the vision tokens and T `(rows, hidden)` of the text
    behind the first image, r_t is the mean over v of softmax(V T^T)[v, t], the softmax over t (over v, every r_t would
    be the same). Raters are the text rows whose r_t is above the mean of r. The score of vision token i is the mean
    over heads and raters of the attention that i receives in the layer before the cut. As in the authors' code, the
    layer with the paper's number K, counted from 0, runs whole and ranks, and tokens leave behind it; the code's own
    log counts that layer as pruned already.

    Departures: the paper sets how many tokens leave by the rank of the raters' attention; its code keeps 300, 200 and
    110 of 576 for 192 tokens, and counts here are in this proportion. Nothing of what left is merged into new tokens,
    and positions are kept, as in SparseVLM+. A rater counts for the tokens that it sees; where no text row is above the
    mean (a single one cannot be), all rate.
    """

    def places(self, model: nn.Module) -> tuple[Place, ...]:
        score = RaterAttention("all")
        return tuple(
            Place(layer, share, score, watched=() if step else (0,))
            for step, (layer, share) in enumerate(zip(scaled_layers(model, LAYERS), KEEP))
        )


@dataclass(unsafe_hash=True)
class RaterAttention(TextAttention):
    """One for the three cuts of a call.

    Attributes:
        raters ([`RowValues`]): Which rows rate.
    """

    raters: RowValues = field(default_factory=RowValues)

    @contextmanager
    def watch(self, state: DecoderState) -> Iterator[None]:
        text = text_behind(state)
        relevance = _relevance(state, text)
        mean = relevance.sum(1, keepdim=True) / text.sum(1, keepdim=True).clamp(min=1)
        raters = text & (relevance > mean)
        self.raters.put(torch.where(raters.any(1, keepdim=True), raters, text), state)
        yield

    def __call__(self, state: DecoderState) -> torch.Tensor:
        return super().__call__(replace(state, queries=self.raters.at(state)))


def _relevance(state: DecoderState, text: torch.Tensor) -> torch.Tensor:
    """r_t of [`SparseVLM`], `(batch, length)` float32, 0 but for `text`."""
    rows = text.long().argsort(dim=1, stable=True)[:, text.shape[1] - state.num_text :]
    counted = text.gather(1, rows).unsqueeze(1)
    states = state.hidden_states.float()
    of_text = states.gather(1, rows.unsqueeze(-1).expand(-1, -1, states.shape[-1])).mT
    total = states.new_zeros(rows.shape)
    with torch.autocast(states.device.type, enabled=False):
        for part, vision in zip(states.split(ROWS_AT_A_TIME, 1), state.vision.split(ROWS_AT_A_TIME, 1)):
            # Not -inf: where there is no text, the softmax must stay a number.
            products = (part @ of_text).masked_fill(~counted, torch.finfo(torch.float32).min)
            total += (products.softmax(-1) * counted * vision.unsqueeze(-1)).sum(1)
    total = total / state.vision.sum(1, keepdim=True).clamp(min=1)
    return torch.zeros_like(state.vision_scores).scatter(1, rows, total)
