# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What pruning cannot do: each case is refused with a message that says what to do, before any work."""

from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import is_torchdynamo_exporting

from .compat_learnpruner import CACHE, DynamicLayer, find_packed_sequence_indices
from .cuts_learnpruner import Cut, LearnedScore
from .keys_learnpruner import EDITED_CACHE, PrunedCache, PrunedCacheLayer

OR_NO_PRUNING = "Or pass pruner_ratio=1.0, which runs the stock model."


def unsupported(what: str, instead: str) -> ValueError:
    return ValueError(f"Pruning does not support {what}: {instead}. {OR_NO_PRUNING}")


def refuse_decoder_inputs(model: PreTrainedModel, arguments: dict, use_cache: bool) -> None:
    """Raises `ValueError` where the headless `model`, making a cache if `use_cache`, could not cut or gate."""
    attention_mask, position_ids, cache = map(arguments.get, ("attention_mask", "position_ids", CACHE))
    if is_torchdynamo_exporting():
        refuse_export()
    text_config = model.config.text_config
    if any(DynamicCache(config=text_config).is_sliding):
        how = "`config.text_config.sliding_window = None` and with 'full_attention' for all of its `layer_types`, where"
        how = f"if your prompts fit the window, load the model with {how} it has them"
        raise unsupported("sliding-window attention layers", how)
    if text_config._attn_implementation.startswith("paged"):
        raise unsupported("continuous batching (paged)", "use generate")
    refuse_prepared_mask(attention_mask)
    packed = "cu_seq_lens_q" in arguments
    if attention_mask is None and position_ids is not None and cache is None and not use_cache:
        # Only then does the stock model look for packed sequences. Before M-RoPE's three rows, a fourth may be text's.
        text = position_ids[0] if position_ids.dim() == 3 and len(position_ids) == 4 else position_ids
        packed |= text.dim() == 2 and find_packed_sequence_indices(text) is not None
    if packed:
        raise unsupported("packed sequences", "pad the samples of a batch")
    if cache is not None:
        plain = isinstance(cache, DynamicCache) and not cache.offloading
        if not plain or not all(type(layer) in (DynamicLayer, PrunedCacheLayer) for layer in cache.layers):
            why = "any cache but a DynamicCache of full-attention layers, without offloading or quantisation"
            raise unsupported(why, f"got {cache}; pass {CACHE}=DynamicCache(), or none")


@torch.compiler.assume_constant_result  # a strict export runs this as it is; an error that it traced would be its own
def refuse_export() -> None:
    """Raises `ValueError`, for counts of rows follow from the prompt."""
    raise unsupported("torch.export", "use torch.compile")


def refuse_prepared_mask(attention_mask: Any) -> None:
    """Raises `ValueError` unless the mask is 2D, or `None`."""
    if attention_mask is not None and (not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2):
        why = "it names keys that a cut removes; pass a 2D attention_mask (batch, sequence), or None"
        raise unsupported("a prepared attention_mask", why)


def refuse_training(schedule: tuple[Cut, ...], text_config: PreTrainedConfig, cache: Cache | None) -> None:
    """Raises `ValueError` where no cut is learned, or attention cannot weigh keys, as training does."""
    if cache is not None:
        raise ValueError(
            "The pruner is trained on whole prompts, and a step on their cache would not be gated: train without a "
            "cache and without prefix tuning, or freeze the pruner (model.model.pruner.requires_grad_(False))."
        )
    if schedule[0].layer or not isinstance(schedule[0].score, LearnedScore):
        raise ValueError(
            "The pruner is to be trained, and this schedule has no learned cut: leave it out, or call model.eval(), or "
            "freeze the pruner (model.model.pruner.requires_grad_(False))."
        )
    if text_config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"Training weighs vision tokens in the attention, which {text_config._attn_implementation!r} cannot: load "
            "the model with attn_implementation='sdpa'. Evaluation and generation run on any backend."
        )


def refuse_tensor_parallelism(model: PreTrainedModel) -> None:
    """Raises `ValueError` where `model`, the one that was loaded, is split by tensors over devices."""
    if (model.tp_size or 1) > 1:
        raise unsupported("tensor parallelism", "load with device_map instead")


def refuse_generation(generation_config: GenerationConfig, attention_mask: torch.Tensor | None) -> None:
    """Raises `ValueError` where `generate` could not keep its promise of equal text."""
    if generation_config.cache_implementation not in (None, "dynamic"):
        what = f"cache_implementation={generation_config.cache_implementation!r}"
        raise unsupported(what, "its layers cannot hold different lengths; leave it out, or pass 'dynamic'")
    if generation_config.prefill_chunk_size is not None:
        why = "image and question may fall into different chunks; leave out prefill_chunk_size"
        raise unsupported("chunked prefill", why)
    if attention_mask is not None and not attention_mask[:, -1].all():
        why = "the prompt must end where the answer begins; set processor.tokenizer.padding_side = 'left'"
        raise unsupported("right padding in generate", why)


def refuse_lost_cache(arguments: dict) -> None:
    """Raises `ValueError` where rows of earlier calls are gone: no cache came, or a copy of what a pruned one held."""
    mask, cache, ids = map(arguments.get, ("attention_mask", CACHE, "input_ids"))
    prompt = arguments.get("inputs_embeds") if ids is None else ids
    plain = isinstance(mask, torch.Tensor) and mask.dim() == 2 and prompt is not None
    if plain and cache is None and mask.shape[1] > prompt.shape[1]:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns for {prompt.shape[1]} tokens, and no cache came that holds "
            f"the others: pass the cache of the previous call as {CACHE}."
        )
    if isinstance(cache, DynamicCache) and not isinstance(cache, PrunedCache):
        held = {layer.keys.shape[-2] for layer in cache.layers if type(layer) is DynamicLayer and layer.is_initialized}
        if len(held) > 1 or any(isinstance(layer, PrunedCacheLayer) for layer in cache.layers):
            raise ValueError(EDITED_CACHE)
