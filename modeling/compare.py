# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""One question about one image, pruned and unpruned in the same process: answers, tokens, time, cache, a picture."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from transformers import AutoProcessor, Cache, PreTrainedModel, ProcessorMixin

from .auto import LearnPrunerForConditionalGeneration, pruned_class
from .cache_learnpruner import PrunedCache

RUNS = 3


@dataclass
class Comparison:
    """What one question cost and gave.

    Attributes:
        question, answer, stock_answer (`str`).
        tokens (`tuple[int, ...]`): Vision tokens of the prompt, then after each cut.
        seconds, stock_seconds (`float`): Median wall clock of `generate`, image encoding included.
        cache_bytes, stock_cache_bytes (`int`): Keys and values held at the end.
        kept (`tuple[torch.Tensor, ...]`, each `(tokens,)` bool): Survivors of each cut, in the image's token order.
    """

    question: str
    answer: str
    stock_answer: str
    tokens: tuple[int, ...]
    seconds: float
    stock_seconds: float
    cache_bytes: int
    stock_cache_bytes: int
    kept: tuple[torch.Tensor, ...]

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
    cache = results["pruned"].past_key_values
    # Where nothing was cut the cache is the stock model's, which keeps no record.
    kept = cache.kept_mask if isinstance(cache, PrunedCache) else ()
    kept = tuple(mask[0, vision].cpu() for mask in kept)
    return Comparison(
        question=question,
        answer=results["pruned", "answer"],
        stock_answer=results["stock", "answer"],
        tokens=(int(vision.sum()), *(int(mask.sum()) for mask in kept)),
        seconds=statistics.median(seconds["pruned"][1:]),
        stock_seconds=statistics.median(seconds["stock"][1:]),
        cache_bytes=cache_bytes(cache),
        stock_cache_bytes=cache_bytes(results["stock"].past_key_values),
        kept=kept,
    )


def save_picture(comparison: Comparison, image: Image.Image, model: PreTrainedModel, path: Path) -> None:
    """Draws the image and, for each cut, the image with the dropped patches dimmed.

    LLaVA-NeXT's further crops are not drawn: the first crop is the whole image.
    """
    from matplotlib import pyplot

    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    base = image.convert("RGB").resize((vision.image_size, vision.image_size), Image.Resampling.BICUBIC)
    figure, axes = pyplot.subplots(1, 1 + len(comparison.kept), figsize=(4.2 * (1 + len(comparison.kept)), 5.2))
    panels = [None, *comparison.kept]
    for axis, kept, number in zip([axes] if len(panels) == 1 else axes, panels, range(len(panels))):
        axis.imshow(base, extent=(0, side, side, 0))
        axis.set_axis_off()
        if kept is None:
            axis.set_title(f"{comparison.tokens[0]} vision tokens")
            continue
        grid = kept[: side * side].view(side, side)
        shade = torch.zeros(side, side, 4)
        shade[..., 3] = (~grid) * 0.82
        axis.imshow(shade.numpy(), extent=(0, side, side, 0), interpolation="nearest")
        axis.set_title(f"after cut {number}: {comparison.tokens[number]}")
    caption = f"{comparison.question}\npruned: {comparison.answer!r}   unpruned: {comparison.stock_answer!r}"
    figure.suptitle(caption, y=0.1, fontsize=11)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def compare_file(
    model: str, image: Path, question: str, ratio: float | None, max_new_tokens: int, picture: Path | None
) -> Comparison:
    """The `learnpruner compare` command. Bad input is refused before the model is loaded."""
    if not image.is_file():
        raise ValueError(f"no such image: {image}")
    try:
        loaded = Image.open(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{image} is not an image that Pillow can read") from error
    if picture is not None and not picture.parent.is_dir():
        raise ValueError(f"no such folder for the picture: {picture.parent}")
    pruned_class(model)
    processor = AutoProcessor.from_pretrained(model)
    pruned = LearnPrunerForConditionalGeneration.from_pretrained(model, dtype="auto").eval()
    comparison = compare(pruned, processor, loaded, question, ratio, max_new_tokens)
    if picture is not None:
        save_picture(comparison, loaded, pruned, picture)
    return comparison
