# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Verifying a pruner before it is trusted: its files, its code, its records, and one image through it."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from PIL import Image
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

import learnpruner
from learnpruner.auto import LearnPrunerForConditionalGeneration
from learnpruner.cache_learnpruner import PrunedCache
from learnpruner.compare import build_prompt, load_image, load_processor

from .checks import check_code, hub_reached, refuse_weights
from .push import RESULTS
from .records import check_recorded_of, read_results, weights_digest


@dataclass(frozen=True)
class Verified:
    """What was found.

    Attributes:
        checkpoint (`str`): With its commit, where it is on the Hub.
        code (`dict[str, str]`): Name -> sha256 of the executed files, all of this release.
        base (`str`): The base that it names, with its revision; or "all weights are here".
        pruner_sha256 (`str`).
        results (`list[str]`): Recorded results, all of these weights.
        tokens (`tuple[int, ...]`): Vision tokens of one image, then after each cut.
        answer (`str`): What the model said of it.
    """

    checkpoint: str
    code: dict[str, str]
    base: str
    pruner_sha256: str
    results: list[str]
    tokens: tuple[int, ...]
    answer: str

    def __str__(self) -> str:
        release = f"as in learnpruner {learnpruner.__version__}"
        rows = [
            ("checkpoint", self.checkpoint),
            ("weights", "safetensors alone"),
            *((name, f"{digest}  {release}") for name, digest in self.code.items()),
            ("base", self.base),
            ("pruner", self.pruner_sha256),
            ("results", f"{', '.join(self.results)}: of these weights" if self.results else "none recorded"),
            ("vision tokens", " -> ".join(map(str, self.tokens))),
            ("answer", repr(self.answer)),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def verify(
    checkpoint: str,
    revision: str | None = None,
    token: str | bool | None = None,
    image: str | Path | None = None,
    question: str = "What is this?",
    ratio: float | None = None,
) -> Verified:
    """Downloads a checkpoint, compares its code with this release's, loads it by the latter, and runs one image. No
    code of the checkpoint is executed.

    Args:
        checkpoint (`str`): A Hub id or a folder.
        revision (`str`, *optional*): Of a Hub id.
        image (`str`, *optional*): Defaults to a plain one.
        ratio (`float`, *optional*): Defaults to the checkpoint's.

    Raises:
        `OSError`: where there is no such checkpoint.
        `ValueError`: for pickles, other weights than the model's, code that is not this release's, results that were
            recorded of other weights, and where neither it nor its base has a processor.
    """
    loaded = Image.new("RGB", (336, 336), "teal") if image is None else load_image(Path(image))
    place, folder = {}, Path(checkpoint)
    if folder.is_dir():
        refuse_weights([p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()], checkpoint)
    else:
        with hub_reached():
            # Listed at one commit, before anything is downloaded.
            info = HfApi(token=token).model_info(checkpoint, revision=revision)
            refuse_weights([file.rfilename for file in info.siblings], checkpoint)
            folder = Path(snapshot_download(checkpoint, revision=info.sha, token=token))
        place = {"revision": info.sha, "token": token}
    code = check_code(folder)
    model = LearnPrunerForConditionalGeneration.from_pretrained(
        checkpoint, dtype="auto", use_safetensors=True, **place
    ).eval()
    results = read_results(sorted((folder / RESULTS).glob("*.json")))
    check_recorded_of(model, results)
    if any((folder / name).exists() for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME)):
        # Not left open: transformers would ask whether to run what code the processor brings.
        processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False, **place)
    else:
        processor = load_processor(str(folder))  # the base's: a folder may hold a pruner alone
    tokens, answer = _ask(model, processor, loaded, question, ratio)
    base, base_revision = model.config.base_model_name_or_path, model.config.base_model_revision
    return Verified(
        checkpoint=f"{checkpoint} at {place['revision']}" if place else checkpoint,
        code=code,
        base=f"{base} at {base_revision or 'no fixed revision'}" if base else "all weights are here",
        pruner_sha256=weights_digest(model, pruner=True),
        results=list(results),
        tokens=tokens,
        answer=answer,
    )


def _ask(
    model: PreTrainedModel, processor: ProcessorMixin, image: Image.Image, question: str, ratio: float | None
) -> tuple[tuple[int, ...], str]:
    inputs = processor(images=image, text=build_prompt(processor, question), return_tensors="pt").to(model.device)
    output = model.generate(
        **inputs, pruner_ratio=ratio, do_sample=False, max_new_tokens=16, return_dict_in_generate=True
    )
    vision = inputs["input_ids"] == model.config.image_token_id
    cache = output.past_key_values
    # Where nothing was cut the cache is the stock model's, which keeps no record.
    masks = cache.kept_mask if isinstance(cache, PrunedCache) else ()
    tokens = tuple(int(mask.sum()) for mask in (vision, *(kept & vision for kept in masks)))
    reply = output.sequences[0, inputs["input_ids"].shape[1] :]
    return tokens, processor.decode(reply, skip_special_tokens=True).strip()
