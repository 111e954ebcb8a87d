# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The model card: a template, filled with what was recorded. What was not is said to be missing."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from transformers import PreTrainedModel

import learnpruner
from learnpruner.guards_learnpruner import NEWEST_TESTED, OLDEST
from learnpruner.hub_learnpruner import PRUNER

from .records import SPEEDS, is_speed, relative_accuracy, weights_digest

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.jinja"
PICTURE, EVALUATIONS = "kept_tokens.png", ".eval_results"
# What benchmarks/accuracy.py asks; made by it, so no data set of the Hub.
DATA_SET = "easy-vqa-scenes"
MISSING = "not measured"
# Of a training.json, in this order, where they are recorded.
SETTINGS = (
    *("train_data", "samples", "objective", "steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("processes", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "budgets", "distillation"),
    *("temperature", "final_temperature", "pruner_ratio", "seed", "device"),
)
COST = ("seconds", "trained_parameters", "peak_memory_bytes")


def write_card(
    folder: Path,
    repo_id: str,
    model: PreTrainedModel,
    code: Mapping[str, str],
    records: Mapping[str, dict],
    training: Mapping | None,
    base: str | None,
    base_revision: str | None,
    merged: bool,
    tags: Sequence[str],
    license: str | None = None,
) -> None:
    """Writes `README.md` and `.eval_results/*.yaml` into the folder of a repository.

    Args:
        code: Name -> sha256 of the executed files.
        records: Name -> result of accuracy or speed, all of this model's weights.
        base (`str`, *optional*): Hub id of the base, at the commit `base_revision`.
    """
    config = model.config
    accuracy = [record for record in records.values() if not is_speed(record)]
    accuracy.sort(key=lambda record: (record["level"], -record["tokens"]["mean"], record["name"], record["seed"]))
    # Other methods are in the table; the metrics of this repository are this pruner's.
    own = [record for record in accuracy if record["pruner_sha256"]]
    data = ModelCardData(
        model_name=repo_id.rpartition("/")[2],
        license=license and license.lower(),  # as the Hub writes SPDX identifiers
        base_model=base,
        base_model_relation=("finetune" if merged else "adapter") if base else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["learnpruner", "token-pruning", "arxiv:2604.23950", *tags],
        eval_results=[_eval_result(record) for record in own] or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        merged=merged,
        base=base,
        base_link=_link(base, base_revision),
        base_revision=base_revision,
        parameters=f"{sum(p.numel() for name, p in model.named_parameters() if name.startswith(PRUNER)):,}",
        ratio=f"{100 * config.pruner_ratio:.1f}",
        trained=config.pruner_trained,
        pruner_sha256=weights_digest(model, pruner=True),
        oldest=".".join(map(str, OLDEST)),
        newest=".".join(map(str, NEWEST_TESTED)),
        version=learnpruner.__version__,
        code=code,
        accuracy=_accuracy_rows(accuracy),
        accuracy_versions=_versions(accuracy),
        speed=[_speed_row(record) for record in records.values() if is_speed(record)],
        picture=PICTURE if (folder / PICTURE).exists() else None,
        training=_training_rows(training or {}),
    )
    card.save(folder / "README.md")
    _write_evaluations(folder / EVALUATIONS, own)


def _link(base: str | None, revision: str | None) -> str | None:
    return base and f"[{base}](https://huggingface.co/{base}" + (f"/tree/{revision})" if revision else ")")


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.2f}"


def _accuracy_rows(accuracy: list[dict]) -> list[list]:
    unpruned = {(record["level"], record["data"]): record for record in accuracy if record["method"] == "none"}
    rows = []
    for record in accuracy:
        tokens = record["tokens"]
        relative = record.get("relative_accuracy")
        if stock := unpruned.get((record["level"], record["data"])):
            with suppress(ValueError):  # where the unpruned model has none of a kind right, there is no ratio
                relative = relative_accuracy(record, stock)
        cuts = " -> ".join(map(str, tokens["after_cuts"])) or "no cut"
        ratio, mean = f"{record['ratio']:.4g}", f"{tokens['mean']:g} of {tokens['image']}"
        shown = percent(record["accuracy"]), percent(relative)
        rows.append([record["level"], record["name"], record["seed"], ratio, mean, cuts, record["n"], *shown])
    return rows


def _versions(records: Iterable[Mapping]) -> str:
    return " and ".join(sorted({f"transformers {record['versions']['transformers']}" for record in records}))


def _speed_row(record: Mapping) -> list:
    settings = ", ".join(f"{name} {value}" for name, value in {**record["settings"], **record["versions"]}.items())
    speeds = [MISSING if record[name] is None else f"{record[name]:g}" for name in SPEEDS]
    return [f"{record['ratio']:.4g}", record["device"], settings, *speeds]


def _training_rows(training: Mapping) -> list[tuple]:
    rows = [(name, training[name]) for name in SETTINGS if training.get(name) is not None]
    rows += [(name, training["metrics"][name]) for name in COST if name in training.get("metrics", {})]
    return [(name.replace("_", " "), value) for name, value in rows]


def _what(record: Mapping) -> str:
    tokens = record["tokens"]
    return f"{tokens['mean']:g} of {tokens['image']} vision tokens, mean over the decoder's layers"


def _eval_result(record: Mapping) -> EvalResult:
    return EvalResult(
        task_type="visual-question-answering",
        dataset_type=DATA_SET,
        dataset_name=f"easy-vqa scenes, {record['level']}",
        dataset_config=record["level"],
        dataset_split="test",
        metric_type="accuracy",
        metric_name=f"exact match at {_what(record)}, seed {record['seed']}",
        metric_value=record["accuracy"],
    )


def _write_evaluations(folder: Path, own: list[dict]) -> None:
    levels = defaultdict(list)
    for record in own:
        notes = f"exact match at {_what(record)}, seed {record['seed']}, {record['n']} questions"
        entry = EvalResultEntry(dataset_id=DATA_SET, task_id=record["level"], value=record["accuracy"], notes=notes)
        levels[record["level"]].append(entry)
    for level, entries in levels.items():
        folder.mkdir(exist_ok=True)
        content = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
        (folder / f"{DATA_SET}-{level}.yaml").write_text(content)
