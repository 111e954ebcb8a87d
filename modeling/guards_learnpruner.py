# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What pruning cannot do: each case is refused with a message that says what to do, before any work."""

from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import find_packed_sequence_indices

from .compat_learnpruner import CACHE
from .keys_learnpruner import PrunedCacheLayer

OR_NO_PRUNING = "Or pass pruner_ratio=1.0, which runs the stock model."


def refuse_decoder_inputs(model: PreTrainedModel, arguments: dict, use_cache: bool) -> None:
    """Raises `ValueError` where the headless `model`, making a cache if `use_cache`, could not cut or gate."""
    attention_mask, position_ids, cache = map(arguments.get, ("attention_mask", "position_ids", CACHE))
    text_config = model.config.text_config
    if any(DynamicCache(config=text_config).is_sliding):
        raise ValueError(
            "Pruning does not support sliding-window attention layers: if your prompts fit the window, load the model "
            "with `config.text_config.sliding_window = None` and with 'full_attention' for all of its `layer_types`, "
            f"where it has them. {OR_NO_PRUNING}"
        )
    if text_config._attn_implementation.startswith("paged"):
        raise ValueError(f"Pruning does not support continuous batching (paged): use generate. {OR_NO_PRUNING}")
    refuse_prepared_mask(attention_mask)
    packed = "cu_seq_lens_q" in arguments
    if attention_mask is None and position_ids is not None and cache is None and not use_cache:
        # Only then does the stock model look for packed sequences. Before M-RoPE's three rows, a fourth may be text's.
        text = position_ids[0] if position_ids.dim() == 3 and len(position_ids) == 4 else position_ids
        packed |= text.dim() == 2 and find_packed_sequence_indices(text) is not None
    if packed:
        raise ValueError(f"Pruning does not support packed sequences: pad the samples of a batch. {OR_NO_PRUNING}")
    if cache is not None:
        plain = isinstance(cache, DynamicCache) and not cache.offloading
        if not plain or not all(type(layer) in (DynamicLayer, PrunedCacheLayer) for layer in cache.layers):
            raise ValueError(
                "Pruning needs a DynamicCache of full-attention layers, without offloading or quantisation, got "
                f"{cache}. Pass {CACHE}=DynamicCache(), or none. {OR_NO_PRUNING}"
            )


def refuse_prepared_mask(attention_mask: Any) -> None:
    """Raises `ValueError` unless the mask is 2D, or `None`."""
    if attention_mask is not None and (not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2):
        raise ValueError(
            "Pruning needs a 2D attention_mask (batch, sequence), or None: a prepared mask names keys that a cut "
            f"removes. {OR_NO_PRUNING}"
        )


def refuse_gating(text_config: PreTrainedConfig) -> None:
    """Raises `ValueError` where the attention backend cannot weigh keys, as training does."""
    if text_config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"Training weighs vision tokens in the attention, which {text_config._attn_implementation!r} cannot: load "
            "the model with attn_implementation='sdpa'. Evaluation and generation run on any backend."
        )


def refuse_tensor_parallelism(model: PreTrainedModel) -> None:
    """Raises `ValueError` where `model`, the one that was loaded, is split by tensors over devices."""
    if (model.tp_size or 1) > 1:
        raise ValueError(f"Pruning does not support tensor parallelism: load with device_map instead. {OR_NO_PRUNING}")


def refuse_generation(generation_config: GenerationConfig, attention_mask: torch.Tensor | None) -> None:
    """Raises `ValueError` where `generate` could not keep its promise of equal text."""
    if generation_config.cache_implementation not in (None, "dynamic"):
        raise ValueError(
            f"Pruning does not support cache_implementation={generation_config.cache_implementation!r}: its layers "
            f"cannot hold different lengths. Leave it out, or pass 'dynamic'. {OR_NO_PRUNING}"
        )
    if generation_config.prefill_chunk_size is not None:
        raise ValueError(
            "Pruning does not support chunked prefill, since image and question may fall into different chunks: "
            f"leave out prefill_chunk_size. {OR_NO_PRUNING}"
        )
    if attention_mask is not None and not attention_mask[:, -1].all():
        raise ValueError(
            "Right padding in generate: the prompt must end where the answer begins. Set "
            f"processor.tokenizer.padding_side = 'left'. {OR_NO_PRUNING}"
        )


def refuse_lost_cache(arguments: dict) -> None:
    """Raises `ValueError` where a mask covers more than the rows of a call, and no cache came that holds the others."""
    mask, prompt = arguments.get("attention_mask"), arguments.get("input_ids")
    prompt = arguments.get("inputs_embeds") if prompt is None else prompt
    plain = isinstance(mask, torch.Tensor) and mask.dim() == 2 and prompt is not None
    if plain and arguments.get(CACHE) is None and mask.shape[1] > prompt.shape[1]:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns for {prompt.shape[1]} tokens, and no cache came that holds "
            f"the others: pass the cache of the previous call as {CACHE}."
        )
