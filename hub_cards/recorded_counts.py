# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Whether a record was measured with the cuts that its method makes today at its settings."""

from collections.abc import Iterable, Mapping
from types import SimpleNamespace

from learnpruner.configuration_learnpruner import LearnPrunerLlavaConfig, check_pruner_field
from learnpruner.methods import METHODS, Method

from .records import is_speed

MARK = "†"
# More than any model has. Records come from strangers, too.
MOST_TOKENS, MOST_LAYERS = 10**6, 10**4
# What the places of methods are counted from, where a record does not say it: the defaults.
FIELDS = ("pruner_layer", "pruner_stage_ratio", "pruner_diversity", "pruner_min_tokens", "pruner_query")


def counts_of_today(record: Mapping) -> tuple[int, ...] | None:
    """What today's formula keeps at each cut, from a record's own settings: method, fields, ratio, image.

    Args:
        record (`Mapping`): A result of benchmarks/accuracy.py or benchmarks/speed.py, as [`read_result`] gives it.

    Returns:
        `tuple[int, ...]`, or `None` where the record does not say enough, or something that cannot be.
    """
    cuts = _cuts_of_today(record)
    return None if cuts is None else cuts[1]


def _method_of(record: Mapping) -> str:
    return "learnpruner" if is_speed(record) else record["method"]


def _cuts_of_today(record: Mapping) -> tuple[list[int], tuple[int, ...]] | None:
    """The layers before which today's method cuts, and what [`counts_of_today`] says."""
    method = _method_of(record)
    if method == "none" or record["ratio"] == 1:
        return [], ()
    tokens = record["tokens"]
    depth = _depth(tokens, record.get("fields", {}).get("pruner_layer"))
    if method not in METHODS or depth is None or tokens["image"] > MOST_TOKENS:
        return None
    # Before results had an accounting, stage_2 kept what LearnPruner's second cut keeps.
    of_second_cut = method == "stage_2" and "accounting" not in record
    try:
        model = SimpleNamespace(config=_configuration(record.get("fields", {}), tokens["cut_layers"], depth))
        built = _build(record, "learnpruner" if of_second_cut else method)
        places = built.places(model)
        counts = built.keep_counts(places, depth, tokens["image"])
    except (TypeError, ValueError):
        return None
    start = int(of_second_cut)
    return [place.layer for place in places[start:]], counts[start:]


def _build(record: Mapping, name: str) -> Method:
    """Today's method, with the settings of the record."""
    # The file of HAWK's heads is on the machine that measured; counts do not depend on it.
    settings = {} if is_speed(record) else record.get("settings", {})
    settings = {name: value for name, value in settings.items() if name != "head_weights"}
    return METHODS[name](record["ratio"], accounting=record.get("accounting", "mean"), **settings)


def _configuration(fields: Mapping, layers: list[int], depth: int) -> SimpleNamespace:
    """What methods read of a model's configuration to say where they cut."""
    known = {name: getattr(LearnPrunerLlavaConfig, name) for name in FIELDS}
    known |= {name: value for name, value in fields.items() if name in FIELDS}
    if known["pruner_layer"] is None:  # results of speed do not name the field
        known["pruner_layer"] = layers[-1] if len(layers) == 2 else depth
    for name, value in known.items():
        check_pruner_field(name, value, depth)
    return SimpleNamespace(text_config=SimpleNamespace(num_hidden_layers=depth, num_attention_heads=1), **known)


def _depth(tokens: Mapping, pruner_layer) -> int | None:
    """Layers of the decoder, for which the recorded mean is that of the recorded counts."""
    counts, layers = tokens["after_cuts"], tokens.get("cut_layers")
    if not counts or not isinstance(layers, list) or len(layers) != len(counts):
        return None
    if not all(type(layer) is int and layer >= 0 for layer in layers) or sorted(set(layers)) != layers:
        return None
    # Of the layers before the last cut, the rows that are more than the last cut's.
    seen = (tokens["image"], *counts)
    more = sum((end - start) * (count - seen[-1]) for start, end, count in zip((0, *layers), layers, seen))
    if more == 0:
        # Every layer sees as many: any depth has this mean, and the shortest that can be stands for all.
        return max(layers[-1] + 1, pruner_layer if type(pruner_layer) is int else 1)
    share = tokens["mean"] - counts[-1]
    depth = round(more / share) if share > 0 and more / share <= MOST_LAYERS else 0
    return depth if depth > layers[-1] and abs(more / share - depth) < 1e-3 else None


def _has_other_counts(record: Mapping) -> bool:
    today = counts_of_today(record)
    return today is not None and list(today) != record["tokens"]["after_cuts"]


def _has_other_layers(record: Mapping) -> bool:
    today = _cuts_of_today(record)
    return bool(today) and record["tokens"]["after_cuts"] != [] and today[0] != record["tokens"]["cut_layers"]


def _revisions(record: Mapping) -> tuple[int, int]:
    """Of the method: when it was measured, and today's. Records that do not say it are of the first; so are both where
    today's method does not take the record's settings."""
    method = _method_of(record)
    if method not in METHODS or not record["tokens"]["after_cuts"]:
        return 1, 1
    try:
        return record.get("method_revision", 1), _build(record, method).revision
    except (TypeError, ValueError):
        return 1, 1


def is_marked(record: Mapping) -> bool:
    """Whether the record's method makes other cuts today, at the record's settings: of other counts, before other
    layers, or by another selection."""
    measured, today = _revisions(record)
    return measured != today or _has_other_counts(record) or _has_other_layers(record)


def arrows(counts: Iterable[int]) -> str:
    return " -> ".join(map(str, counts))


def note(records: Iterable[Mapping]) -> str:
    """The sentences that explain the mark, below a table; empty where no record has it."""
    marked, sentences = [record for record in records if is_marked(record)], []
    if counted := list(filter(_has_other_counts, marked)):
        versions = sorted({record["versions"].get("learnpruner", "an unknown version") for record in counted})
        changes = {
            f"{arrows(counts_of_today(record))} of {record['tokens']['image']} in place of "
            f"{arrows(record['tokens']['after_cuts'])}"
            for record in counted
        }
        sentences.append(
            f"Measured with the counts of learnpruner {' and '.join(versions)}. Today's formula keeps "
            f"{'; '.join(sorted(changes))}."
        )
    others = {
        f"{_method_of(record)} was measured with cuts before the layers {record['tokens']['cut_layers']}, and cuts "
        f"before {_cuts_of_today(record)[0]} today."
        for record in filter(_has_other_layers, marked)
    }
    for record in marked:
        measured, today = _revisions(record)
        if measured != today:
            others.add(f"Revision {measured} of {_method_of(record)} selected other tokens than today's, {today}.")
    return " ".join([MARK, *sentences, *sorted(others)]) if marked else ""
