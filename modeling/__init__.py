# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""LearnPruner: Hugging Face vision-language models that answer from a fraction of their vision tokens."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from .auto import FAMILIES, LearnPrunerForConditionalGeneration
from .cache_learnpruner import PrunedCache
from .configuration_learnpruner import (
    LearnPrunerLlavaConfig,
    LearnPrunerLlavaNextConfig,
    LearnPrunerQwen2_5_VLConfig,
    LearnPrunerQwen2VLConfig,
    __version__,
)
from .cuts_learnpruner import Cut, LearnedScore, TextAttention, learnpruner_schedule
from .modeling_learnpruner_llava import LearnPrunerLlavaForConditionalGeneration
from .modeling_learnpruner_llava_next import LearnPrunerLlavaNextForConditionalGeneration
from .modeling_learnpruner_qwen2_5_vl import LearnPrunerQwen2_5_VLForConditionalGeneration
from .modeling_learnpruner_qwen2_vl import LearnPrunerQwen2VLForConditionalGeneration

for family in FAMILIES:
    AutoConfig.register(family.config_class.model_type, family.config_class, exist_ok=True)
    AutoModel.register(family.config_class, family, exist_ok=True)
    AutoModelForImageTextToText.register(family.config_class, family, exist_ok=True)
del family

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
