# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The model of a training, as its settings say: precision, attention, quantization, adapters."""

from importlib.util import find_spec

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, PreTrainedModel, TrainingArguments

from learnpruner.auto import LearnPrunerForConditionalGeneration, pruned_class
from learnpruner_commands.train_settings import PrunerModelArguments


def load_model(settings: PrunerModelArguments, training: TrainingArguments) -> PreTrainedModel | PeftModel:
    """The model to train. The weights of a fresh pruner come from `training.seed`.

    Raises:
        `ImportError`: where bits are asked for without bitsandbytes.
        `OSError`, `RuntimeError`, `ValueError`: where there is no such model, or it cannot be loaded so.
    """
    precision = settings.dtype or ("bfloat16" if training.bf16 else None)
    options = {
        "pruner_ratio": settings.pruner_ratio,
        "pruner_diversity": settings.pruner_diversity,
        "attn_implementation": settings.attn_implementation,
        "dtype": precision,
    }
    options = {name: value for name, value in options.items() if value is not None}
    if settings.load_in_8bit or settings.load_in_4bit:
        options["quantization_config"] = quantization(settings, precision)
    torch.manual_seed(training.seed)
    model = LearnPrunerForConditionalGeneration.from_pretrained(settings.model_name_or_path, **options)
    if settings.lora_rank is None:
        return model
    lora = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_target_modules,
        modules_to_save=["pruner"],
    )
    return get_peft_model(model, lora)


def quantization(settings: PrunerModelArguments, precision: str | None) -> BitsAndBytesConfig:
    """Bits for the language model. The pruner ranks tokens by small differences: it stays as it is, and so do the
    encoder that it reads, the projector and the head."""
    if find_spec("bitsandbytes") is None:
        raise ImportError("load_in_8bit and load_in_4bit need bitsandbytes: pip install bitsandbytes")
    kept = [f"model.{name}" for name in parts_beside_language(settings.model_name_or_path)]
    four = {}
    if settings.load_in_4bit:
        four = {"bnb_4bit_quant_type": "nf4"}
        if precision not in (None, "auto"):
            four["bnb_4bit_compute_dtype"] = precision
    return BitsAndBytesConfig(
        load_in_8bit=settings.load_in_8bit,
        load_in_4bit=settings.load_in_4bit,
        llm_int8_skip_modules=[*kept, "lm_head"],
        **four,
    )


def parts_beside_language(model: str) -> list[str]:
    """What a model has beside its language model: pruner, encoder, projector. No weights are read."""
    cls = pruned_class(model)
    with torch.device("meta"):
        empty = cls(cls.config_class.from_pretrained(model))
    return [name for name, _ in empty.model.named_children() if name != "language_model"]
