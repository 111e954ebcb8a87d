# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Verifying a pruner before it is trusted: its files, its code, its records, and one image through it."""

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.file_download import REGEX_COMMIT_HASH
from PIL import Image
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

import learnpruner
from learnpruner.auto import LearnPrunerForConditionalGeneration
from learnpruner.compare import build_prompt, load_image, load_processor
from learnpruner.compat_learnpruner import CACHE
from learnpruner.keys_learnpruner import PrunedCache

from .card import ACCURACY, accuracy_rows, check_card
from .checks import check_code, hub_reached, list_files, refuse_processor_code, refuse_unknown, refuse_weights
from .push import RESULTS
from .recorded_counts import note
from .records import TRAINING, check_recorded_of, is_speed, read_results, read_training, weights_digest


@dataclass(frozen=True)
class Verified:
    """What was found.

    Attributes:
        checkpoint (`str`): With its commit, where it is on the Hub.
        code (`dict[str, str]`): Name -> sha256 of the executed files, all of this release.
        base (`str`): The base that it names, with its revision; or "all weights are here".
        pruner_sha256 (`str`).
        results (`list[str]`): Recorded results, all of these weights.
        accuracy (`list[list]`): The rows of those of accuracy, as on the card, by the columns of its table.
        accuracy_note (`str`): What the mark in a row means; empty where none has it.
        training (`bool`): Whether the training of this pruner is recorded.
        tokens (`tuple[int, ...]`): Vision tokens of one image, then after each cut.
        answer (`str`): What the model said of it.
    """

    checkpoint: str
    code: dict[str, str]
    base: str
    pruner_sha256: str
    results: list[str]
    accuracy: list[list]
    accuracy_note: str
    training: bool
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
            ("training", "of these weights" if self.training else "not recorded"),
            ("vision tokens", " -> ".join(map(str, self.tokens))),
            ("answer", repr(self.answer)),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {text}" for name, text in rows]
        if self.accuracy:
            table = [list(ACCURACY), *([str(cell) for cell in row] for row in self.accuracy)]
            widths = [max(map(len, column)) for column in zip(*table)]
            lines += ["", *("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)]
        if self.accuracy_note:
            lines += ["", self.accuracy_note]
        return "\n".join(lines)


def verify(
    checkpoint: str,
    revision: str | None = None,
    token: str | bool | None = None,
    image: str | Path | None = None,
    question: str = "What is this?",
    ratio: float | None = None,
) -> Verified:
    """Looks at a checkpoint before it is trusted. None of its code is executed. Checked are, in this order:

    1. the names of its files, before anything is downloaded: weights are safetensors of the model alone, code is
       Python, and the rest texts and pictures; after the download, that none of them is a pickle by its content;
    2. its code, byte for byte that of the installed release, and that no JSON file names code, kernels or weights of
       another place;
    3. its records (`results/*.json`, `training.json`): fields, types and ranges;
    4. its weights: they fit the model, and the records name their sha256;
    5. the numbers of its card: each metric in `README.md` and `.eval_results/`, and each row of the card's tables of
       accuracy, speed and training, is that of a record;
    6. one image, through the installed code.

    Not checked is whether a recorded number was measured: that takes the benchmark.

    Args:
        checkpoint (`str`): A Hub id or a folder.
        revision (`str`, *optional*): Of a Hub id.
        image (`str`, *optional*): Defaults to a plain one.
        ratio (`float`, *optional*): Defaults to the checkpoint's.

    Raises:
        `OSError`: where there is no such checkpoint.
        `ValueError`: where a check fails; for a revision of a folder; and where neither the checkpoint nor its base has
            a processor, or only one with code of its own.
    """
    loaded = Image.new("RGB", (336, 336), "teal") if image is None else load_image(Path(image))
    place, folder = {}, Path(checkpoint)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{checkpoint} is a folder, which has no revisions: leave --revision out.")
        names = list_files(folder)
        refuse_weights(names, checkpoint, folder)
        refuse_unknown(names, checkpoint)
    else:
        with hub_reached():
            # Listed at one commit, before anything is downloaded.
            info = HfApi(token=token).model_info(checkpoint, revision=revision)
            names = [file.rfilename for file in info.siblings]
            refuse_weights(names, checkpoint)
            refuse_unknown(names, checkpoint)
            folder = Path(snapshot_download(checkpoint, revision=info.sha, token=token))
        refuse_weights(names, checkpoint, folder)  # by their content, too
        place = {"revision": info.sha, "token": token}
    code = check_code(folder)
    results = read_results(sorted((folder / RESULTS).glob("*.json")))
    training = read_training(folder / TRAINING) if (folder / TRAINING).exists() else None
    model = LearnPrunerForConditionalGeneration.from_pretrained(
        checkpoint, dtype="auto", use_safetensors=True, **place
    ).eval()
    check_recorded_of(model, results if training is None else {**results, TRAINING: training})
    check_card(folder, results, training)
    base, base_revision = model.config.base_model_name_or_path, model.config.base_model_revision
    if any((folder / name).exists() for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME)):
        # Not left open: transformers would ask whether to run what code the processor brings.
        processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False, **place)
    else:
        if base:
            refuse_processor_code(base, revision=base_revision, token=token)
        processor = load_processor(str(folder))  # the base's: a folder may hold a pruner alone
    tokens, answer = _ask(model, processor, loaded, question, ratio)
    return Verified(
        checkpoint=f"{checkpoint} at {place['revision']}" if place else checkpoint,
        code=code,
        # As it is stored: loading pinned it, for this process.
        base=_described(base, json.loads((folder / CONFIG_NAME).read_text()).get("base_model_revision")),
        pruner_sha256=weights_digest(model, pruner=True),
        results=list(results),
        accuracy=accuracy_rows(results),
        accuracy_note=note(record for record in results.values() if not is_speed(record)),
        training=training is not None,
        tokens=tokens,
        answer=answer,
    )


def _described(base: str | None, revision: str | None) -> str:
    if base is None:
        return "all weights are here"
    if Path(base).is_dir():
        return f"{base}, a folder of this machine"
    if not REGEX_COMMIT_HASH.fullmatch(revision or ""):
        return f"{base} at NO FIXED REVISION: who changes the base changes this model, and these results are not of it"
    return f"{base} at {revision}"


def _ask(
    model: PreTrainedModel, processor: ProcessorMixin, image: Image.Image, question: str, ratio: float | None
) -> tuple[tuple[int, ...], str]:
    inputs = processor(images=image, text=build_prompt(processor, question), return_tensors="pt").to(model.device)
    output = model.generate(
        **inputs, pruner_ratio=ratio, do_sample=False, max_new_tokens=16, return_dict_in_generate=True
    )
    vision = inputs["input_ids"] == model.config.image_token_id
    cache = output[CACHE]
    # Where nothing was cut the cache is the stock model's, which keeps no record.
    masks = cache.kept_mask if isinstance(cache, PrunedCache) else ()
    tokens = tuple(int(mask.sum()) for mask in (vision, *(kept & vision for kept in masks)))
    reply = output.sequences[0, inputs["input_ids"].shape[1] :]
    return tokens, processor.decode(reply, skip_special_tokens=True).strip()
