# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The `learnpruner diagnose` command: images and questions in, figures and a picture out."""

import hashlib
import json
import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import torch
import transformers
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from learnpruner.compare import build_prompt, check_picture, load, model_for
from learnpruner.configuration_learnpruner import __version__
from learnpruner.hub_cards.records import weights_digest
from learnpruner.training.data import load_samples, read_images, read_messages

from . import METHODS
from .base import Method
from .baselines import box_patches
from .diagnostic_plots import save_diagnostics
from .diagnostics import SINK, image_figures, mean_figures, summary
from .observations import observe, why_no_cls

logger = logging.get_logger(__name__)

FIGURES, PICTURE = "diagnostics.json", "diagnostics.png"
# Large enough that rounding does not hide whether a budget is within reach.
MANY_TOKENS = 10_000


def first_question(row: dict) -> list[dict]:
    """A sample's messages up to the first answer."""
    return list(takewhile(lambda message: message["role"] != "assistant", read_messages(row)))


def has_one_image(row: dict) -> bool:
    """Whether the sample's one image is part of its first question."""
    given = sum(part["type"] == "image" for message in read_messages(row) for part in message["content"])
    asked = sum(part["type"] == "image" for message in first_question(row) for part in message["content"])
    return given == asked == 1


def write_prompt(processor: ProcessorMixin, row: dict) -> str:
    messages = first_question(row)
    if processor.chat_template is None:
        parts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
        return build_prompt(processor, " ".join(parts))
    return processor.apply_chat_template(messages, add_generation_prompt=True)


def boxes_in_view(processor: ProcessorMixin, size: tuple[int, int], boxes: Sequence[Sequence[float]]) -> list[list]:
    """Boxes in shares of what the model sees, which for LLaVA-1.5 is the middle of the file's picture; those outside
    are left out.

    Args:
        size (`tuple[int, int]`): Width and height of the picture, in pixels.
        boxes: Left, top, right, bottom, in pixels.
    """
    image, scale, shown = processor.image_processor, (1.0, 1.0), size
    # The crops or patches of images that have a layout are together the whole.
    if model_for(processor).image_layout is None and image.do_center_crop:
        target = dict(image.size)
        if "shortest_edge" in target:
            scale = (target["shortest_edge"] / min(size),) * 2
        else:
            scale = (target["width"] / size[0], target["height"] / size[1])
        shown = (image.crop_size["width"], image.crop_size["height"])
    found = []
    for box in boxes:
        edges = [
            (edge * scale[axis] - (size[axis] * scale[axis] - shown[axis]) / 2) / shown[axis]
            for edge, axis in zip(box, (0, 1, 0, 1))
        ]
        left, top, right, bottom = (min(1.0, max(0.0, edge)) for edge in edges)
        if right > left and bottom > top:
            found.append([left, top, right, bottom])
    return found


def build_methods(
    names: Sequence[str], ratio: float, accounting: str, numbers: Sequence[int], boxes: Sequence
) -> dict[str, Method]:
    """The methods of one batch. Chance draws anew for each image; boxes are shares of the picture."""
    known = {"random": {"seed": numbers}, "oracle_boxes": {"boxes": boxes, "picture": (1, 1)}}
    return {name: METHODS[name](ratio=ratio, accounting=accounting, **known.get(name, {})) for name in names}


def choose_samples(samples, limit: int, with_boxes: bool) -> list[int]:
    """Numbers of the first `limit` samples that have one image.

    Raises:
        `ValueError`: where there is none, boxes are no boxes, or one lacks those that it must have.
    """
    chosen = []
    for number, row in enumerate(samples):
        if len(chosen) == limit:
            break
        if not has_one_image(row):
            continue
        boxes = row.get("boxes") or []
        if any(len(box) != 4 for box in boxes):
            raise ValueError(f"Sample {number}: a box is left, top, right and bottom in pixels, got {boxes}.")
        if with_boxes and not boxes:
            raise ValueError(f"oracle_boxes looks at boxes, and sample {number} has none: leave the method out.")
        chosen.append(number)
    if not chosen:
        raise ValueError("No sample has one image, and a question about it: there is nothing to look at.")
    return chosen


def observe_samples(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[dict],
    names: Sequence[str],
    ratio: float,
    accounting: str,
    sink: float,
    batch_size: int,
) -> list[dict]:
    """Figures of each image ([`image_figures`]). Samples whose image is damaged are left out, with a warning."""
    figures = []
    for start in tqdm(range(0, len(samples), batch_size), desc="diagnose", unit="batch"):
        read: list[tuple[int, dict, Image.Image]] = []
        for number in range(start, min(start + batch_size, len(samples))):
            try:
                read.append((number, samples[number], read_images(samples[number])[0]))
            except OSError as error:
                logger.warning(f"A sample is left out: {error}")
        if not read:
            continue
        numbers, rows, pictures = zip(*read)
        boxes = [boxes_in_view(processor, picture.size, row.get("boxes") or []) for row, picture in zip(rows, pictures)]
        if "oracle_boxes" in names and not all(boxes):
            raise ValueError("oracle_boxes: an image has no box in the part that the model sees: leave the method out.")
        inputs = processor(
            images=list(pictures),
            text=[write_prompt(processor, row) for row in rows],
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        methods = build_methods(names, ratio, accounting, numbers, boxes)
        for seen, own in zip(observe(model, inputs, methods), boxes):
            foreground = box_patches(*seen.places.unbind(-1), own).any(0) if own else None
            figures.append(image_figures(seen, foreground, ratio, sink))
    if not figures:
        raise ValueError("Every image is damaged: check the files.")
    return figures


def diagnose(
    model: str,
    data: Path,
    output: Path,
    method: Sequence[str] | None = None,
    ratio: float | None = None,
    accounting: str = "mean",
    limit: int = 200,
    sink: float = SINK,
    batch_size: int = 8,
    trust_remote_code: bool = False,
) -> str:
    """Writes `diagnostics.json` and `diagnostics.png` into a folder, and returns the tables of [`summary`].

    Both are written at the end: a killed run leaves an earlier one's files as they were.

    Args:
        model (`str`): Hub id or folder of a stock or a pruned checkpoint.
        data (`Path`): As in [`load_samples`]; boxes, where samples have them, say what is foreground.
        output (`Path`): Folder; made where there is none.
        method (`Sequence[str]`, *optional*): Names in `METHODS`. Defaults to learnpruner and, where the tower has a
            [CLS] token, cls_attention.
        ratio (`float`, *optional*): The methods' budget, and share that a cut by one layer's attention keeps. Defaults
            to the checkpoint's.
        accounting (`str`): Of the methods' ratio, as in [`Method`].
        limit (`int`): Images: the first that many samples which have one.
        sink (`float`): Times the mean attention of an image's patches from which a patch is a sink.
        batch_size (`int`).
        trust_remote_code (`bool`): Of the processor.

    Raises:
        `ImportError`, `OSError`, `ValueError`: before any image is run, where matplotlib is missing, the output is a
            file, a method is unknown or reads what model or data lack, a budget is out of reach, or no sample is left.
    """
    unknown = [name for name in method or () if name not in METHODS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no method. Known are: {', '.join(sorted(METHODS))}.")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file: name a folder.")
    check_picture(output.parent / PICTURE if output.parent.is_dir() else Path(PICTURE))
    samples = load_samples(data, answers=False)
    samples = samples.select(choose_samples(samples, limit, "oracle_boxes" in (method or ())))
    pruned, processor = load(model, trust_remote_code)
    no_cls = why_no_cls(pruned.model)
    names = list(dict.fromkeys(method or (["learnpruner"] if no_cls else ["learnpruner", "cls_attention"])))
    ratio = pruned.config.pruner_ratio if ratio is None else ratio
    if ratio == 1:
        raise ValueError("At a ratio of 1 nothing is cut: give --ratio, such as 1/9.")
    layers = {}
    for name, built in build_methods(names, ratio, accounting, [], []).items():
        cuts = built.cuts(pruned.model)
        for cut in cuts:
            cut.keep(MANY_TOKENS)
        layers[name] = [cut.layer for cut in cuts]
    output.mkdir(parents=True, exist_ok=True)

    figures = observe_samples(pruned, processor, samples, names, ratio, accounting, sink, batch_size)
    mean = mean_figures(figures)
    for name, cuts in mean["methods"].items():
        mean["methods"][name] = [{"layer": layer, **cut} for layer, cut in zip(layers[name], cuts)]
    questions = "\n".join(json.dumps(first_question(row)) for row in samples)
    diagnosis = {
        # A folder's path says something of this machine only; the digests say which weights it held.
        "model": Path(model).resolve().name if Path(model).is_dir() else model,
        "base_sha256": weights_digest(pruned),
        "pruner_sha256": weights_digest(pruned, pruner=True),
        "pruner_trained": pruned.config.pruner_trained,
        "pruner_layer": pruned.config.pruner_layer,
        "pruner_query": pruned.config.pruner_query,
        "data": {"file": data.name, "questions_sha256": hashlib.sha256(questions.encode()).hexdigest()},
        "images": len(figures),
        "images_with_boxes": sum(figure["foreground"] is not None for figure in figures),
        "images_left_out": len(samples) - len(figures),
        "ratio": ratio,
        "accounting": accounting,
        "sink": sink,
        "no_cls": no_cls,
        "dtype": str(pruned.dtype).removeprefix("torch."),
        "versions": {
            "learnpruner": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        **mean,
    }
    save_diagnostics(diagnosis, output / f".{PICTURE}")
    (output / f".{FIGURES}").write_text(json.dumps(_rounded(diagnosis), indent=1) + "\n")
    for name in (PICTURE, FIGURES):
        os.replace(output / f".{name}", output / name)
    return summary(diagnosis)


def _rounded(value):
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 6) if isinstance(value, float) else value
