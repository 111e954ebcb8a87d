# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""One question about one image, pruned and unpruned in the same process: answers, tokens, time, cache, a picture."""

import importlib.util
import statistics
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from transformers import AutoProcessor, Cache, PreTrainedModel, ProcessorMixin

from .accounting import mean_tokens
from .auto import LearnPrunerForConditionalGeneration, pruned_class
from .compat_learnpruner import CACHE
from .families import FAMILIES, model_class
from .hub_learnpruner import find_base
from .keys_learnpruner import PrunedCache
from .model_learnpruner import PrunedModelMixin

RUNS = 3
# Modes of pictures that may be transparent.
TRANSPARENT = ("RGBA", "LA", "PA")
# How much a dropped patch is darkened.
SHADE = 0.82


@dataclass
class Comparison:
    """What one question cost and gave.

    Attributes:
        question, answer, stock_answer (`str`).
        tokens (`tuple[int, ...]`): Vision tokens of the prompt, then after each cut.
        mean_tokens (`float`): Vision tokens on average over the decoder's layers.
        seconds, stock_seconds (`float`): Median wall clock of `generate`, image encoding included.
        cache_bytes, stock_cache_bytes (`int`): Keys and values held at the end.
        kept (`tuple[torch.Tensor, ...]`, each `(tokens,)` bool): Survivors of each cut, in the image's token order.
        pixels (`torch.Tensor` of shape `(height, width, 3)`, in [0, 1]): What the vision tower saw, the first crop of
            it for LLaVA-NeXT. The patches lie on this, not on the file, which the processor may have cropped.
    """

    question: str
    answer: str
    stock_answer: str
    tokens: tuple[int, ...]
    mean_tokens: float
    seconds: float
    stock_seconds: float
    cache_bytes: int
    stock_cache_bytes: int
    kept: tuple[torch.Tensor, ...]
    pixels: torch.Tensor

    def __str__(self) -> str:
        cuts = " -> ".join(map(str, self.tokens))
        return "\n".join(
            [
                f"question         {self.question}",
                f"answer           {self.answer!r} (unpruned: {self.stock_answer!r})",
                f"vision tokens    {cuts}",
                f"time             {self.seconds * 1e3:.1f} ms (unpruned: {self.stock_seconds * 1e3:.1f} ms)",
                f"KV cache         {self.cache_bytes:,} bytes (unpruned: {self.stock_cache_bytes:,} bytes)",
            ]
        )


def cache_bytes(cache: Cache) -> int:
    """Bytes of all keys and values that a cache holds."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def load_image(path: Path) -> Image.Image:
    """Reads an image whole, so that a damaged one is found here, as [`as_rgb`] makes it.

    Raises:
        `ValueError`: where there is none, or Pillow cannot read it.
    """
    if not path.is_file():
        raise ValueError(f"no such image: {path}")
    try:
        return as_rgb(Image.open(path))
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        # What Pillow's readers raise, PNG's the second, the last at pictures too large to be meant.
        raise ValueError(f"{path} is not an image that Pillow can read, or is damaged ({error})") from error


def as_rgb(picture: Image.Image) -> Image.Image:
    """A picture in RGB: upright, as its EXIF data say that the camera was held, and what is transparent on white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in TRANSPARENT or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def model_for(processor: ProcessorMixin) -> type[PrunedModelMixin]:
    """The class, of those without a head, whose images are laid out as the processor lays them out: of several the
    first in `FAMILIES`."""
    layouts = {*processor.image_processor.model_input_names}
    models = [model_class(config_class).model_class for config_class in FAMILIES]
    return next(
        (model for model in models if model.image_layout in layouts),
        next(model for model in models if model.image_layout is None),
    )


def token_side(processor: ProcessorMixin) -> int:
    """Pixels of one side of what a vision token stands for."""
    return model_for(processor).token_side(processor)


def shown_pixels(processor: ProcessorMixin, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the vision tower sees of the first image: `(height, width, 3)` in [0, 1].

    Args:
        inputs: What the processor, or its image processor, returned: of its crops the first, which for LLaVA-NeXT is
            the whole image.
    """
    image = processor.image_processor
    first = model_for(processor).first_image(inputs, image).float().cpu()
    mean, std = torch.tensor(image.image_mean), torch.tensor(image.image_std)
    return (first * std + mean).clamp(0, 1)


def build_prompt(processor: ProcessorMixin, question: str) -> str:
    if processor.chat_template is None:
        return f"{processor.image_token} {question}"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def compare(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image.Image,
    question: str,
    ratio: float | None = None,
    max_new_tokens: int = 32,
) -> Comparison:
    """Asks greedily, at `ratio` and at 1.0, in turns after one warm-up each, and takes the median time.

    Args:
        model: A pruned model.
        ratio (`float`, *optional*): Defaults to the model's.
    """
    inputs = processor(images=image, text=build_prompt(processor, question), return_tensors="pt").to(model.device)
    prompt_length = inputs["input_ids"].shape[1]
    results, seconds = {}, {"pruned": [], "stock": []}
    for _ in range(1 + RUNS):
        for name, value in (("pruned", ratio), ("stock", 1.0)):
            start = time.perf_counter()
            results[name] = model.generate(
                **inputs,
                pruner_ratio=value,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                return_dict_in_generate=True,
            )
            # Reading the result waits for the device.
            answer = results[name].sequences[0, prompt_length:].tolist()
            seconds[name].append(time.perf_counter() - start)
            results[name, "answer"] = processor.decode(answer, skip_special_tokens=True).strip()
    vision = inputs["input_ids"][0] == model.config.image_token_id
    cache = results["pruned"][CACHE]
    # Where nothing was cut the cache is the stock model's, which keeps no record.
    kept = cache.kept_mask if isinstance(cache, PrunedCache) else ()
    kept = tuple(mask[0, vision].cpu() for mask in kept)
    tokens = (int(vision.sum()), *(int(mask.sum()) for mask in kept))
    layers = (0, model.config.pruner_layer)[: len(kept)]
    return Comparison(
        question=question,
        answer=results["pruned", "answer"],
        stock_answer=results["stock", "answer"],
        tokens=tokens,
        mean_tokens=mean_tokens(tokens[1:], layers, tokens[0], model.config.text_config.num_hidden_layers),
        seconds=statistics.median(seconds["pruned"][1:]),
        stock_seconds=statistics.median(seconds["stock"][1:]),
        cache_bytes=cache_bytes(cache),
        stock_cache_bytes=cache_bytes(results["stock"][CACHE]),
        kept=kept,
        pixels=shown_pixels(processor, inputs),
    )


def patch_grids(comparison: Comparison, patch_size: int) -> tuple[torch.Tensor, ...]:
    """For each cut, which patches of `comparison.pixels` survive it: `(rows, columns)` bool."""
    rows, columns = (size // patch_size for size in comparison.pixels.shape[:2])
    patches = rows * columns
    # Under the "full" strategy a [CLS] token stands before the patches.
    start = 1 if comparison.tokens[0] == patches + 1 else 0
    return tuple(kept[start : start + patches].view(rows, columns) for kept in comparison.kept)


def dim_dropped(comparison: Comparison, patch_size: int) -> tuple[torch.Tensor, ...]:
    """For each cut, `comparison.pixels` with the patches darkened that did not survive it: `(height, width, 3)`."""
    height, width, _ = comparison.pixels.shape
    pictures = []
    for grid in patch_grids(comparison, patch_size):
        light = torch.where(grid, 1.0, 1.0 - SHADE).repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1)
        # Pixels beyond the last whole patch, which no token stands for.
        light = torch.nn.functional.pad(light, (0, width - light.shape[1], 0, height - light.shape[0]), value=1.0)
        pictures.append(comparison.pixels * light[..., None])
    return tuple(pictures)


def save_picture(comparison: Comparison, patch_size: int, path: Path) -> None:
    """Draws the image and, for each cut, the image with the dropped patches dimmed.

    LLaVA-NeXT's further crops are not drawn: the first crop is the whole image.
    """
    from matplotlib import pyplot

    panels = [comparison.pixels, *dim_dropped(comparison, patch_size)]
    titles = [f"{comparison.tokens[0]} vision tokens"]
    titles += [f"after cut {number}: {count}" for number, count in enumerate(comparison.tokens[1:], 1)]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 5.2), squeeze=False)
    for axis, panel, title in zip(axes[0], panels, titles):
        axis.imshow(panel.numpy(), interpolation="nearest")
        axis.set_axis_off()
        axis.set_title(title)
    lines = (comparison.question, f"pruned: {comparison.answer!r}   unpruned: {comparison.stock_answer!r}")
    caption = "\n".join(textwrap.fill(line, width=50 * len(panels)) for line in lines)
    # A question may hold dollars, which are no formula.
    figure.suptitle(caption, y=0.1, fontsize=11, parse_math=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def check_picture(path: Path) -> None:
    """Raises `ValueError` or `ImportError` where no picture could be written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("a picture needs matplotlib: pip install 'learnpruner[demo]'")
    if path.suffix.lower() != ".png":
        raise ValueError(f"the picture is a PNG, so its name must end in .png: {path}")
    if not path.parent.is_dir():
        raise ValueError(f"no such folder for the picture: {path.parent}")


def load_processor(model: str, trust_remote_code: bool = False) -> ProcessorMixin:
    """The processor of a checkpoint, or of its base where it holds a pruner alone.

    Args:
        trust_remote_code (`bool`): Runs the processor's own code, where the checkpoint brings some.

    Raises:
        `ValueError`: where there is none, or the checkpoint is of no supported family.
    """
    config = pruned_class(model).config_class.from_pretrained(model)
    base, revision = find_base(model, config.base_model_name_or_path), config.base_model_revision
    try:
        return AutoProcessor.from_pretrained(
            base or model, trust_remote_code=trust_remote_code, **({"revision": revision} if revision else {})
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no processor could be loaded from {base or model}; where there is none, save the base model's there, "
            f"processor.save_pretrained(folder) ({error})"
        ) from error


def load(model: str, trust_remote_code: bool = False) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A pruned model, ready to answer on the GPU where there is one, and its processor.

    Args:
        trust_remote_code (`bool`): Of the processor, as in [`load_processor`].

    Raises:
        `ValueError`: before any weight is read, where there is no processor.
    """
    processor = load_processor(model, trust_remote_code)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LearnPrunerForConditionalGeneration.from_pretrained(model, dtype="auto").eval().to(device), processor


def compare_file(
    model: str,
    image: Path,
    question: str,
    ratio: float | None,
    max_new_tokens: int,
    picture: Path | None,
    trust_remote_code: bool = False,
) -> Comparison:
    """The `learnpruner compare` command. Bad input is refused before the model is loaded."""
    loaded = load_image(image)
    if picture is not None:
        check_picture(picture)
    pruned, processor = load(model, trust_remote_code)
    comparison = compare(pruned, processor, loaded, question, ratio, max_new_tokens)
    if picture is not None:
        save_picture(comparison, token_side(processor), picture)
    return comparison
