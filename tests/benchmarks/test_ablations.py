"""The study of the parts: what is asked, that it goes on where it was, and that its tables hold what was recorded."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import ablations
import asked
from asked import SEEDS, Asked, Training, unpruned
from claims import claimed
from new_base import save_base

MARKS = "\n".join(f"<!-- {name} -->\n<!-- /{name} -->" for name in (*ablations.TABLES, "log", "cost"))


@pytest.fixture
def base(tmp_path, monkeypatch):
    save_base(tmp_path / "base")
    monkeypatch.setattr(asked, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(ablations, "SEEDS", (0, 1))
    quick = "--max_steps 1 --per_device_train_batch_size 1"
    short = Training("short", (*quick.split(), "--save_strategy", "no", "--use_cpu", "true"))
    rows = [
        Asked("random", "random", 64, seeds=(0, 1)),
        Asked("learnpruner", "learnpruner", 64, short, seeds=(0, 1)),
        Asked("k = 2", "learnpruner", 64, short, {"pruner_layer": 2}, seeds=(0, 1)),
        Asked("random weights", "learnpruner", 64, None, {"pruner_trained": True}, seeds=(0, 1)),
        Asked("shuffled", "learnpruner", 64, Training("shuffled", shuffles=short), seeds=(0, 1)),
    ]
    monkeypatch.setattr(asked, "DEFAULT", short)
    monkeypatch.setattr(asked, "SEEDS", (0, 1))
    monkeypatch.setattr(ablations, "TABLES", {"budgets": rows})
    monkeypatch.setattr(ablations, "DEFAULT", short)
    make = ablations.scenes.main
    monkeypatch.setattr(ablations.scenes, "main", lambda given: make([*given, "--questions", "8", "--held-out", "4"]))
    return tmp_path / "base"


def test_study(base, tmp_path, capsys):
    common = ["--base", str(base), "--limit", "4"]
    assert ablations.main([*common, "--runs", str(tmp_path / "runs")]) == 0
    folder = tmp_path / "results" / "ablations"
    results = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    names = [("random", ""), ("learnpruner-short", ""), ("learnpruner-short", "-pruner_layer=2")]
    names += [("learnpruner", "-pruner_trained=True"), ("learnpruner-shuffled", "")]
    assert set(results) == {"standard-none"} | {f"{name}-64-{seed}{of}" for name, of in names for seed in (0, 1)}
    assert results["learnpruner-64-0-pruner_trained=True"]["fields"]["pruner_trained"] is True
    pruners = [results[f"learnpruner-{name}"]["pruner_sha256"] for name in ("short-64-0", "shuffled-64-0")]
    assert len({*pruners, results["learnpruner-shuffled-64-1"]["pruner_sha256"]}) == 3
    assert results["learnpruner-short-64-0-pruner_layer=2"]["fields"]["pruner_layer"] == 2
    assert results["learnpruner-short-64-0"]["pruner_sha256"] != results["learnpruner-short-64-1"]["pruner_sha256"]
    assert (
        results["learnpruner-short-64-0"]["pruner_sha256"]
        == results["learnpruner-short-64-0-pruner_layer=2"]["pruner_sha256"]
    )
    of_base = {"standard-none", "random-64-0", "random-64-1"}
    assert {name for name, result in results.items() if not result["pruner_trained"]} == of_base
    record = json.loads((folder / "trainings" / "short-1.json").read_text())
    assert (record["seed"], record["steps"], record["samples"]) == (1, 1, 8)

    # What is there is not done again, but where it has no answers.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    (folder / "random-64-1.json").unlink()
    del results["random-64-0"]["answers"]
    (folder / "random-64-0.json").write_text(json.dumps(results["random-64-0"]))
    assert ablations.main([*common, "--runs", str(tmp_path / "runs")]) == 0
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    changed = {path.name for path in after if after[path] != before[path]}
    assert changed == {"random-64-0.json", "random-64-1.json"}
    assert json.loads((folder / "random-64-0.json").read_text())["answers"]["scene"] == [0, 0, 0, 0]

    whole_file = unpruned(asked.STANDARD).file(0)
    page = tmp_path / "page.md"
    page.write_text(MARKS)
    # An untrained model has nothing right of some kinds, and nothing can be relative to that.
    whole = json.loads(whole_file.read_text())
    for kind in whole["by_kind"].values():
        kind["accuracy"] = 0.5
    whole_file.write_text(json.dumps(whole))
    plot = tmp_path / "plot.png"
    assert ablations.main(["--into", str(page), "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| standard")]
    assert [row[1] for row in rows] == ["none", "random", "learnpruner", "k = 2", "random weights", "shuffled"]
    assert [row[4] for row in rows] == ["1", "2", "2", "2", "2", "2"]
    assert rows[2][6] == "reference"
    assert [row[6].count("to") for row in rows] == [0, 1, 0, 1, 1, 1]
    assert "| short | 2 | 8 | 1 | 67,330 |" in page.read_text()
    whole_file.write_text("{}")
    assert ablations.main(["--into", str(page)]) == 2
    assert "standard-none.json" in capsys.readouterr().err


def test_a_claim_is_one_processes_and_ends_with_it(tmp_path):
    with claimed(tmp_path / "x") as mine, claimed(tmp_path / "x") as theirs:
        assert mine
        assert not theirs
    with claimed(tmp_path / "x") as mine:
        assert mine


def test_a_row_is_asked_as_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(asked, "RESULTS", tmp_path)
    commands = []

    def main(command):
        commands.append(dict(zip(command[::2], command[1::2], strict=True)))
        Path(commands[-1]["--output"]).write_text("{}")
        return 0

    monkeypatch.setattr(ablations.accuracy, "main", main)
    seven = asked.Scenes("hard", 7)
    rows = [
        Asked("divprune, then stage 2", "composed", 16, fields={"first": "divprune"}, scenes=seven),
        Asked("random weights", "learnpruner", 8, fields={"pruner_trained": True}),
        Asked("stage 2 alone", "stage_2", cap=18),
        unpruned(seven),
    ]
    for row in rows:
        ablations.ask(row, 3, Path("model"), 12)
        assert row.file(3).read_text() == "{}"
    composed, random, capped, whole = commands
    assert {"--level": "hard", "--scene-seed": "7", "--ratio": "16/576", "--seed": "3"}.items() <= composed.items()
    assert (composed["--set"], random["--set"]) == ('first="divprune"', "pruner_trained=true")
    assert "--scene-seed" not in random
    assert (capped["--accounting"], capped["--ratio"]) == ("cap", "18/576")
    assert whole["--method"] == "none"
    assert "--ratio" not in whole


def test_what_differs_has_a_file_of_its_own():
    rows = [row for table in ablations.TABLES.values() for row in table]
    default = [row for row in rows if row.file(0) == ablations.BOTH.file(0)]
    # The default setting stands in most tables, and is asked once.
    assert {row.label for row in default} == {"learnpruner", "diversity 10", "R1:R2 = 3", "k = 3"}
    others = {replace(row, label="") for row in rows if row not in default}
    assert len({(row.file(seed), seed) for row in rows for seed in row.seeds}) == 3 + sum(
        len(row.seeds) for row in {str(row): row for row in others}.values()
    )


def test_the_default_is_the_configurations():
    """What is left out of a file's name is what the small model would do by itself."""
    model = ablations.accuracy.LearnPrunerForConditionalGeneration.from_pretrained(ablations.EASY_VQA / "tiny-llava")
    assert {name: getattr(model.config, name) for name in asked.FIELDS} == asked.FIELDS


def test_the_page_shows_what_was_recorded():
    page = (ablations.HERE / "training" / "RESULTS.md").read_text()
    tables = {**ablations.tables(), "log": ablations.log_table(), "cost": ablations.cost_table()}
    for name, table in tables.items():
        assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in page, name


def test_how_steady_trainings_were(tmp_path, monkeypatch):
    monkeypatch.setattr(asked, "RESULTS", tmp_path)
    for seed, norms in enumerate(((0.5, 30.0), (2e7, 1.0))):
        log = [
            {"grad_norm": norm, "loss": norm / 10, "keep_rate": 0.1 + number, "gate_entropy": number}
            for number, norm in enumerate(norms)
        ]
        path = ablations.training_record(ablations.PAPER, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"log": [*log, {"step": 20, "train_runtime": 1.0}]}))
    rows = [line.split(" | ") for line in ablations.log_table().splitlines()[2:]]
    assert rows == [["| paper", "2", "2e+07", "2e+06", "0.10 to 1.10", "1.00 to 1.00 |"]]


@pytest.fixture(scope="module")
def recorded():
    """RelAcc of each run at each budget, by method."""
    groups = ablations.groups_of(ablations.TABLES["budgets"])
    return {(name, round(mean)): [run["relative_accuracy"] for run in runs] for (_, name, mean), runs in groups.items()}


@pytest.mark.parametrize(("tokens", "least"), [(128, 0.99), (64, 0.98), (32, 0.95)])
def test_a_trained_pruner_keeps_the_answers(tokens, least, recorded):
    runs = recorded["learnpruner", tokens]
    assert len(runs) == len(SEEDS)
    assert min(runs) >= least


@pytest.mark.parametrize("method", ["random", "uniform", "cls_attention"])
def test_it_is_above_what_needs_no_training(method, recorded):
    """At the smaller budgets by more than any seed; at 128 tokens not below."""
    for tokens in (64, 32):
        assert min(recorded["learnpruner", tokens]) > max(recorded[method, tokens])
    ours, theirs = recorded["learnpruner", 128], recorded[method, 128]
    assert sum(ours) / len(ours) >= sum(theirs) / len(theirs)


def test_stage_1_sees_more_of_the_objects_than_cls_attention():
    """At equal counts: the whole budget in one cut."""
    (theirs,) = Asked("", "cls_attention", 32).records()
    ours = asked.learned("", method="stage_1", tokens=32).records()
    assert len(ours) == len(SEEDS)
    for run in ours:
        assert run["tokens"]["foreground_recall"][0] > theirs["tokens"]["foreground_recall"][0]
