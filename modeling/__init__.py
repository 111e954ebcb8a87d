# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""LearnPruner: Hugging Face vision-language models that answer from a fraction of their vision tokens."""

from functools import wraps

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from .auto import FAMILIES, LearnPrunerForConditionalGeneration
from .configuration_learnpruner import (
    LearnPrunerLlavaConfig,
    LearnPrunerLlavaNextConfig,
    LearnPrunerQwen2_5_VLConfig,
    LearnPrunerQwen2VLConfig,
    __version__,
)
from .cuts_learnpruner import Cut, LearnedScore, TextAttention, learnpruner_schedule
from .hub_learnpruner import HubMixin
from .keys_learnpruner import PrunedCache
from .modeling_learnpruner_llava import LearnPrunerLlavaForConditionalGeneration
from .modeling_learnpruner_llava_next import LearnPrunerLlavaNextForConditionalGeneration
from .modeling_learnpruner_qwen2_5_vl import LearnPrunerQwen2_5_VLForConditionalGeneration
from .modeling_learnpruner_qwen2_vl import LearnPrunerQwen2VLForConditionalGeneration


def push_to_hub(self, repo_id: str, **options):
    """Pushes the model with its processor and card, as [`learnpruner.hub_cards.push_pruner`] says, whose options these
    are. Returns the commit ([`huggingface_hub.CommitInfo`])."""
    from .hub_cards import push_pruner  # not for those who only run a model

    return push_pruner(self, repo_id, **options).commit


def print_trainable_parameters(self) -> None:
    """Prints how many parameters are trained, of how many."""
    every = sum(parameter.numel() for parameter in self.parameters())
    trained = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
    print(f"trainable params: {trained:,} || all params: {every:,} || trainable%: {100 * trained / every:.4f}")


@wraps(HubMixin.save_pretrained)
def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, **kwargs):
    if push_to_hub:
        raise ValueError("Use model.push_to_hub(repo_id): save_pretrained would push no card, and check nothing.")
    return HubMixin.save_pretrained(self, save_directory, is_main_process, state_dict, **kwargs)


for family in FAMILIES:
    # The classes ship with checkpoints, and push as transformers does where this package is not installed.
    family.push_to_hub, family.save_pretrained = push_to_hub, save_pretrained
    family.print_trainable_parameters = print_trainable_parameters
    AutoConfig.register(family.config_class.model_type, family.config_class, exist_ok=True)
    AutoModel.register(family.config_class, family, exist_ok=True)
    AutoModelForImageTextToText.register(family.config_class, family, exist_ok=True)
del family, print_trainable_parameters, push_to_hub, save_pretrained

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
