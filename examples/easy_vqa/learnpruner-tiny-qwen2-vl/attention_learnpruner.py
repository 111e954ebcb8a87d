# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What pruning does inside a layer's attention: it notes queries and keys for a cut, and in training it weighs keys.

Attention modules ask transformers for their function by the name in their configuration. Under that name a probe takes
the call, with queries and keys normed and rotated, and hands it to the user's own function.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedConfig

from .compat_learnpruner import ALL_ATTENTION_FUNCTIONS, eager_attention

# What padding and a gate of 0 add to a logit: its exponential is 0, and it fits float16.
HIDDEN = -1000.0
# Keeps the gradient of a smaller gate finite.
GATE_FLOOR = 1e-30

# Names among the keyword arguments of layers and attention: a run's; in training the call's, what gates add to the
# logits, and which keys are seen fully.
RUN, GATED, GATES, HARD = "pruned_run", "pruner_gated", "pruner_gates", "pruner_hard_gates"
# Of this copy of the code alone: two checkpoints with code of their own may be open in one process. It is the same in
# another process, so that models pickle.
PROBE = f"learnpruner_probe_{__name__}"
# Arguments of attention functions that change what a row pays, and that a score would have to follow.
UNSUPPORTED = ("s_aux", "softcap")


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
    run, call, gates, hard = (kwargs.pop(name, None) for name in (RUN, GATED, GATES, HARD))
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
    if gates is not None:
        call.gated += 1
        return gated_attention(stock, name == "sdpa", attention, (query, key, value), gates, hard, **kwargs)
    # These two read no configuration, and a view costs time in each layer of each token.
    own = attention if name in ("eager", "sdpa") else OwnConfig(attention)
    return stock(own, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(PROBE, attend)


def install_probe(attention: nn.Module) -> None:
    """Puts the probe into an attention module; does nothing where it is there."""
    if not isinstance(attention.config, ProbedConfig):
        attention.config = ProbedConfig(attention.config)


def log_gates(gates: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """What gates add to the logits of their keys, as [`split`]: `(batch, sequence, 3)`, float32.

    Args:
        gates (`torch.Tensor` of shape `(batch, sequence)`, float32): In [0, 1], 1 for text.
        attention_mask (`torch.Tensor` of shape `(batch, sequence)`, *optional*): 0 at padding.
    """
    hidden = gates == 0 if attention_mask is None else (gates == 0) | ~attention_mask.bool()
    return split((gates + GATE_FLOOR).log().masked_fill(hidden, HIDDEN))


def split(values: torch.Tensor) -> torch.Tensor:
    """`(...)` float32 -> `(..., 3)`: parts that bfloat16 holds exactly, so that no cast on the way (autocast, FSDP)
    loses any of their sum. The gradient goes through the first alone."""
    parts, rest = [], values.detach()
    for _ in range(3):
        parts.append(rest.bfloat16().float())
        rest = rest - parts[-1]
    return torch.stack([parts[0] + (values - values.detach()), *parts[1:]], dim=-1)


def gated_attention(stock: Callable, sdpa: bool, attention: nn.Module, states: tuple, bias, hard, **kwargs) -> tuple:
    """A layer's attention in training, with arguments and results as transformers has them: the softmax multiplies each
    key's exponential by its gate (the masked softmax of Dynamic-LLaVA, arXiv 2412.00876). A gate of 0 is the cut, and
    above it is differentiable. A row sees itself whatever its gate.

    Args:
        stock, sdpa, attention: The user's attention function, whether it is SDPA, and the module that calls it.
        states: Queries, keys and values of a whole prompt, each `(batch, heads or kv_heads, sequence, head_dim)`.
        bias (`torch.Tensor` of shape `(batch, sequence, 3)`): As [`log_gates`] makes it.
        hard (`torch.Tensor` of shape `(batch, sequence)`, bool, *optional*): Keys that are seen, fully, in place of the
            gates, which hand their gradient on (straight-through): bounded, for it is one of probabilities.
    """
    bias = bias.float().sum(-1)
    weigh = _by_keys if sdpa else _by_mask
    if hard is None:
        return weigh(stock, attention, states, bias, **kwargs)
    seen = hard & (bias > HIDDEN / 2)
    output, weights = weigh(stock, attention, states, torch.zeros_like(bias).masked_fill(~seen, HIDDEN), **kwargs)
    soft, _ = weigh(stock, attention, tuple(part.detach() for part in states), bias, **kwargs)
    return output + (soft - soft.detach()), weights


def _by_mask(stock, attention, states, bias, **kwargs):
    query = states[0]
    own = torch.eye(bias.shape[1], dtype=torch.bool, device=query.device)
    mask = bias.unsqueeze(1).masked_fill(own, 0).to(query.dtype)
    mask = mask.masked_fill(~torch.ones_like(own).tril(), torch.finfo(query.dtype).min)
    return stock(attention, *states, mask.unsqueeze(1), **kwargs)


def _by_keys(stock, attention, states, bias, **kwargs):
    """In further dimensions of keys, against ones in the queries: without a mask, every kernel can differentiate."""
    (query, key, value), scale, groups = states, kwargs["scaling"], states[0].shape[1] // states[1].shape[1]
    # Kernels want head sizes of multiples of 8.
    size, room = query.shape[-1], 6 + -(query.shape[-1] + 6) % 8
    with torch.autocast(query.device.type, enabled=False):
        # What a row's own key lacks to be seen fully, (1 - gate) of it, is one more key, in front: each query brings
        # the logit, and the value is a mark, which tells how much of the row's own value is to be added.
        own = (query.float() * key.float().repeat_interleave(groups, dim=1)).sum(-1)
        own = own + (1 - bias.exp() + GATE_FLOOR).log().unsqueeze(1) / scale  # expm1 loses the gradient of a gate of 0
        ones, mark = query.new_ones(3), F.one_hot(torch.tensor(0), room).to(value)
        queries = torch.cat([query, ones.expand(*query.shape[:-1], 3), split(own).to(query.dtype)], dim=-1)
        keys = torch.cat([key, split(bias / scale).to(key.dtype).unsqueeze(1).expand(*key.shape[:-1], 3)], dim=-1)
        front = F.pad(ones, (size + 3, room - 6)).to(key.dtype).expand(*key.shape[:2], 1, -1)
        marked = F.pad(mark, (size, 0)).expand(*value.shape[:2], 1, -1)
        wide = (
            F.pad(queries, (0, room - 6, 1, 0)),  # a row in front, too, so that causality stays
            torch.cat([front, F.pad(keys, (0, room - 3))], dim=2),
            torch.cat([marked, F.pad(value, (0, room))], dim=2),
        )
    output, weights = stock(attention, *wide, None, **kwargs)
    output, lacking = output[:, 1:, :, :size], output[:, 1:, :, size, None]
    value = value.repeat_interleave(groups, dim=1).transpose(1, 2)
    return (output.float() + lacking.float() * value.float()).to(value.dtype), weights


def reach_keywords(checkpoint: Callable, function: partial, *args, **options):
    """`checkpoint(function, ...)`, whose reentrant form sends gradients to positional tensors alone, and would go back
    through the graph of a keyword once for each layer: hands keywords with a gradient over as arguments."""
    names = [name for name, value in function.keywords.items() if torch.is_tensor(value) and value.requires_grad]
    rest = {name: value for name, value in function.keywords.items() if name not in names}

    def call(*given):
        return function.func(*function.args, *given[: len(args)], **rest, **dict(zip(names, given[len(args) :])))

    return checkpoint(call, *args, *(function.keywords[name] for name in names), **options)
