# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Tiny random models of each family, and prompts with images for them, made without a download or a processor.

A new family needs one builder, and its line in `BUILDERS`.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

RATIO = 0.4
PAD, BOS, IMAGE, VIDEO, VISION_START, VISION_END, VOCAB = 0, 1, 120, 121, 122, 123, 128
SIDE, PATCH = 32, 8
# A random model may answer with one of these; as part of a prompt, stock models refuse them.
PLACEHOLDERS = [IMAGE, VIDEO, VISION_START, VISION_END]


class CheckError(Exception):
    """What a check found; its message says so."""


@dataclass
class TinyFamily:
    """What a family's builder returns.

    Attributes:
        config (`dict`): Fields of the stock configuration.
        images (`tuple[tuple[int, dict[str, torch.Tensor]], ...]`):
            Of two images, the number of their placeholders and what the stock forward takes them in. The tensors of
            both, one behind the other along the first axis, are those of a batch.
    """

    config: dict
    images: tuple[tuple[int, dict[str, torch.Tensor]], ...]


def _text_config(model_type: str, **fields) -> dict:
    return {
        "model_type": model_type,
        "vocab_size": VOCAB,
        # Heads of 16: flex attention takes no smaller ones on a GPU.
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        # Wide enough that attention is far from uniform and greedy tokens differ.
        "initializer_range": 0.2,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": None,
        **fields,
    }


def _clip_config() -> dict:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        "initializer_range": 0.3,
    }


def _llava() -> TinyFamily:
    config = {"text_config": _text_config("llama"), "vision_config": _clip_config(), "image_token_index": IMAGE}
    patches = (SIDE // PATCH) ** 2
    images = tuple((patches, {"pixel_values": torch.randn(1, 3, SIDE, SIDE)}) for _ in range(2))
    return TinyFamily({**config, "image_seq_length": patches}, images)


def _llava_next() -> TinyFamily:
    config = {
        **_llava().config,
        "image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
    }
    side = SIDE // PATCH
    # The whole image and two crops of it; behind each line of patches stands a newline.
    wide, tall = side**2 + side * (2 * side + 1), side**2 + 2 * side * (side + 1)
    images = tuple(
        (tokens, {"pixel_values": torch.randn(1, 3, 3, SIDE, SIDE), "image_sizes": torch.tensor([size])})
        for tokens, size in ((wide, (30, 60)), (tall, (60, 30)))
    )
    return TinyFamily(config, images)


def _qwen(vision_config: dict) -> TinyFamily:
    """A token is what is made of 2 x 2 patches, each half as wide as a token."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    shared = {"depth": 3, "num_heads": 3, "patch_size": PATCH // 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
    config = {
        "text_config": _text_config("qwen2_vl_text", rope_parameters=rope, use_sliding_window=False),
        "vision_config": {**shared, "initializer_range": 0.3, **vision_config},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    images = []
    for rows, columns in ((8, 8), (6, 12)):
        pixels = torch.randn(rows * columns, 3 * 2 * (PATCH // 2) ** 2)
        grid = torch.tensor([[1, rows, columns]])
        images.append((rows * columns // 4, {"pixel_values": pixels, "image_grid_thw": grid}))
    return TinyFamily(config, tuple(images))


def _qwen2_vl() -> TinyFamily:
    return _qwen({"embed_dim": 24, "hidden_size": 64, "mlp_ratio": 2})


def _qwen2_5_vl() -> TinyFamily:
    # Windows of 2 x 2 tokens, and one layer that sees the whole image.
    vision = {"hidden_size": 24, "out_hidden_size": 64, "intermediate_size": 48}
    tiny = _qwen({**vision, "window_size": 2 * PATCH, "fullatt_block_indexes": [1]})
    tiny.config["text_config"]["model_type"] = "qwen2_5_vl_text"
    return tiny


# By the stock family's `model_type`; a new family needs a line here.
BUILDERS: dict[str, Callable[[], TinyFamily]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
}


@dataclass
class TinyCase:
    """A stock and a pruned model with the same weights, and what they are asked.

    Attributes:
        stock, pruned (`PreTrainedModel`).
        exact (`PreTrainedModel`): The stock model's weights in float32: `stock` itself where that is float32.
        batch (`dict[str, torch.Tensor]`): Inputs of two samples, the shorter one padded on the left.
        rows (`list[dict[str, torch.Tensor]]`): Those of each sample alone, without padding.
    """

    stock: PreTrainedModel
    pruned: PreTrainedModel
    exact: PreTrainedModel
    batch: dict[str, torch.Tensor]
    rows: list[dict[str, torch.Tensor]]


def build_pair(family: type, fields: dict) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A stock model of random weights, and a pruned one that has the same and a random pruner.

    Args:
        family (`type`): The pruned class.
        fields (`dict`): Of the stock configuration.

    Raises:
        `CheckError`: where the two do not have the same weights.
    """
    config = AutoConfig.for_model(family.config_class.base_model_type, **fields)
    stock = AutoModelForImageTextToText.from_config(config).eval()
    pruned = family(family.config_class.from_base_config(config, pruner_ratio=RATIO, pruner_trained=True)).eval()
    if not isinstance(pruned, type(stock)):
        raise CheckError(f"{family.__name__} is not a {type(stock).__name__}.")
    report = pruned.load_state_dict(stock.state_dict(), strict=False)
    missing = [name for name in report.missing_keys if ".pruner." not in name]
    if missing or report.unexpected_keys:
        raise CheckError(f"Weights do not fit the stock model's: missing {missing}, too many {report.unexpected_keys}.")
    for parameter in pruned.model.pruner.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    for model in (stock, pruned):
        model.generation_config.pad_token_id = PAD
    return stock, pruned


def build_case(family: type, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> TinyCase:
    """Models and prompts of a pruned class; from a seed, by torch's random numbers on the CPU, whatever the device.

    Args:
        family (`type`): The pruned class.
        device (`torch.device` or `str`): Where the models and the prompts are.
        dtype (`torch.dtype`): Of the weights and pixels; the pruner's weights stay in float32, as they are loaded.

    Raises:
        `CheckError`: where the family has no tiny model, or its weights do not fit.
    """
    name = family.config_class.base_model_type
    if name not in BUILDERS:
        raise CheckError(f"There is no tiny model for the family {name!r}.")
    # The same models whichever families are asked for.
    torch.default_generator.manual_seed(0)
    tiny = BUILDERS[name]()
    stock, pruned = build_pair(family, tiny.config)
    rows = []
    for (tokens, image), (before, behind) in zip(tiny.images, ((3, 6), (1, 11))):
        words = torch.randint(5, 100, (1, before + behind))
        parts = [torch.tensor([[BOS]]), words[:, :before], torch.full((1, tokens), IMAGE), words[:, before:]]
        rows.append({**_text_inputs(stock, torch.cat(parts, dim=1)), **image})
    longest = max(row["input_ids"].shape[1] for row in rows)
    batch = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        if key in ("input_ids", "attention_mask", "mm_token_type_ids"):
            values = [F.pad(value, (longest - value.shape[1], 0), value=0) for value in values]
        batch[key] = torch.cat(values)
    for model in (stock, pruned):
        model.to(device)
        # Not the buffers: `from_pretrained` keeps rotary frequencies in float32, too.
        for name, parameter in model.named_parameters():
            if ".pruner." not in name:
                parameter.data = parameter.data.to(dtype)
    batch, *rows = (_sent(inputs, device, dtype) for inputs in (batch, *rows))
    exact = stock if dtype == torch.float32 else copy.deepcopy(stock).float()
    return TinyCase(stock, pruned, exact, batch, rows)


def _sent(inputs: dict[str, torch.Tensor], device: torch.device | str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in inputs.items()
    }


def _text_inputs(stock: PreTrainedModel, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if "mm_token_type_ids" in inspect.signature(stock.forward).parameters:
        inputs["mm_token_type_ids"] = (input_ids == IMAGE).int()
    return inputs
