# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""LearnPruner: Hugging Face vision-language models that answer from a fraction of their vision tokens."""

from importlib import import_module
from typing import TYPE_CHECKING

from .auto import LearnPrunerForConditionalGeneration
from .configuration_learnpruner import (
    LearnPrunerLlavaConfig,
    LearnPrunerLlavaNextConfig,
    LearnPrunerQwen2_5_VLConfig,
    LearnPrunerQwen2VLConfig,
    __version__,
)
from .families import FAMILIES, model_module, model_name, register

if TYPE_CHECKING:
    from .cuts_learnpruner import Cut, LearnedScore, TextAttention, learnpruner_schedule
    from .keys_learnpruner import PrunedCache
    from .modeling_learnpruner_llava import LearnPrunerLlavaForConditionalGeneration
    from .modeling_learnpruner_llava_next import LearnPrunerLlavaNextForConditionalGeneration
    from .modeling_learnpruner_qwen2_5_vl import LearnPrunerQwen2_5_VLForConditionalGeneration
    from .modeling_learnpruner_qwen2_vl import LearnPrunerQwen2VLForConditionalGeneration

# These take seconds to load: each is loaded when it is asked for.
_MODULES = {
    "Cut": "cuts_learnpruner",
    "LearnedScore": "cuts_learnpruner",
    "PrunedCache": "keys_learnpruner",
    "TextAttention": "cuts_learnpruner",
    "learnpruner_schedule": "cuts_learnpruner",
    **{model_name(config_class): model_module(config_class) for config_class in FAMILIES},
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


register()

__all__ = [
    "Cut",
    "LearnPrunerForConditionalGeneration",
    "LearnPrunerLlavaConfig",
    "LearnPrunerLlavaForConditionalGeneration",
    "LearnPrunerLlavaNextConfig",
    "LearnPrunerLlavaNextForConditionalGeneration",
    "LearnPrunerQwen2VLConfig",
    "LearnPrunerQwen2VLForConditionalGeneration",
    "LearnPrunerQwen2_5_VLConfig",
    "LearnPrunerQwen2_5_VLForConditionalGeneration",
    "LearnedScore",
    "PrunedCache",
    "TextAttention",
    "__version__",
    "learnpruner_schedule",
]
