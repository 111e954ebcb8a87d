# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""LearnPruner: Hugging Face vision-language models that answer from a fraction of their vision tokens."""

from importlib import import_module
from typing import TYPE_CHECKING

from .auto import LearnPrunerForConditionalGeneration
from .configuration_learnpruner import __version__
from .families import FAMILIES, model_module, model_name, register

# Type checkers and editors cannot follow `_MODULES`; a name that is imported as itself is a public one for them.
if TYPE_CHECKING:
    from .configuration_learnpruner import LearnPrunerLlavaConfig as LearnPrunerLlavaConfig
    from .configuration_learnpruner import LearnPrunerLlavaNextConfig as LearnPrunerLlavaNextConfig
    from .configuration_learnpruner import LearnPrunerQwen2_5_VLConfig as LearnPrunerQwen2_5_VLConfig
    from .configuration_learnpruner import LearnPrunerQwen2VLConfig as LearnPrunerQwen2VLConfig
    from .cuts_learnpruner import Cut as Cut
    from .cuts_learnpruner import LearnedScore as LearnedScore
    from .cuts_learnpruner import TextAttention as TextAttention
    from .cuts_learnpruner import learnpruner_schedule as learnpruner_schedule
    from .keys_learnpruner import PrunedCache as PrunedCache
    from .modeling_learnpruner_llava import (
        LearnPrunerLlavaForConditionalGeneration as LearnPrunerLlavaForConditionalGeneration,
    )
    from .modeling_learnpruner_llava_next import (
        LearnPrunerLlavaNextForConditionalGeneration as LearnPrunerLlavaNextForConditionalGeneration,
    )
    from .modeling_learnpruner_qwen2_5_vl import (
        LearnPrunerQwen2_5_VLForConditionalGeneration as LearnPrunerQwen2_5_VLForConditionalGeneration,
    )
    from .modeling_learnpruner_qwen2_vl import (
        LearnPrunerQwen2VLForConditionalGeneration as LearnPrunerQwen2VLForConditionalGeneration,
    )

# Where names are loaded from when they are asked for: all but the configurations take seconds.
_MODULES = {
    "Cut": "cuts_learnpruner",
    "LearnedScore": "cuts_learnpruner",
    "PrunedCache": "keys_learnpruner",
    "TextAttention": "cuts_learnpruner",
    "learnpruner_schedule": "cuts_learnpruner",
    **{config_class.__name__: "configuration_learnpruner" for config_class in FAMILIES},
    **{model_name(config_class): model_module(config_class) for config_class in FAMILIES},
}
__all__ = ["LearnPrunerForConditionalGeneration", "__version__", *_MODULES]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


register()
