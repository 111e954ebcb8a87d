# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What was recorded of a model, by benchmarks/ and by the trainer, and whether it was of these very weights."""

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

TRAINING = "training.json"
# Methods of benchmarks/accuracy.py that look at the pruner's weights.
LEARNED = ("learnpruner", "stage_1", "composed")
# Ratios of wall clock: unpruned / pruned of the prefill, what that would be if pruning itself cost nothing,
# unpruned / pruned of a whole answer, and pruner_ratio=1.0 / stock class.
SPEEDS = ("prefill_speedup", "prefill_ceiling", "end_to_end_speedup", "overhead_at_ratio_one")
# The other ratios of wall clock that are always there, and those that are where an answer has more than one token.
OTHER_SPEEDS = (
    *("prefill_share_of_ceiling", "end_to_end_ceiling", "end_to_end_share_of_ceiling"),
    *("prefill_overhead_at_ratio_one", "scoring_and_selection_share"),
)
DECODE_SPEEDS = ("decode_speedup", "decode_overhead_at_ratio_one")
# What a card shows of a training.json, in this order, where it is recorded.
SETTINGS = (
    *("train_data", "samples", "objective", "steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("processes", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "budgets", "distillation"),
    *("temperature", "final_temperature", "pruner_ratio", "seed", "device"),
)
COST = ("seconds", "trained_parameters", "peak_memory_bytes")


class Kind(NamedTuple):
    """What a field of a record must hold, in words and as a test."""

    what: str
    holds: Callable[[object], bool]


def _is_number(value, low: float = -math.inf, high: float = math.inf) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def _is_count(value, low: int = 0) -> bool:
    return type(value) is int and value >= low


def _is_line(value) -> bool:
    # As a cell of a Markdown table.
    return isinstance(value, str) and value.isprintable() and value.strip() != "" and "|" not in value


def _are_answers(value) -> bool:
    if not isinstance(value, dict) or value.keys() != ANSWER_COLUMNS.keys():
        return False
    # Types are exact: a truth value is no number.
    of_type = (
        isinstance(column, list) and all(type(held) is ANSWER_COLUMNS[name] for held in column)
        for name, column in value.items()
    )
    return all(of_type) and len(set(map(len, value.values()))) == 1


LINE = Kind("a line of text", _is_line)
NAME = Kind(
    "a name of letters, digits, _ and -", lambda value: isinstance(value, str) and re.fullmatch(r"[\w-]+", value)
)
WHOLE = Kind("a whole number", lambda value: type(value) is int)
COUNT = Kind("a whole number above 0", lambda value: _is_count(value, 1))
COUNTS = Kind("a list of whole numbers", lambda value: isinstance(value, list) and all(map(_is_count, value)))
SHARE = Kind("a share from 0 to 1", lambda value: _is_number(value, 0, 1))
RATIO = Kind("a ratio above 0, up to 1", lambda value: _is_number(value, 0, 1) and value > 0)
NUMBER = Kind("a number", _is_number)
AMOUNT = Kind("a number of 0 or more", lambda value: _is_number(value, 0))
SPEED = Kind("a number above 0, or null", lambda value: value is None or (_is_number(value, 0) and value > 0))
DIGEST = Kind("a sha256, or null", lambda value: value is None or _is_line(value))
BYTES = Kind("a whole number, or null", lambda value: value is None or type(value) is int)
TEXT = Kind("a line of text, or null", lambda value: value is None or _is_line(value))
PLAIN = Kind("a number or a line of text", lambda value: type(value) is bool or _is_number(value) or _is_line(value))
SETTING = Kind(
    "a number, a line of text, a list of numbers, or null",
    lambda value: value is None or PLAIN.holds(value) or (isinstance(value, list) and all(map(_is_number, value))),
)
# A value for each question, in turn.
ANSWER_COLUMNS = {"scene": int, "expected": str, "given": str}
ANSWERS = Kind("three lists of one length, scene, expected and given", _are_answers)
# Stands for every name of a mapping. A name that ends in ? may be missing.
EACH = ""
WEIGHTS = {"base_sha256": DIGEST, "pruner_sha256": DIGEST}
VERSIONS = {"transformers": LINE, EACH: LINE}
ACCURACY_FIELDS = {
    "method": LINE,
    "name": LINE,
    "ratio": RATIO,
    "seed": WHOLE,
    "level": NAME,
    "data": LINE,
    "versions": VERSIONS,
    "accuracy": SHARE,
    "n": COUNT,
    "by_kind": {EACH: {"accuracy": SHARE, "n": COUNT}},
    **WEIGHTS,
    "tokens": {"image": COUNT, "after_cuts": COUNTS, "mean": AMOUNT},
    "fields?": {EACH: PLAIN},
    "relative_accuracy?": AMOUNT,
    # Until version 0.2 these were not recorded, and scenes were of seed 0.
    "scene_seed?": WHOLE,
    "answers?": ANSWERS,
    "pixels_sha256?": LINE,
    "code_sha256?": LINE,
    "method_revision?": COUNT,
}
# Medians of the rounds; `low` and `high` are an interval of that confidence.
MEASURED = {"median": AMOUNT, "low": AMOUNT, "high": AMOUNT, "confidence": SHARE}
ANSWER = {"time_to_first_token": MEASURED, "decode_token?": MEASURED}
# Of a difference of times, which noise can make negative.
DIFFERENCE = {**MEASURED, **dict.fromkeys(("median", "low", "high"), NUMBER)}
PREFILL = {"prefill": MEASURED, "decoder_prefill": DIFFERENCE}
FLOPS = {"prefill": COUNT, "decode_token": COUNT}
SPEED_FIELDS = {
    **dict.fromkeys(SPEEDS, SPEED),
    "intervals": {
        **dict.fromkeys((*SPEEDS, *OTHER_SPEEDS), MEASURED),
        **dict.fromkeys(("end_to_end_ceiling", "end_to_end_share_of_ceiling"), DIFFERENCE),
        **{f"{name}?": MEASURED for name in DECODE_SPEEDS},
    },
    "seconds": {
        "stock": PREFILL,
        "pruned": PREFILL,
        "parts": {"vision": MEASURED},
        "stock answer": ANSWER,
        "pruned answer": ANSWER,
    },
    "kv_bytes": {"stock": COUNT, "pruned": COUNT},
    "peak_memory_bytes": {"stock": BYTES, "pruned": BYTES},
    "flops": {"stock": FLOPS, "pruned": FLOPS},
    "tokens": {"image": COUNT, "after_cuts": COUNTS, "mean": AMOUNT},
    "ratio": RATIO,
    "device": LINE,
    "device_type": LINE,
    "settings": {
        **dict.fromkeys(("preset", "backend", "dtype"), LINE),
        **dict.fromkeys(("batch_size", "text_tokens", "new_tokens", "rounds"), COUNT),
        EACH: PLAIN,
    },
    "conditions": {"load_average": AMOUNT, EACH: TEXT},
    "versions": {"torch": LINE, **VERSIONS},
    "code_sha256": LINE,
    **WEIGHTS,
}
TRAINING_FIELDS = {
    "pruner_sha256": DIGEST,
    "metrics?": {f"{name}?": AMOUNT for name in COST},
    **{f"{name}?": SETTING for name in SETTINGS},
}


def weights_digest(model: PreTrainedModel, pruner: bool = False) -> str:
    """sha256 of the base's weights, the pruner left out, or of the pruner's alone.

    It is of the values as they are held: a model that is loaded in another dtype has another digest. The benchmarks,
    `learnpruner push` and `learnpruner verify` load a checkpoint in the dtype that it is stored in.
    """
    return tensors_digest(
        {name: tensor for name, tensor in model.state_dict().items() if (".pruner." in name) == pruner}
    )


def tensors_digest(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 of names and values."""
    digest = hashlib.sha256()
    # The bar is for large models: others are done before it would show.
    for name, tensor in tqdm(sorted(tensors.items()), desc="sha256 of the weights", unit="tensor", delay=3):
        digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def code_digest(files: Iterable[Path]) -> str:
    """sha256 of names and contents."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def is_speed(record: Mapping) -> bool:
    return SPEEDS[0] in record


def _check(value, schema: Kind | Mapping, name: str = "it") -> None:
    """Raises `ValueError` that names the first field of a record which is missing, or does not hold what it must."""
    if isinstance(schema, Kind):
        if not schema.holds(value):
            raise ValueError(f"{name} is {reprlib.repr(value)}, and should be {schema.what}")
        return
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{name} is {reprlib.repr(value)}, and should be a mapping with entries")
    if missing := sorted(field for field in set(schema) - {EACH} - set(value) if not field.endswith("?")):
        raise ValueError(f"{name} lacks {missing}")
    for field, inner in value.items():
        kind = schema.get(field, schema.get(f"{field}?", schema.get(EACH)))
        if kind is not None:
            _check(inner, kind, f"{name}.{field}".removeprefix("it."))


def read_record(path: Path, fields: Mapping, of: str) -> dict:
    """Raises `ValueError` where the file is not what `of` says, with the first of `fields` that does not hold."""
    try:
        record = json.loads(path.read_text())
        _check(record, fields)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not {of}: {error}") from error
    return record


def read_result(path: Path, speed: bool = False) -> dict:
    """Raises `ValueError` where the file is not a result of benchmarks/accuracy.py, or with `speed` of
    benchmarks/speed.py, or holds what cannot have been measured, such as a share above 1. It names the field."""
    command, fields = ("speed", SPEED_FIELDS) if speed else ("accuracy", ACCURACY_FIELDS)
    return read_record(path, fields, f"a result of benchmarks/{command}.py")


def read_training(path: Path) -> dict:
    """Raises `ValueError`, as [`read_result`], where the file is no `training.json`."""
    return read_record(path, TRAINING_FIELDS, "a record of `learnpruner train`")


def check_training(record: Mapping) -> None:
    """Raises `ValueError`, as [`read_training`], for a record that is no file."""
    _check(record, TRAINING_FIELDS, TRAINING)


def read_results(paths: Iterable[Path]) -> dict[str, dict]:
    """Name of the file -> result, of accuracy or of speed.

    Raises:
        `ValueError`: where a file is neither, or not called `.json`, or two are of one name.
    """
    results = {}
    for path in paths:
        if path.suffix != ".json":
            raise ValueError(f"{path} is not called .json, as results are in a repository: rename it.")
        if path.name in results:
            raise ValueError(f"Two results are called {path.name}: rename one.")
        try:
            speed = is_speed(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            speed = False  # what is wrong is said next
        results[path.name] = read_result(path, speed)
    return results


def digests_of(record: Mapping) -> tuple[str, ...]:
    """The digests without which nobody knows what was recorded."""
    if "method" in record and record["method"] not in LEARNED:
        return ("base_sha256",)
    # A training leaves the base as it is, and names it.
    return ("base_sha256", "pruner_sha256") if "method" in record or is_speed(record) else ("pruner_sha256",)


def check_recorded_of(model: PreTrainedModel, records: Mapping[str, Mapping]) -> None:
    """Raises `ValueError` where one of the named records was not made of the weights that `model` holds, does not say
    of which weights it was made, or was made of the pruner at other settings than the configuration's."""
    for field, pruner in (("base_sha256", False), ("pruner_sha256", True)):
        if unknown := sorted(
            n for n, record in records.items() if field in digests_of(record) and not record.get(field)
        ):
            raise ValueError(
                f"{', '.join(unknown)} does not say of which weights it is ({field}). Measure this model, or leave it "
                "out."
            )
        known = {name: record[field] for name, record in records.items() if record.get(field)}
        digest = weights_digest(model, pruner) if known else None
        if others := sorted(name for name, value in known.items() if value != digest):
            raise ValueError(
                f"{', '.join(others)}: recorded of other weights than these, by {field} ({known[others[0]]}, and the "
                f"model has {digest}). Measure this model, or leave them out."
            )
    settings = model.config.to_dict()
    for name, record in records.items():
        for field, value in record.get("fields", {}).items() if record.get("pruner_sha256") else ():
            if settings.get(field) != value:
                raise ValueError(
                    f"{name}: recorded with {field}={value}, and the model has {settings.get(field)}. Set "
                    f"model.config.{field}, or leave it out."
                )


def relative_accuracy(result: Mapping, unpruned: Mapping) -> float:
    """Mean over the kinds of question of accuracy / unpruned accuracy.

    Raises:
        `ValueError`: where the two did not ask the same model the same questions, or the unpruned model had none of a
            kind right.
    """
    from learnpruner.training.metrics import RelAcc  # training records with this module

    check_comparable(result, unpruned)
    pairs = [(kind["accuracy"], unpruned["by_kind"][name]["accuracy"]) for name, kind in result["by_kind"].items()]
    pruned, stock = zip(*pairs)
    return RelAcc().compute(predictions=pruned, references=stock)["rel_acc"]


def check_comparable(result: Mapping, unpruned: Mapping, what: str = "RelAcc") -> None:
    """Raises `ValueError` where two runs did not ask the same model the same questions; `what` compares them."""
    for name in ("base_sha256", "level", "data"):
        if result[name] != unpruned[name]:
            raise ValueError(f"{what} compares runs of one model on the same questions; they differ in {name}.")
