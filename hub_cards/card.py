# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The model card: a template, filled with what was recorded. What was not is said to be missing."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
    parse_eval_result_entries,
)
from transformers import PreTrainedModel

import learnpruner
from learnpruner.compat_learnpruner import NEWEST_TESTED, OLDEST
from learnpruner.hub_learnpruner import PRUNER

from .checks import of_release
from .recorded_counts import MARK, arrows, is_marked, note
from .records import COST, SETTINGS, SPEEDS, is_speed, relative_accuracy, weights_digest

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.jinja"
README, PICTURE, EVALUATIONS = "README.md", "kept_tokens.png", ".eval_results"
# What benchmarks/accuracy.py asks; made by it, so no data set of the Hub.
DATA_SET = "easy-vqa-scenes"
MISSING = "not measured"
# Columns of the table of accuracy.
ACCURACY = (
    *("scenes", "method", "seed", "ratio", "mean tokens", "after each cut"),
    *("questions", "accuracy, %", "RelAcc, %"),
)
TAGS = ("learnpruner", "token-pruning", "arxiv:2604.23950")


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
    own = _own(records)
    data = ModelCardData(
        model_name=repo_id.rpartition("/")[2],
        license=license and license.lower(),  # as the Hub writes SPDX identifiers
        base_model=base,
        base_model_relation=("finetune" if merged else "adapter") if base else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=[*TAGS, *tags],
        eval_results=[_eval_result(record) for record in own.values()] or None,
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
        columns=ACCURACY,
        accuracy_versions=_versions(_sorted(records).values()),
        accuracy_note=note(_sorted(records).values()),
        speed_note=note(record for record in records.values() if is_speed(record)),
        picture=PICTURE if (folder / PICTURE).exists() else None,
        **{title.lower(): rows for title, rows in _tables(records, training).items()},
    )
    card.save(folder / README)
    for level, entries in _entries(own).items():
        (folder / EVALUATIONS).mkdir(exist_ok=True)
        content = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
        (folder / EVALUATIONS / f"{DATA_SET}-{level}.yaml").write_text(content)


def check_card(folder: Path, records: Mapping[str, dict], training: Mapping | None) -> None:
    """Compares what the card in `folder` says with the records: the metrics of `README.md` and of
    `.eval_results/*.yaml`, and the rows of the card's tables Accuracy, Speed and Training. Metrics of other data sets
    in `.eval_results/`, which other people add, are left alone.

    Raises:
        `ValueError`: for a number that is in no record, or not as in its record.
    """
    own = _own(records)
    distrust = f"It was changed after it was written, or is of another release.{of_release(folder)}"

    def require(recorded: bool, where: str, value, described: str | None, near: list[str]) -> None:
        if not recorded:
            known = " and ".join(f"results/{n} has {own[n]['accuracy']}" for n in near) or "no record has it"
            raise ValueError(f"{where} says {value} ({described}), and {known}. {distrust}")

    if (folder / README).exists():
        try:
            card = ModelCard.load(folder / README)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"The metadata of {README} cannot be read ({error}).") from error
        metrics = {name: _eval_result(record) for name, record in own.items()}
        for found in card.data.eval_results or ():
            near = [name for name, metric in metrics.items() if metric.is_equal_except_value(found)]
            described = f"{found.metric_name} on {found.dataset_name}"
            require(found in metrics.values(), README, found.metric_value, described, near)
        for title, rows in _tables(records, training).items():
            recorded = [[str(cell) for cell in row] for row in rows]
            for row in _shown_rows(card.text, title):
                if row not in recorded:
                    raise ValueError(f"{README}, {title}: no record has the row {' | '.join(row)}. {distrust}")
    entries = {name: _entry(record) for name, record in own.items()}
    for path in sorted((folder / EVALUATIONS).glob("*.y*ml")):
        where = f"{EVALUATIONS}/{path.name}"
        try:
            read = parse_eval_result_entries(yaml.safe_load(path.read_text()))
        except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{where} cannot be read ({type(error).__name__}: {error}).") from error
        for found in (entry for entry in read if entry.dataset_id == DATA_SET):
            near = [n for n, entry in entries.items() if (entry.task_id, entry.notes) == (found.task_id, found.notes)]
            require(found in entries.values(), where, found.value, found.notes, near)


def _shown_rows(text: str, title: str) -> list[list[str]]:
    """Cells of the table under a title."""
    _, _, after = "\n".join(text.splitlines()).partition(f"\n## {title}\n")
    rows = [line for line in after.partition("\n## ")[0].split("\n") if line.startswith("|")]
    return [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in rows[2:]]


def _own(records: Mapping[str, dict]) -> dict[str, dict]:
    """The accuracy of this pruner by both its cuts, which alone is this repository's: other methods, one of which takes
    its first cut alone, are in the table."""
    return {name: record for name, record in _sorted(records).items() if record["method"] == "learnpruner"}


def _sorted(records: Mapping[str, dict]) -> dict[str, dict]:
    """Those of accuracy, from many tokens to few."""
    accuracy = [(name, record) for name, record in records.items() if not is_speed(record)]
    accuracy.sort(key=lambda pair: (pair[1]["level"], -pair[1]["tokens"]["mean"], pair[1]["name"], pair[1]["seed"]))
    return dict(accuracy)


def _tables(records: Mapping[str, dict], training: Mapping | None) -> dict[str, list[list]]:
    """Section of the card -> rows of its table."""
    return {
        "Accuracy": accuracy_rows(records),
        "Speed": [_speed_row(record) for record in records.values() if is_speed(record)],
        "Training": _training_rows(training or {}),
    }


def _link(base: str | None, revision: str | None) -> str | None:
    return base and f"[{base}](https://huggingface.co/{base}" + (f"/tree/{revision})" if revision else ")")


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.2f}"


def accuracy_rows(records: Mapping[str, dict]) -> list[list]:
    """A row of `ACCURACY` for each record of accuracy, from many tokens to few. Marked are those whose cuts are not
    what this release makes at their settings."""
    accuracy = list(_sorted(records).values())
    unpruned = {(record["level"], record["data"]): record for record in accuracy if record["method"] == "none"}
    rows = []
    for record in accuracy:
        tokens = record["tokens"]
        relative = record.get("relative_accuracy")
        if stock := unpruned.get((record["level"], record["data"])):
            with suppress(ValueError):  # where the unpruned model has none of a kind right, there is no ratio
                relative = relative_accuracy(record, stock)
        cuts = (arrows(tokens["after_cuts"]) or "no cut") + (f" {MARK}" if is_marked(record) else "")
        ratio, mean = f"{record['ratio']:.4g}", f"{tokens['mean']:g} of {tokens['image']}"
        shown = percent(record["accuracy"]), percent(relative)
        rows.append([record["level"], record["name"], record["seed"], ratio, mean, cuts, record["n"], *shown])
    return rows


def _versions(records: Iterable[Mapping]) -> str:
    return " and ".join(sorted({f"transformers {record['versions']['transformers']}" for record in records}))


def _speed_row(record: Mapping) -> list:
    settings = ", ".join(f"{name} {value}" for name, value in {**record["settings"], **record["versions"]}.items())
    speeds = [MISSING if record[name] is None else f"{record[name]:g}" for name in SPEEDS]
    return [f"{record['ratio']:.4g}" + (f" {MARK}" if is_marked(record) else ""), record["device"], settings, *speeds]


def _training_rows(training: Mapping) -> list[list]:
    rows = [(name, training[name]) for name in SETTINGS if training.get(name) is not None]
    rows += [(name, training["metrics"][name]) for name in COST if name in training.get("metrics", {})]
    shown = [(name, ", ".join(f"{x:.4g}" for x in value) if isinstance(value, list) else value) for name, value in rows]
    return [[name.replace("_", " "), value] for name, value in shown]


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


def _entry(record: Mapping) -> EvalResultEntry:
    notes = f"exact match at {_what(record)}, seed {record['seed']}, {record['n']} questions"
    return EvalResultEntry(dataset_id=DATA_SET, task_id=record["level"], value=record["accuracy"], notes=notes)


def _entries(own: Mapping[str, dict]) -> dict[str, list[EvalResultEntry]]:
    levels = defaultdict(list)
    for record in own.values():
        levels[record["level"]].append(_entry(record))
    return levels
