# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What was recorded of a model, by benchmarks/ and by the trainer, and whether it was of these very weights."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

TRAINING = "training.json"
ACCURACY_FIELDS = {"method", "seed", "level", "accuracy", "n", "by_kind", "tokens", "base_sha256", "pruner_sha256"}
ACCURACY_FIELDS |= {"data", "versions", "name", "ratio"}
# Ratios of wall clock, each a number or `None` where it was not measured: unpruned / pruned of the prefill, what that
# would be if pruning itself cost nothing, unpruned / pruned of a whole answer, and pruner_ratio=1.0 / stock class.
SPEEDS = ("prefill_speedup", "prefill_ceiling", "end_to_end_speedup", "overhead_at_ratio_one")
# `device` is a string, `settings` a mapping of names to numbers and strings.
SPEED_FIELDS = {*SPEEDS, "ratio", "device", "settings", "versions", "base_sha256", "pruner_sha256"}


def weights_digest(model: PreTrainedModel, pruner: bool = False) -> str:
    """sha256 of the base's weights, the pruner left out, or of the pruner's alone."""
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


def is_speed(record: Mapping) -> bool:
    return SPEEDS[0] in record


def read_result(path: Path, speed: bool = False) -> dict:
    """Raises `ValueError` where the file is not a result of benchmarks/accuracy.py, or with `speed` of
    benchmarks/speed.py."""
    command, fields = ("speed", SPEED_FIELDS) if speed else ("accuracy", ACCURACY_FIELDS)
    try:
        result = json.loads(path.read_text())
        missing = fields - set(result)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a result of benchmarks/{command}.py ({error})") from error
    if missing:
        raise ValueError(f"{path} is not a result of benchmarks/{command}.py: it lacks {sorted(missing)}")
    return result


def read_results(paths: Iterable[Path]) -> dict[str, dict]:
    """Name of the file -> result, of accuracy or of speed.

    Raises:
        `ValueError`: where a file is neither, or two are of one name.
    """
    results = {}
    for path in paths:
        if path.name in results:
            raise ValueError(f"Two results are called {path.name}: rename one.")
        try:
            speed = is_speed(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            speed = False  # what is wrong is said next
        results[path.name] = read_result(path, speed)
    return results


def check_recorded_of(model: PreTrainedModel, records: Mapping[str, Mapping]) -> None:
    """Raises `ValueError` where one of the named records was not made of the weights that `model` holds, or of its
    pruner at other settings than the configuration's."""
    for field, pruner in (("base_sha256", False), ("pruner_sha256", True)):
        known = {name: record[field] for name, record in records.items() if record.get(field)}
        digest = weights_digest(model, pruner) if known else None
        if others := sorted(name for name, value in known.items() if value != digest):
            raise ValueError(
                f"{', '.join(others)}: recorded of other weights than these, by {field} ({known[others[0]]}, and the "
                f"model has {digest}). Measure this model, or leave them out."
            )
    for name, record in records.items():
        for field, value in record.get("fields", {}).items() if record["pruner_sha256"] else ():
            if getattr(model.config, field) != value:
                raise ValueError(
                    f"{name}: recorded with {field}={value}, and the model has {getattr(model.config, field)}. Set "
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


def check_comparable(result: Mapping, unpruned: Mapping) -> None:
    """Raises `ValueError` where two runs did not ask the same model the same questions."""
    for name in ("base_sha256", "level", "data"):
        if result[name] != unpruned[name]:
            raise ValueError(f"RelAcc compares runs of one model on the same questions; they differ in {name}.")
