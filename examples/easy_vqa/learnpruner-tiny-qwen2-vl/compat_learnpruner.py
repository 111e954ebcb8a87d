# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The names of transformers that this package depends on, in one place.

What can be asked of a stock class is asked. The rest (private hooks, internal modules, the range of releases) is named
here, from where the other files take it, so that a rename costs at most one line.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from inspect import Parameter, signature
from typing import get_args

import torch
import transformers
from torch import nn
from transformers import GenerationMixin, LlamaModel, conversion_mapping
from transformers.cache_utils import DynamicLayer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.peft import maybe_load_adapters
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, logging

logger = logging.get_logger(__name__)

# transformers: the oldest release that has what this package builds on (checkpoint conversion for custom classes,
# mm_encoder_outputs, create_causal_mask(layer_idx=...)), and the newest that the tests passed on.
OLDEST, NEWEST_TESTED = (5, 20), (5, 24)

# The KV cache among the arguments and outputs of stock classes: `cache` from 5.24 on, `past_key_values` before.
CACHE_NAMES = ("cache", "past_key_values")
CACHE = next((name for name in CACHE_NAMES if name in signature(LlamaModel.forward).parameters), None)

# Steps of `generate` that this package overrides or reads, 5.20 to 5.24. They are private: each may go in any release.
GENERATE_STEPS = (
    "_maybe_prepare_encoder_kwargs_for_generation",
    "_prepare_position_ids_for_generation",
    "_get_candidate_generator",
    "prepare_inputs_for_generation",
)

# `model_type` of the text models whose layers the hooks were tested on, against a masked stock model.
QWEN_TEXT_MODELS = ("qwen2_5_vl_text", "qwen2_vl_text")
TEXT_MODELS = ("gemma", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", *QWEN_TEXT_MODELS)

# What the stock loop of a text model with DeepStack (Qwen3-VL) adds to rows behind its first layers, 5.20 to 5.24.
DEEPSTACK_WHERE, DEEPSTACK_FEATURES = "visual_pos_masks", "deepstack_visual_embeds"


def check_transformers() -> None:
    """Raises `ImportError` where transformers is too old or lacks a name of this file, `ValueError` under DeepSpeed's
    ZeRO-3, whose parameters are parts: loading could check none of them. Warns where transformers is untested."""
    installed = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    oldest, newest = (".".join(map(str, release)) for release in (OLDEST, NEWEST_TESTED))
    if installed < OLDEST:
        wanted = f"transformers>={oldest}"
        raise ImportError(f"learnpruner needs {wanted} and found {transformers.__version__}: pip install -U '{wanted}'")
    missing = [name for name in GENERATE_STEPS if not hasattr(GenerationMixin, name)]
    if missing:
        raise ImportError(
            f"transformers {transformers.__version__} has no {', '.join(missing)}, which learnpruner builds on: run "
            f"`pip install -U learnpruner`, or install transformers {newest}."
        )
    if is_deepspeed_zero3_enabled():
        raise ValueError("LearnPruner does not run under DeepSpeed's ZeRO-3: use ZeRO-2, or FSDP2 for a large base.")
    if installed > NEWEST_TESTED:
        logger.warning_once(
            f"learnpruner was tested up to transformers {newest} and runs on {transformers.__version__}. Run "
            "`learnpruner doctor` before you rely on it."
        )


def installed_names(arguments: dict) -> dict:
    """The same arguments, the KV cache under the name of the installed transformers. Raises `TypeError` where two
    different caches came under two names; `None` never overrules a cache."""
    for name in CACHE_NAMES:
        if name != CACHE and name in arguments:
            arguments = dict(arguments)
            cache, other = arguments.pop(name), arguments.get(CACHE)
            if cache is not None and other is not None and other is not cache:
                raise TypeError(f"Two different caches were given, as {name} and as {CACHE}: pass one.")
            if cache is not None:
                arguments[CACHE] = cache
    return arguments


def derive_forward(cls: type, mixin: type) -> None:
    """Gives `cls` the forward of `mixin`, which takes keyword arguments alone, under the signature of the stock forward
    behind it: those that the mixin names stand behind the stock ones. Callers may pass stock arguments by position, and
    the KV cache under any of its names. Raises `TypeError` where the stock forward takes it under none of them."""
    own, stock = mixin.forward, getattr(super(mixin, cls), "forward", None)
    if stock is None or cls.forward is not own:
        return  # a mixin of a family, which is no model yet, or a subclass with a forward of its own
    parameters = signature(stock).parameters
    if CACHE not in parameters:
        raise TypeError(
            f"{stock.__qualname__} takes none of {CACHE_NAMES}: transformers may have renamed the KV cache. Run "
            "`pip install -U learnpruner`."
        )
    *named, rest = parameters.values()
    keywords = (each for each in signature(own).parameters.values() if each.kind is Parameter.KEYWORD_ONLY)
    added = [each for each in keywords if each.name not in parameters]
    names = [each.name for each in named[1:]]

    def forward(self, *args, **kwargs):
        if args:
            given = dict(zip(names, args))
            if len(args) > len(names) or given.keys() & kwargs.keys():
                signature(stock).bind(self, *args, **kwargs)  # raises Python's own message
            kwargs = given | kwargs
        return own(self, **installed_names(kwargs))

    forward.__doc__, forward.__module__ = own.__doc__, cls.__module__
    forward.__qualname__ = f"{cls.__qualname__}.forward"
    forward.__signature__ = signature(stock).replace(parameters=[*named, *added, rest])
    cls.forward, cls.stock_arguments = forward, frozenset(names)
    for output in output_classes(forward):
        output_with_records(output)  # now: torch.compile would stop where a class is made


RECORDS = ("kept_mask", "vision_scores")
_OUTPUTS: dict[type, type] = {}  # output classes that were made, by the stock class that they extend


class Recorded:
    """What is added to the output of a stock class. Its `logits` and `last_hidden_state` keep the caller's length, with
    zeros for dropped tokens; `hidden_states` and `attentions` are what the layers held, shorter after each cut.

    Each is a tuple with a tensor `(batch, sequence)` for each cut, or `None` where nothing was cut: `kept_mask`, bool,
    True where the token survives it (text True, padding False); `vision_scores`, float32, the scores that ranked, NaN
    where a token was not scored; in training, the first cut's.
    """

    def __reduce__(self):
        return _restore, (type(self).__mro__[2], {each.name: getattr(self, each.name) for each in fields(self)})


def output_with_records(stock: type[ModelOutput]) -> type[ModelOutput]:
    """The output class `stock`, whichever it is, with the fields of [`Recorded`]."""
    if stock not in _OUTPUTS:
        annotations = dict.fromkeys(RECORDS, tuple[torch.Tensor, ...] | None)
        body = {"__module__": __name__, "__annotations__": annotations, **dict.fromkeys(RECORDS)}
        _OUTPUTS[stock] = dataclass(type(f"LearnPruner{stock.__name__}", (Recorded, stock), body))
    return _OUTPUTS[stock]


def _restore(stock: type[ModelOutput], values: dict) -> ModelOutput:
    return output_with_records(stock)(**values)


def output_classes(forward: Callable) -> list[type[ModelOutput]]:
    """The output classes that a forward is annotated with."""
    annotated = signature(forward).return_annotation
    kinds = get_args(annotated) or (annotated,)
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, ModelOutput)]


def fields_beside_predictions(cls: type) -> list[str]:
    """All output fields of a class with a head but loss and logits: what `Trainer.evaluate` must not gather."""
    names = [each.name for kind in output_classes(cls.forward) for each in fields(kind)]
    return [name for name in (*names, *RECORDS) if name not in ("loss", "logits")]


def eager_attention(attention: nn.Module) -> Callable:
    """The eager attention function of an attention module, which stands beside its class, 5.20 to 5.24."""
    files = (sys.modules[kind.__module__] for kind in type(attention).__mro__)
    found = [file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward")]
    if not found:
        raise RuntimeError(f"{type(attention).__name__} has no eager attention: pass attn_implementation='sdpa'.")
    return found[0]
