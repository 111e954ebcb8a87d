# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The names of transformers that this package depends on, in one place.

What can be asked of a stock class is asked: the arguments of its forward, the class of its output. What cannot be asked
(private hooks, the range of releases) is named here. A rename in transformers costs at most one line of this file.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from inspect import Parameter, signature
from typing import get_args

import torch
import transformers
from torch import nn
from transformers import GenerationMixin, LlamaModel
from transformers.utils import ModelOutput, logging

logger = logging.get_logger(__name__)

# transformers: the oldest release that has what this package builds on (checkpoint conversion for custom classes,
# mm_encoder_outputs, create_causal_mask(layer_idx=...)), and the newest minor release that the tests passed on.
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

# What the stock loop of a text model with DeepStack (Qwen3-VL) adds to rows behind its first layers, 5.20 to 5.24.
DEEPSTACK_WHERE, DEEPSTACK_FEATURES = "visual_pos_masks", "deepstack_visual_embeds"


def check_transformers() -> None:
    """Raises `ImportError` where transformers is too old or lacks a name of this file; warns where it is newer than
    tested."""
    installed = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if installed < OLDEST:
        wanted = f"transformers>={OLDEST[0]}.{OLDEST[1]}"
        raise ImportError(f"learnpruner needs {wanted} and found {transformers.__version__}: pip install -U '{wanted}'")
    missing = [name for name in GENERATE_STEPS if not hasattr(GenerationMixin, name)]
    missing += [] if CACHE else ["cache"]
    if missing:
        raise ImportError(
            f"transformers {transformers.__version__} no longer has {', '.join(missing)}, which learnpruner builds on: "
            f"run `pip install -U learnpruner`, or install transformers {NEWEST_TESTED[0]}.{NEWEST_TESTED[1]}."
        )
    if installed > NEWEST_TESTED:
        logger.warning_once(
            f"learnpruner was tested up to transformers {NEWEST_TESTED[0]}.{NEWEST_TESTED[1]} and runs on "
            f"{transformers.__version__}. Run `learnpruner doctor` before you rely on it."
        )


def installed_names(arguments: dict) -> dict:
    """The same arguments with the KV cache under the name that the installed transformers gives it.

    Raises:
        `TypeError`: where two different caches came under two names.
    """
    for name in CACHE_NAMES:
        if name == CACHE or name not in arguments:
            continue
        arguments = dict(arguments)
        other = arguments.pop(name)
        # `None` never overrules a cache that came under the other name.
        if other is None:
            continue
        if arguments.get(CACHE) is not None and arguments[CACHE] is not other:
            raise TypeError(f"Two different caches were given, as {name} and as {CACHE}: pass one.")
        arguments[CACHE] = other
    return arguments


def derive_method(cls: type, mixin: type, name: str) -> None:
    """Gives `cls` the method `name` of `mixin` under the signature of the stock method that it extends.

    The mixin's method takes keyword arguments alone. Callers may pass stock arguments by position, and the KV cache under
    any of its names.

    Args:
        cls (`type`): A class that inherits from `mixin` and, behind it, from a stock class.
        mixin (`type`): Has the method, whose keyword-only arguments are added behind the stock ones.

    Raises:
        `TypeError`: where the stock method takes the KV cache under no known name.
    """
    own, stock = mixin.__dict__[name], getattr(super(mixin, cls), name, None)
    if stock is None or getattr(cls, name) is not own:
        return  # a mixin of a family, which is no model yet, or a subclass that has its own method
    parameters = signature(stock).parameters
    if not parameters.keys() & set(CACHE_NAMES):
        raise TypeError(
            f"{stock.__qualname__} takes no argument {' or '.join(CACHE_NAMES)}: transformers {transformers.__version__} "
            "may have renamed the KV cache. Run `pip install -U learnpruner`."
        )
    named = [each for each in parameters.values() if each.kind is Parameter.POSITIONAL_OR_KEYWORD]
    added = [each for each in signature(own).parameters.values() if each.kind is Parameter.KEYWORD_ONLY]
    rest = [each for each in parameters.values() if each.kind is Parameter.VAR_KEYWORD]
    names = tuple(each.name for each in named[1:])

    def method(self, *args, **kwargs):
        if args:
            given = dict(zip(names, args))
            if len(args) > len(names) or given.keys() & kwargs.keys():
                signature(stock).bind(self, *args, **kwargs)  # raises Python's own message
            kwargs = given | kwargs
        return own(self, **installed_names(kwargs))

    method.__name__, method.__doc__, method.__module__ = name, own.__doc__, own.__module__
    method.__qualname__ = f"{cls.__qualname__}.{name}"
    added = [each for each in added if each.name not in parameters]
    method.__signature__ = signature(stock).replace(parameters=[*named, *added, *rest])
    method.stock_names = frozenset(names)
    setattr(cls, name, method)


RECORDS = ("kept_mask", "vision_scores")
# Output classes that were made, by the stock class that they extend.
_OUTPUTS: dict[type, type] = {}


class Recorded:
    """What is added to the output of a stock class.

    Attributes:
        kept_mask (`tuple[torch.Tensor]`, each `(batch, sequence)` bool, or `None`):
            For each cut, True where the token survives it: text True, padding False. `None` where nothing was cut.
        vision_scores (`tuple[torch.Tensor]`, each `(batch, sequence)` float32, or `None`):
            For each cut, the scores that ranked; NaN where a token was not scored. In training, the first cut's.
    """

    def __reduce__(self):
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return _restore_output, (type(self).__mro__[2], values)


def output_with_records(stock: type[ModelOutput]) -> type[ModelOutput]:
    """The output class `stock`, whichever it is, with the fields of [`Recorded`].

    `logits` and `last_hidden_state` have the caller's length, with zeros in the rows of dropped tokens. `hidden_states`
    and `attentions` hold what the layers held, so they get shorter after each cut.
    """
    if stock not in _OUTPUTS:
        annotations = dict.fromkeys(RECORDS, tuple[torch.Tensor, ...] | None)
        body = {
            "__module__": __name__,
            "__annotations__": annotations,
            **dict.fromkeys(RECORDS),
            "__doc__": stock.__doc__,
        }
        _OUTPUTS[stock] = dataclass(type(f"LearnPruner{stock.__name__}", (Recorded, stock), body))
    return _OUTPUTS[stock]


def _restore_output(stock: type[ModelOutput], values: dict) -> ModelOutput:
    return output_with_records(stock)(**values)


def fields_beside_predictions(cls: type) -> list[str]:
    """All fields of the output of `cls`, a class with a head, but loss and logits: what `Trainer.evaluate` must not
    gather. Empty where its forward names no output class."""
    annotated = signature(cls.forward).return_annotation
    kinds = get_args(annotated) or (annotated,)
    outputs = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, ModelOutput)]
    names = [each.name for kind in outputs for each in fields(kind)]
    return [name for name in dict.fromkeys((*names, *RECORDS)) if name not in ("loss", "logits")] if outputs else []


def eager_attention(attention: nn.Module) -> Callable:
    """The eager attention function of an attention module: that of the file which its class, or the one that it
    inherits from, stands in. The name holds for 5.20 to 5.24."""
    files = (sys.modules[kind.__module__] for kind in type(attention).__mro__)
    return next(file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward"))
