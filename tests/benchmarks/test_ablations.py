"""The study of the parts: what is asked, that it goes on where it was, and that its tables hold what was recorded."""

import json
from dataclasses import replace

import pytest
import torch

import ablations
import tiny_llava

MARKS = "\n".join(f"<!-- {name} -->\n<!-- /{name} -->" for name in (*ablations.TABLES, "cost"))


@pytest.fixture
def base(tmp_path, monkeypatch):
    torch.manual_seed(0)
    processor = tiny_llava.build_processor()
    tiny_llava.build_model(processor).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(ablations, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(ablations, "SEEDS", (0, 1))
    quick = "--max_steps 1 --per_device_train_batch_size 1"
    short = ablations.Training("short", (*quick.split(), "--save_strategy", "no", "--use_cpu", "true"))
    rows = [
        ablations.Asked("random", "random", 64),
        ablations.learned("learnpruner", short, tokens=64),
        ablations.learned("k = 2", short, tokens=64, pruner_layer=2),
    ]
    monkeypatch.setattr(ablations, "TABLES", {"budgets": rows})
    monkeypatch.setattr(ablations, "DEFAULT", short)
    make = ablations.scenes.main
    monkeypatch.setattr(ablations.scenes, "main", lambda given: make([*given, "--questions", "8", "--held-out", "4"]))
    return tmp_path / "base"


def test_study(base, tmp_path, capsys):
    common = ["--base", str(base), "--limit", "4"]
    assert ablations.main([*common, "--runs", str(tmp_path / "runs")]) == 0
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")}
    assert set(results) == {
        f"{name[0]}-64-{seed}{name[1]}"
        for name in (("random", ""), ("learnpruner-short", ""), ("learnpruner-short", "-pruner_layer=2"))
        for seed in (0, 1)
    }
    assert results["learnpruner-short-64-0-pruner_layer=2"]["fields"]["pruner_layer"] == 2
    assert results["learnpruner-short-64-0"]["pruner_sha256"] != results["learnpruner-short-64-1"]["pruner_sha256"]
    assert (
        results["learnpruner-short-64-0"]["pruner_sha256"]
        == results["learnpruner-short-64-0-pruner_layer=2"]["pruner_sha256"]
    )
    assert all(result["pruner_trained"] for name, result in results.items() if "random" not in name)
    record = json.loads((tmp_path / "results" / "trainings" / "short-1.json").read_text())
    assert (record["seed"], record["steps"], record["samples"]) == (1, 1, 8)

    # What is there is not done again.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*.json")}
    (tmp_path / "results" / "random-64-1.json").unlink()
    assert ablations.main([*common, "--runs", str(tmp_path / "runs")]) == 0
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*.json")}
    assert {path.name for path in after if after[path] != before[path]} == {"random-64-1.json"}

    unpruned = tmp_path / "unpruned.json"
    assert (
        ablations.accuracy.main([*common[2:], "--model", str(base), "--method", "none", "--output", str(unpruned)]) == 0
    )
    page = tmp_path / "page.md"
    page.write_text(MARKS)
    # An untrained model has nothing right of some kinds, and nothing can be relative to that.
    whole = json.loads(unpruned.read_text())
    for kind in whole["by_kind"].values():
        kind["accuracy"] = 0.5
    unpruned.write_text(json.dumps(whole))
    plot = tmp_path / "plot.png"
    assert ablations.main(["--into", str(page), "--unpruned", str(unpruned), "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| standard")]
    assert [row[1] for row in rows] == ["none", "random", "learnpruner", "k = 2"]
    assert [row[4] for row in rows] == ["1", "2", "2", "2"]
    assert "| short | 2 | 8 | 1 | 67,330 |" in page.read_text()
    assert ablations.main(["--into", str(page), "--unpruned", str(page)]) == 2
    assert "page.md" in capsys.readouterr().err


def test_a_claim_is_one_processes_and_ends_with_it(tmp_path):
    with ablations.claimed(tmp_path / "x") as mine, ablations.claimed(tmp_path / "x") as theirs:
        assert mine
        assert not theirs
    with ablations.claimed(tmp_path / "x") as mine:
        assert mine


def test_what_differs_has_a_file_of_its_own():
    rows = [asked for table in ablations.TABLES.values() for asked in table]
    default = [asked for asked in rows if asked.file(0) == ablations.BOTH.file(0)]
    # The default setting stands in most tables, and is asked once.
    assert {asked.label for asked in default} == {"learnpruner", "diversity 10", "R1:R2 = 3", "k = 3"}
    others = {replace(asked, label="") for asked in rows if asked not in default}
    assert len({(asked.file(seed), seed) for asked in rows for seed in asked.seeds}) == 3 + sum(
        len(asked.seeds) for asked in {str(asked): asked for asked in others}.values()
    )


def test_the_default_is_the_configurations():
    """What is left out of a file's name is what the small model would do by itself."""
    model = ablations.accuracy.LearnPrunerForConditionalGeneration.from_pretrained(ablations.EASY_VQA / "tiny-llava")
    assert {name: getattr(model.config, name) for name in ablations.FIELDS} == ablations.FIELDS


def test_the_page_shows_what_was_recorded():
    page = (ablations.HERE / "training" / "RESULTS.md").read_text()
    unpruned = ablations.accuracy.read_result(ablations.RESULTS.parent / "accuracy" / "standard-none.json")
    for name, table in {**ablations.tables(unpruned), "cost": ablations.cost_table()}.items():
        assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in page, name


@pytest.fixture(scope="module")
def recorded():
    """RelAcc of each run at each budget, by method."""
    unpruned = ablations.accuracy.read_result(ablations.RESULTS.parent / "accuracy" / "standard-none.json")
    groups = ablations.groups_of("budgets", unpruned)
    return {(name, round(mean)): [run["relative_accuracy"] for run in runs] for (_, name, mean), runs in groups.items()}


@pytest.mark.parametrize(("tokens", "least"), [(128, 0.99), (64, 0.98), (32, 0.95)])
def test_a_trained_pruner_keeps_the_answers(tokens, least, recorded):
    runs = recorded["learnpruner", tokens]
    assert len(runs) == len(ablations.SEEDS)
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
    read = ablations.accuracy.read_result
    theirs = read(ablations.RESULTS / "cls_attention-32-0.json")["tokens"]["foreground_recall"][0]
    for seed in ablations.SEEDS:
        assert read(ablations.RESULTS / f"stage_1-default-32-{seed}.json")["tokens"]["foreground_recall"][0] > theirs
