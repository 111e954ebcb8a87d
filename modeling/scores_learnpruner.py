# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What ranks vision tokens (the learned module, the attention of text), selections, and the gates of training.

Queries and keys of a layer come from a probe: attention modules ask transformers for their function by the name in
their configuration. Under that name the probe notes them, normed and rotated, and calls the user's own function.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .compat_learnpruner import eager_attention
from .prompt_learnpruner import send

# Query rows scored at a time: bounds the memory of a long question over a long image.
ROWS_AT_A_TIME = 128
# What is left of a key whose gate is 0: nothing that shows in float32, but enough for the right gradient.
GATE_FLOOR = 1e-8
# Weight of the squared budget error in the training loss, as in Dynamic-LLaVA (arXiv 2412.00876). The paper gives none.
BUDGET_WEIGHT = 100.0

# The name under which a run travels among the keyword arguments of layers and attention.
RUN = "pruned_run"
# Of this copy of the code alone: two checkpoints with code of their own may be open in one process. It is the same in
# another process, so that models pickle.
PROBE = f"learnpruner_probe_{__name__}"
# Arguments of attention functions that change what a row pays, and that a score would have to follow.
UNSUPPORTED = ("s_aux", "softcap")


class LearnedPruningModule(nn.Module):
    """Scores every vision token from the vision encoder's features (LearnPruner, arXiv 2604.23950, stage 1).

    LayerNorm - Linear(d, h) - GELU - Linear(h, 2) over {drop, keep}: the project's reading of the paper, which gives
    the number of parameters, 527,874 for CLIP-L (d = 1024, h = 512).
    """

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(input_size)
        self.hidden = nn.Linear(input_size, hidden_size)
        self.output = nn.Linear(hidden_size, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Keep minus drop logits, `(...)` float32: their sigmoid is the keep probability, but would tie more often.

        `features` are the encoder's before the projector, `(..., d)` of any float dtype; NaN in and out is structure.
        """
        structure = features.isnan().any(-1)
        features = features.masked_fill(structure.unsqueeze(-1), 0)
        with torch.autocast(features.device.type, enabled=False):
            hidden = self.hidden(self.norm(features.to(self.norm.weight.dtype)))
            drop, keep = self.output(F.gelu(hidden)).float().unbind(-1)
        return (keep - drop).masked_fill(structure, torch.nan)


def best_first(scores: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Columns in each row's descending order, `(rows, columns)` int64; ties go to the lower index.

    Args:
        scores (`torch.Tensor` of shape `(rows, columns)`, float32): NaN comes behind every number, -inf too.
        candidates (`torch.Tensor` of shape `(rows, columns)`, bool): Columns that come before all others.
    """
    # NaN takes the lowest number, above which all others are kept.
    lowest = torch.finfo(scores.dtype)
    scores = scores.clamp(min=lowest.min * (1 - lowest.eps)).nan_to_num(nan=lowest.min, posinf=torch.inf)
    return torch.where(candidates, scores, -torch.inf).argsort(dim=1, descending=True, stable=True)


def rank(scores: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Place of each column in the order of [`best_first`], starting at 0; `(rows, columns)`, int64."""
    return best_first(scores, candidates).argsort(dim=1)


def top_k(scores: torch.Tensor, candidates: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Marks the first `counts`, `(rows,)` int64, of each row in the order of [`best_first`]; `(rows, columns)` bool."""
    return rank(scores, candidates) < counts.unsqueeze(1)


def top_k_with_diversity(
    scores: torch.Tensor, candidates: torch.Tensor, counts: list[int], features: torch.Tensor, diversity: float
) -> torch.Tensor:
    """Top-k by score and, for the rest of `counts`, the "diversity tokens" of the paper; `(rows, columns)`, bool.

    Those are `round(diversity * count)`, but leave one token to the score. Each is the candidate whose largest cosine
    similarity to those already chosen is smallest. Structure (NaN features) comes last, in order.

    Args:
        scores, candidates, counts: As in [`top_k`], but `counts` are a `list[int]` on the host.
        features (`torch.Tensor` of shape `(rows, columns, d)`, any float dtype): What similarity is measured on.
        diversity (`float`): Share of `counts`, in [0, 1].
    """
    by_score = [max(1, count - round(diversity * count)) for count in counts]
    order = best_first(scores, candidates)
    extra = [count - first for count, first in zip(counts, by_score)]
    wanted = send([by_score, extra], scores.device).unsqueeze(-1)
    chosen = order.argsort(dim=1) < wanted[0]
    if not any(extra):
        return chosen
    structure = features.isnan().any(-1)
    directions = F.normalize(features.float().nan_to_num(), dim=-1)
    best = order[:, : max(by_score)]
    similarity = directions @ directions.take_along_dim(best.unsqueeze(-1), dim=1).mT
    similarity = similarity.masked_fill(~(chosen & ~structure).gather(1, best).unsqueeze(1), -torch.inf)
    # A cosine never reaches 2: structure comes after every patch that is left.
    nearest = similarity.amax(-1).masked_fill(structure, 2.0).masked_fill(chosen | ~candidates, torch.inf)
    rows = torch.arange(len(scores), device=scores.device)
    picks = []
    for _ in range(max(extra)):
        picks.append(nearest.argmin(1))
        similarity = torch.einsum("rcd,rd->rc", directions, directions[rows, picks[-1]])
        nearest = torch.maximum(nearest, similarity).scatter_(1, picks[-1].unsqueeze(1), torch.inf)
    still_wanted = torch.arange(max(extra), device=scores.device) < wanted[1]
    # A row without a candidate left picks its first column again, so what is still wanted is added up.
    added = torch.zeros_like(order).scatter_add(1, torch.stack(picks, dim=1), still_wanted.long())
    return chosen | (added > 0)


def budget_loss(probabilities: list[torch.Tensor], shares: list[float]) -> torch.Tensor:
    """Squared error between each image's mean keep probability and its share, R1 / patches; times [`BUDGET_WEIGHT`]."""
    errors = torch.stack([p.mean() - share for p, share in zip(probabilities, shares)])
    return BUDGET_WEIGHT * errors.square().mean()


@dataclass
class Attended:
    """What one decoder layer's attention was given, normed and rotated as its architecture does."""

    query: torch.Tensor  # (batch, heads, length, head_dim), of the current rows
    keys: torch.Tensor  # (batch, kv_heads, past + length, head_dim), of the cache, too
    scaling: float  # what multiplies their products

    def to(self, device: torch.device) -> "Attended":
        return Attended(self.query.to(device), self.keys.to(device), self.scaling)


@dataclass
class Note:
    """Whether what the next attention module is given is `wanted`, `only` that and no attention; and it, `attended`."""

    wanted: bool = False
    only: bool = False
    attended: Attended | None = None

    def take(self) -> Attended:
        """What was noted. Raises `RuntimeError` where attention did not pass through the probe."""
        if self.attended is None:
            raise RuntimeError(
                "A cut needs a layer's queries and keys, and its attention did not ask transformers for its function: "
                "was the layer or its attention module replaced? Pass pruner_ratio=1.0 to run without cuts."
            )
        return self.attended


class ProbedConfig:
    """What an attention module sees as its configuration: the text model's, read and written through, but for the name
    of its function."""

    def __init__(self, config: PreTrainedConfig):
        vars(self)["config"] = config

    @property
    def _attn_implementation(self) -> str:
        return PROBE

    def __getattr__(self, name: str) -> Any:
        if name == "config" or name.startswith("__"):  # while it is copied
            raise AttributeError(name)
        return getattr(self.config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.config, name, value)

    def __reduce__(self):
        return type(self), (self.config,)


class OwnConfig:
    """An attention module as the user's function expects it: with the configuration that the user sees."""

    def __init__(self, attention: nn.Module):
        self._attention, self.config = attention, attention.config.config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)


def attend(attention: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask, **kwargs):
    """The user's attention function, with the arguments and results of those of transformers."""
    run = kwargs.pop(RUN, None)
    if run is not None and run.note.wanted:
        run.note.wanted = False
        unsupported = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
        if unsupported:
            raise ValueError(f"A cut inside the decoder cannot score attention with {unsupported}: use stage 1 alone.")
        run.note.attended = Attended(query.detach(), key.detach(), kwargs["scaling"])
        if run.note.only:
            return query.transpose(1, 2), None
    name = attention.config.config._attn_implementation
    stock = eager_attention(attention) if name == "eager" else ALL_ATTENTION_FUNCTIONS.get_interface(name, None)
    # These two read no configuration, and a view costs time in each layer of each token.
    own = attention if name in ("eager", "sdpa") else OwnConfig(attention)
    return stock(own, query, key, value, attention_mask, **kwargs)


def register_probe() -> None:
    AttentionInterface.register(PROBE, attend)


register_probe()


def install_probe(attention: nn.Module) -> None:
    """Puts the probe into an attention module; does nothing where it is there."""
    if not isinstance(attention.config, ProbedConfig):
        attention.config = ProbedConfig(attention.config)


def attention_received(
    attended: Attended, rows: torch.Tensor, weights: torch.Tensor, key_valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean attention that each current token receives from the rows that can see it, and whether there is such a row.

    Softmax over all keys a row may see, mean over heads, then mean over rows (LearnPruner, arXiv 2604.23950, stage 2).
    Dividing by the rows that can see a column, not by all, keeps an early image from winning by its place. Both results
    are of shape `(batch, length)`, float32 and bool.

    Args:
        attended ([`Attended`]): By the layer.
        rows (`torch.Tensor` of shape `(batch, queries)`, int64): Indices of the query rows among `length`.
        weights (`torch.Tensor` of shape `(batch, queries)`, bool): Which of `rows` count.
        key_valid (`torch.Tensor` of shape `(batch, past + length)`, bool, *optional*): Keys that are not padding.
    """
    query, length = attended.query, attended.query.shape[2]
    # Counted from the first current row: the cache's columns are negative.
    columns = torch.arange(length - attended.keys.shape[2], length, device=rows.device)
    with torch.autocast(query.device.type, enabled=False):
        queries = query.take_along_dim(rows[:, None, :, None], dim=2).float() * attended.scaling
        keys = attended.keys.float().repeat_interleave(query.shape[1] // attended.keys.shape[1], dim=1).mT
        received, watchers = keys.new_zeros(len(rows), length), keys.new_zeros(len(rows), length)
        for start in range(0, rows.shape[1], ROWS_AT_A_TIME):
            chunk = slice(start, start + ROWS_AT_A_TIME)
            visible = columns <= rows[:, chunk].unsqueeze(-1)
            if key_valid is not None:
                visible = visible & key_valid.unsqueeze(1)
            # Not -inf: a row of a text-free sample sees nothing, and its softmax must stay a number.
            logits = (queries[:, :, chunk] @ keys).masked_fill(~visible.unsqueeze(1), torch.finfo(torch.float32).min)
            counted = weights[:, chunk].unsqueeze(-1)
            received += (logits.softmax(-1).mean(1) * counted)[..., -length:].sum(1)
            watchers += (visible & counted)[..., -length:].sum(1)
    return received / watchers.clamp(min=1), watchers > 0


def gated_causal_mask(gates: torch.Tensor, attention_mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the attention logits so that the softmax multiplies each key's exponential by its gate.

    The masked softmax of Dynamic-LLaVA (arXiv 2412.00876): at gates of 0 and 1 it is the cut itself, in between it is
    differentiable, and a dropped key still has a gradient. (Gates times embeddings would be undone by the layers'
    normalisation.) A row sees itself whatever its gate.

    Args:
        gates (`torch.Tensor` of shape `(batch, sequence)`, float32): In [0, 1], 1 for text.
        attention_mask (`torch.Tensor` of shape `(batch, sequence)`, *optional*): 0 at padding.
        dtype (`torch.dtype`): Of the layers' input and of the result, `(batch, 1, sequence, sequence)`.
    """
    own = torch.eye(gates.shape[1], dtype=torch.bool, device=gates.device)
    seen = torch.ones_like(own).tril()
    if attention_mask is not None:
        seen = (seen & attention_mask.bool().unsqueeze(1)) | own
    bias = (gates + GATE_FLOOR).log().to(dtype).unsqueeze(1).masked_fill(own, 0)
    return bias.masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)
