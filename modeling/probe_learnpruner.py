# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""How a cut learns what a layer's attention was given, on any attention backend.

An attention module asks transformers for its function by the name in its configuration. The probe stands under that
name: it notes queries and keys, normed and rotated as the architecture does, where a run asks for them, and calls the
user's own function.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .compat_learnpruner import eager_attention
from .scores_learnpruner import Attended

# The name under which a run travels among the keyword arguments of layers and attention.
RUN = "pruned_run"
# Of this copy of the code alone: two checkpoints with code of their own may be open in one process. It is the same in
# another process, so that models pickle.
PROBE = f"learnpruner_probe_{__name__}"
# Arguments of attention functions that change what a row pays, and that a score would have to follow.
UNSUPPORTED = ("s_aux", "softcap")


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
