# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""DART (arXiv 2502.11494): a few pivots, and the tokens that repeat them least."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from learnpruner.cuts_learnpruner import DecoderState
from learnpruner.scores_learnpruner import best_first, rank

from .base import Method, Place
from .decoder import cut_layer, text_behind

# Of each kind: vision tokens, and rows of text.
PIVOTS = 4


@dataclass(unsafe_hash=True)
class DART(Method):
    """DART (https://arxiv.org/abs/2502.11494): after K decoder layers, keeps a few pivots and the tokens least like
    them.

    With k_i the rotated key of row i in layer K-1 (0-based), all of its heads, and h_i the decoder's last norm of what
    that layer puts out: pivots are the 4 vision tokens and the 4 text rows behind the first image with the largest
    ||k_i||_1. Each pivot p in turn, vision tokens first, takes the T vision tokens not yet taken with the lowest
    cos(h_p, h_i). The vision tokens among the pivots stay, too.

    Departures: counts are exact. The authors' T is an eighth of the budget, rounded down, beside the pivots; here all
    that the pivots leave of it is spread over them, one more for the first where it is not even. A sample with fewer
    text rows has fewer pivots, a budget below 4 is pivots alone, and the vision token that ends a sample is a pivot.
    Positions are counted from the first row of the sample in this call, so that padding makes no difference.
    The score recorded is ||k_i||_1, which ranks pivots alone.

    Args:
        layer (`int`, *optional*): K, at least 1. Defaults to the paper's 2 of 32, at the same depth of the model.
    """

    layer: int | None = None

    def places(self, model: nn.Module) -> tuple[Place, ...]:
        return (Place(cut_layer("dart", self.layer, 2, model), 1, PivotScore()),)


@dataclass(unsafe_hash=True)
class PivotScore:
    def __call__(self, state: DecoderState) -> torch.Tensor:
        return _key_norms(state).masked_fill(~state.vision, torch.nan)

    def select(self, scores: torch.Tensor, state: DecoderState, counts: torch.Tensor) -> torch.Tensor:
        of_vision = _best(scores, state.vision, counts)
        text = text_behind(state)
        of_text = _best(_key_norms(state), text, text.sum(1))
        pivots, present = (torch.cat(parts, dim=1) for parts in zip(of_vision, of_text))
        # What the pivots leave of the budget, as evenly as can be.
        left, number = counts - of_vision[1].sum(1), present.sum(1).clamp(min=1)
        more = present.cumsum(1) <= (left % number).unsqueeze(1)
        takes = ((left // number).unsqueeze(1) + more) * present

        hidden = state.decoder.norm(state.output).to(state.vision.device).float()
        with torch.autocast(hidden.device.type, enabled=False):
            directions = F.normalize(hidden, dim=-1)
            at_pivots = directions.gather(1, pivots.unsqueeze(-1).expand(-1, -1, directions.shape[-1]))
            cosines = directions @ at_pivots.mT
        chosen = torch.zeros_like(state.vision).scatter(1, *of_vision)
        for turn in range(pivots.shape[1]):
            chosen = chosen | (rank(-cosines[..., turn], state.vision & ~chosen) < takes[:, turn : turn + 1])
        return chosen


def _best(scores: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows with the highest scores, `(batch, up to PIVOTS)`, and which of them are among the first `counts`."""
    best = best_first(scores, rows)[:, :PIVOTS]
    return best, torch.arange(best.shape[1], device=best.device) < counts.unsqueeze(1)


def _key_norms(state: DecoderState) -> torch.Tensor:
    """||k_i||_1 of the rotated keys of all heads, `(batch, length)` float32, as if the sample's first row stood at
    position 0: unlike attention, it depends on how much padding stands before."""
    batch, length, _ = state.hidden_states.shape
    cos, sin = state.position_embeddings
    keys = state.attended.keys[:, :, -length:]
    if state.key_valid is not None:
        start = state.key_valid[:, -length:].int().argmax(1).view(-1, 1, 1)
        cos, sin = (part.expand(batch, -1, -1).gather(1, start.expand(-1, -1, part.shape[-1])) for part in (cos, sin))
    keys, _ = apply_rotary_pos_emb(keys.float(), keys.float(), cos[:, :1].float(), -sin[:, :1].float())
    return keys.abs().sum((1, 3))
