"""What benchmarks/speed.py measures: published architectures with random weights, and the inputs they are given."""

from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
)

from learnpruner.families import FAMILIES, model_class
from learnpruner.scores_learnpruner import LearnedPruningModule

# Ordinary tokens: no special one is below or above in any vocabulary here.
TEXT_TOKENS = (10, 100)


@dataclass(frozen=True)
class Preset:
    """An architecture, and the one image that each sample of a batch has.

    Attributes:
        config (`Callable[[], PreTrainedConfig]`): Makes the stock configuration.
        image (`tuple[int, int]`): Height and width in pixels, of a size that the model takes without padding.
    """

    config: Callable[[], PreTrainedConfig]
    image: tuple[int, int]


def clip_large() -> CLIPVisionConfig:
    """CLIP ViT-L/14 at 336 pixels (openai/clip-vit-large-patch14-336)."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )


def vicuna(**shape: int) -> LlamaConfig:
    """Vicuna 1.5, with the tokens that the llava-hf checkpoints add."""
    return LlamaConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5, **shape)


VICUNA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
VICUNA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
# A quarter of 7B's width and of its heads.
SMALL = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 24, "num_attention_heads": 16}


def llava(**shape: int) -> LlavaConfig:
    return LlavaConfig(vision_config=clip_large(), text_config=vicuna(**shape), image_token_index=32000)


def llava_next() -> LlavaNextConfig:
    return LlavaNextConfig(vision_config=clip_large(), text_config=vicuna(**VICUNA_7B), image_token_index=32000)


def qwen2_5_vl() -> Qwen2_5_VLConfig:
    """Qwen/Qwen2.5-VL-7B-Instruct."""
    return Qwen2_5_VLConfig(
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        text_config={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
    )


def cpu_small() -> LlavaConfig:
    """LLaVA-1.5's anatomy at 0.4 B: its image, its 576 tokens, a tower of half CLIP-L's width and depth."""
    tower = CLIPVisionConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        image_size=336,
        patch_size=14,
    )
    return LlavaConfig(vision_config=tower, text_config=vicuna(**SMALL), image_token_index=32000)


PRESETS = {
    "cpu-small": Preset(cpu_small, (336, 336)),
    "llava-1.5-7b": Preset(lambda: llava(**VICUNA_7B), (336, 336)),
    "llava-1.5-13b": Preset(lambda: llava(**VICUNA_13B), (336, 336)),
    # 2880 patches, as the paper counts them, and 48 rows of structure.
    "llava-next-7b": Preset(llava_next, (672, 672)),
    "qwen2.5-vl-7b-1k": Preset(qwen2_5_vl, (896, 896)),
    "qwen2.5-vl-7b-4k": Preset(qwen2_5_vl, (1792, 1792)),
    "qwen2.5-vl-7b-16k": Preset(qwen2_5_vl, (3584, 3584)),
}


def check_fits(model: nn.Module, device: torch.device) -> None:
    """Raises `ValueError` where a model's weights alone are more than the device has free."""
    needed = sum(weight.numel() * weight.itemsize for weight in model.parameters())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"The weights take {needed / 1e9:.1f} GB, and {device} has {free / 1e9:.1f} GB free: take a smaller "
            "preset, or a device with more memory."
        )


def stock_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """With random weights, on the device that torch makes tensors on by default."""
    return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


def build_pair(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple:
    """The stock model and the pruned one, `(PreTrainedModel, PreTrainedModel)`, over one set of random weights."""
    torch.manual_seed(seed)
    with torch.device(device):
        stock = stock_model(config, dtype)
    (config_class,) = (family for family in FAMILIES if family.base_model_type == config.model_type)
    with torch.device("meta"):
        # Trained or not, the learned module costs the same.
        pruned_config = config_class.from_base_config(config, pruner_trained=True)
        pruned = model_class(config_class)._from_config(pruned_config, dtype=dtype).eval()
    width = pruned.model.encoder_width(pruned.config)
    pruned.model.pruner = LearnedPruningModule(width, pruned.config.pruner_hidden_size).to(device)
    share_tensors(stock, pruned)
    for model in (stock, pruned):
        # Answers of a given length.
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return stock, pruned


def share_tensors(source: nn.Module, target: nn.Module) -> None:
    """Points the parameters and buffers of `target` at those that `source` has under the same names."""
    for name, module in source.named_modules():
        other = target.get_submodule(name)
        other._parameters.update(module._parameters)
        other._buffers.update(module._buffers)


def build_inputs(
    config: PreTrainedConfig, image: tuple[int, int], batch: int, text: int, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What a processor returns for `batch` prompts of `text` text tokens, half of them before the image.

    Raises:
        `ValueError`: where there is no text token, or the image is of a size that the model would pad.
    """
    if text < 1:
        raise ValueError(f"A prompt has at least one text token, got {text}.")
    generator = torch.Generator().manual_seed(0)
    pixels, layout, tokens = IMAGES[config.model_type](config, image)
    ids = torch.randint(*TEXT_TOKENS, (batch, text), generator=generator)
    placeholders = torch.full((batch, tokens), config.image_token_id)
    ids = torch.cat([ids[:, : text // 2], placeholders, ids[:, text // 2 :]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # Qwen's patches of all images stand in one dimension, the others' images behind one another.
    shape = (batch * pixels[0], *pixels[1:]) if "image_grid_thw" in layout else (batch, *pixels)
    inputs["pixel_values"] = torch.randn(shape, generator=generator).to(dtype)
    if "image_grid_thw" in layout:
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
    inputs |= {name: torch.tensor([row] * batch) for name, row in layout.items()}
    return {name: value.to(device) for name, value in inputs.items()}


def _llava_image(config: PreTrainedConfig, image: tuple[int, int]):
    side = config.vision_config.image_size
    _check_multiple(image, side, exactly=True)
    return (3, side, side), {}, (side // config.vision_config.patch_size) ** 2


def _llava_next_image(config: PreTrainedConfig, image: tuple[int, int]):
    side, patches = config.vision_config.image_size, config.vision_config.image_size // config.vision_config.patch_size
    _check_multiple(image, side)
    if list(image) not in config.image_grid_pinpoints:
        raise ValueError(f"{image} is none of the sizes of LLaVA-NeXT, {config.image_grid_pinpoints}.")
    rows, columns = image[0] // side, image[1] // side
    # Behind each row of patches stands a newline.
    tokens = patches**2 + rows * patches * (columns * patches + 1)
    return (1 + rows * columns, 3, side, side), {"image_sizes": list(image)}, tokens


def _qwen_image(config: PreTrainedConfig, image: tuple[int, int]):
    vision = config.vision_config
    _check_multiple(image, vision.patch_size * vision.spatial_merge_size)
    rows, columns = image[0] // vision.patch_size, image[1] // vision.patch_size
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return (
        (rows * columns, values),
        {"image_grid_thw": [1, rows, columns]},
        rows * columns // vision.spatial_merge_size**2,
    )


def _check_multiple(image: tuple[int, int], side: int, exactly: bool = False) -> None:
    if any(length % side or (exactly and length != side) for length in image):
        raise ValueError(
            f"An image of {image} pixels would be padded: take {'' if exactly else 'multiples of '}{side}."
        )


# What an image of so many pixels becomes: the shape of its pixel values, the arguments that lay it out, its tokens.
IMAGES = {
    "llava": _llava_image,
    "llava_next": _llava_next_image,
    "qwen2_vl": _qwen_image,
    "qwen2_5_vl": _qwen_image,
}
