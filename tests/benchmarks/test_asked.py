"""Rows of the accuracy tables: where their records are, what they are set against, what is missing."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.hub_cards.records import weights_digest

import ablations
import asked
from asked import Asked, Run, Scenes, difference, learned, missing, reference, unpruned
from paired import paired_interval
from recorded import accuracy_record
from shuffled_pruner import shuffle_pruner


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(asked, "RESULTS", tmp_path)
    return tmp_path


def write(row, seed=0, right=None, scenes=100, **changes):
    """A record of four questions a scene; `right(number)` says which are answered."""
    made = accuracy_record(row.method, "b", "p" if row.training else None, 0.5, {"color": 0.5}, [2], 2.0, 0.1)
    made |= {"seed": seed, "level": row.scenes.level, "pixels_sha256": "e" * 64, **changes}
    if right:
        numbers = range(4 * scenes)
        given = ["two" if right(number) else "red" for number in numbers]
        made["answers"] = {"scene": [n // 4 for n in numbers], "expected": ["two" for _ in numbers], "given": given}
    row.file(seed).parent.mkdir(exist_ok=True)
    row.file(seed).write_text(json.dumps(made))
    return made


def test_files_say_what_was_asked():
    hard = Scenes("hard")
    for row, name in (
        (Asked("", "divprune", 16), "divprune-16-3.json"),
        (learned("", tokens=8, pruner_diversity=0.0), "learnpruner-default-8-3-pruner_diversity=0.0.json"),
        (learned("", tokens=8, pruner_diversity=0.1), "learnpruner-default-8-3.json"),
        (Asked("", "learnpruner", 8), "learnpruner-8-3.json"),
        (Asked("", "learnpruner", 8, fields={"pruner_trained": True}), "learnpruner-8-3-pruner_trained=True.json"),
        (Asked("", "fastv", 16, cap=16, scenes=hard), "hard-fastv-16-cap-3.json"),
        (Asked("", "composed", 16, fields={"first": "divprune"}), "composed-16-3-first=divprune.json"),
        (Asked("", "hawk", 58, fields={"head_weights": "some/where.json"}), "hawk-58-3-head_weights=where.json"),
        (Asked("", "random", 16, scenes=Scenes("hard", 7)), "hard-7-random-16-3.json"),
        (unpruned(hard), "hard-none.json"),
    ):
        assert row.file(3) == asked.RESULTS / "ablations" / name


def test_a_record_is_found_in_either_folder(results):
    row = Asked("random", "random", 64)
    run = Run("random", "random", 64)
    assert (row.file(0).parent.name, run.file(0).parent.name) == ("ablations", "methods")
    write(run)
    assert row.file(0) == run.file(0) == results / "methods" / "random-64-0.json"
    whole = results / "accuracy" / "hard-none.json"
    whole.parent.mkdir()
    whole.write_text("{}")
    assert unpruned(Scenes("hard")).file(0) == whole


def test_other_scenes_are_a_line():
    """A level and a seed are a key of SCENES: methods and controls are asked there."""
    rows = ablations.TABLES["controls"]
    assert {row.scenes for row in rows} == set(asked.SCENES)
    seven = Scenes("hard", 7)
    assert {row.scenes for row in ablations.controls(16, seven)} == {seven}
    assert (str(seven), str(Scenes("hard")), seven.slug) == ("hard, seed 7", "hard", "hard-7")
    assert Scenes.of({"level": "hard"}) == Scenes("hard")
    assert Scenes.of({"level": "hard", "scene_seed": 7}) == seven


def test_controls_at_every_budget():
    rows = [row for row in ablations.TABLES["controls"] if row.scenes == asked.STANDARD]
    assert {row.tokens for row in rows} == {64, 32, 16, 8}
    of = {row.label: row for row in rows if row.tokens == 16}
    assert len(of) == 7
    assert [label for label, row in of.items() if len(row.seeds) == 5] == [
        "random weights",
        "random weights, diversity 0",
        "shuffled weights",
        "shuffled weights, diversity 0",
    ]
    assert of["untrained"].seeds == (0,)
    assert of["untrained"].training is None
    assert of["untrained"].fields == {}
    assert reference(of["shuffled weights"]).file(2) == of["learnpruner"].file(2)
    assert len({row.file(seed) for row in rows for seed in row.seeds}) == sum(len(row.seeds) for row in rows)


def test_a_row_is_set_against_the_trained_pruner_at_its_budget():
    row, own = Asked("random", "random", 16, seeds=(0, 1)), learned("learnpruner", tokens=16)
    ones = [write(row, seed, lambda number, seed=seed: number % (2 + seed) == 0) for seed in (0, 1)]
    assert difference(row) == "not measured"  # what it is set against is not there
    others = [write(own, seed, lambda number, seed=seed: number % 7 != seed) for seed in own.seeds]
    found = paired_interval(ones, others)
    low, high = (f"{100 * value:.1f}" for value in (found.low, found.high))
    assert found.low < found.high < 0
    assert difference(row) == f"{100 * found.difference:.1f} ({low} to {high})"
    assert difference(own) == difference(replace(own, label="k = 3")) == "reference"
    # Nothing at another budget, nor on other scenes.
    assert difference(replace(row, tokens=32)) == "not measured"
    assert difference(replace(row, scenes=Scenes("hard"))) == "not measured"
    # LearnPruner is not asked at this one.
    assert difference(Asked("hawk", "hawk", 58)) == difference(unpruned(asked.STANDARD)) == ""
    # No sign of nothing.
    write(row, 0, lambda number: number % 7 != 0)
    write(replace(row, seeds=(0,)), 0, lambda number: number % 7 != 0)
    for seed in own.seeds:
        write(own, seed, lambda number: number % 7 != 0)
    assert difference(replace(row, seeds=(0,))) == "0.0 (0.0 to 0.0)"
    # What was asked about other pixels is no pair, and no cell hides it.
    write(row, 0, lambda number: True, pixels_sha256="f" * 64)
    with pytest.raises(ValueError, match="not asked the same"):
        difference(row)


def test_without_answers_nothing_is_compared():
    row, own = Asked("random", "random", 16), learned("learnpruner", tokens=16)
    for seed in own.seeds:
        write(own, seed, lambda number: True)
    write(row)
    assert difference(row) == "not measured"
    assert not row.is_measured(0)
    assert own.is_measured(0)
    write(row, 0, lambda number: True)
    assert row.is_measured(0)
    assert difference(row) == "0.0 (0.0 to 0.0)"
    write(own, 1)  # one seed of the reference
    assert difference(row) == "not measured"


def test_what_is_missing_is_said_once():
    rows = [Asked("random", "random", tokens, seeds=(0, 1)) for tokens in (64, 32)]
    rows += [Asked(name, name, 32, scenes=Scenes("hard", 7)) for name in ("divprune", "pool")]
    assert missing(rows) == (
        "Not measured on standard scenes at 64, 32: random. Not measured on hard, seed 7 scenes at 32: divprune; pool."
    )
    write(rows[0], 0)
    assert missing(rows) == (
        "Not measured on standard scenes at 64: random (seed 1). Not measured on standard scenes at 32: random. "
        "Not measured on hard, seed 7 scenes at 32: divprune; pool."
    )
    for row in rows:
        for seed in row.seeds:
            write(row, seed)
    assert missing(rows) == ""


def test_shuffled_weights(tmp_path):
    """The same values in another order, by the seed, in a folder that opens as the trained one does."""
    trained = ablations.EASY_VQA / "learnpruner-tiny-llava"
    copy = tmp_path / "learnpruner-tiny-llava"
    for source in (trained, ablations.EASY_VQA / "tiny-llava"):
        (tmp_path / source.name).mkdir()
        for file in source.glob("*.*"):
            (tmp_path / source.name / file.name).symlink_to(file)
    folders = [shuffle_pruner(copy, seed, tmp_path / f"shuffled-{seed}") for seed in (0, 1)]
    again = shuffle_pruner(copy, 0, tmp_path / "again")
    before = load_file(trained / "model.safetensors")
    found = [load_file(folder / "model.safetensors") for folder in (*folders, again)]
    for name, tensor in before.items():
        for other in found:
            assert torch.equal(other[name].flatten().sort().values, tensor.flatten().sort().values)
        assert torch.equal(found[0][name], found[2][name])
        if tensor.numel() > 2:
            assert not torch.equal(found[0][name], tensor)
            assert not torch.equal(found[0][name], found[1][name])
    model = LearnPrunerForConditionalGeneration.from_pretrained(folders[0])
    assert model.config.pruner_trained
    whole = LearnPrunerForConditionalGeneration.from_pretrained(trained)
    assert weights_digest(model) == weights_digest(whole)
    assert weights_digest(model, pruner=True) != weights_digest(whole, pruner=True)
    assert not (folders[0] / "training.json").exists()
    with pytest.raises(ValueError, match="beside"):
        shuffle_pruner(copy, 0, tmp_path / "other" / "shuffled")
    with pytest.raises(ValueError, match="a pruner alone"):
        shuffle_pruner(tmp_path / "tiny-llava", 0, tmp_path / "x")
