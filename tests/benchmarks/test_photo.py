"""The photo study: what is asked, that it goes on where it was, what its table says; and when the bench may judge."""

import json
import random
from dataclasses import replace

import pytest

import photo
import photo_conditions
from photo import CONDITIONS, UNPRUNED, Asked
from recorded import accuracy_record

LEVEL = "photo-a-0"
KINDS = ("cell", "presence")
SCENES = [scene for scene in range(100) for _ in range(4)]


def record_of(asked, seed, share):
    """A run that has so many questions right, the same ones first; half of them of each kind."""
    rng = random.Random(7)
    rank = [rng.random() for _ in SCENES]
    right = [value < share for value in rank]
    given = ["cow" if hit else "pig" for hit in right]
    answers = {"scene": SCENES, "expected": ["cow"] * len(SCENES), "given": given}
    exact = sum(right) / len(right)
    kinds = dict.fromkeys(KINDS, exact)
    cuts = [] if asked.method == "none" else [asked.tokens]
    made = accuracy_record(asked.method, "b", None, exact, kinds, cuts, asked.tokens, asked.tokens / 576, LEVEL)
    by_kind = {kind: {"accuracy": exact, "n": 200} for kind in KINDS}
    made |= {"name": asked.label, "seed": seed, "n": 400, "by_kind": by_kind, "answers": answers}
    return made | {"pixels_sha256": "f" * 64, "base_sha256": "b" * 64}


def shares(asked):
    """A bench that meets every condition."""
    if asked.other:
        return 0.25
    if asked.method in ("none", "oracle_boxes") or asked.pruner == photo.LABELS:
        return 0.9
    return 0.7 if asked.tokens == 64 else 0.5


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(photo, "RESULTS", tmp_path)
    monkeypatch.setattr(photo_conditions, "RESULTS", tmp_path)
    return tmp_path


def write(results, changed=None):
    for asked in CONDITIONS:
        for seed in asked.seeds:
            path = asked.file(LEVEL, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            share = (changed or {}).get((asked.label, asked.tokens), shares(asked))
            path.write_text(json.dumps(record_of(asked, seed, share)))
    without = {kind: {"majority": 0.3, "commonest": 0.5 if kind == "cell" else None} for kind in KINDS}
    (results / LEVEL / "baselines.json").write_text(json.dumps(without))


def test_every_row_has_a_file_of_its_own():
    for level, (_, rows) in photo.PARTS.items():
        files = [asked.file(level, seed) for asked in rows for seed in asked.seeds]
        assert len(files) == len(set(files)), level


def test_a_bench_that_may_judge(results):
    write(results)
    found = photo_conditions.judge(LEVEL)
    assert [one.name for one in found if not one.met] == []
    assert len(found) == 1 + 1 + len(KINDS) + 2 + 1 + 4
    assert photo_conditions.table(LEVEL).count("| yes |") == len(found)


@pytest.mark.parametrize(
    ("label", "tokens", "share", "named"),
    [
        ("unpruned", 576, 0.7, "unpruned, right"),
        ("unpruned", 576, 0.6, "cell: 15 points"),
        ("unpruned, another picture", 576, 0.4, "with another picture"),
        ("random", 64, 0.85, "random at 64"),
        ("random", 16, 0.7, "random at 16"),
        ("oracle: boxes of what is asked", 32, 0.8, "boxes of what is asked"),
        ("divprune", 32, 0.9, "patch labels, top-k at 32"),
        ("random weights, diversity .1", 16, 0.9, "patch labels, diversity .1 at 16"),
        ("training-free first cut", 16, 0.95, "patch labels, top-k at 16"),
    ],
)
def test_what_the_bench_must_show(results, label, tokens, share, named):
    """Each condition fails where its numbers do."""
    write(results, {(label, tokens): share})
    failed = [one.name for one in photo_conditions.judge(LEVEL) if not one.met]
    assert any(name.startswith(named) for name in failed), failed


def test_a_verdict_needs_every_record(results):
    write(results)
    next(asked for asked in CONDITIONS if asked.method == "divprune").file(LEVEL, 0).unlink()
    with pytest.raises(ValueError, match="divprune at 32 was not measured"):
        photo_conditions.judge(LEVEL)


def test_the_study_goes_on(results, tmp_path, monkeypatch):
    rows = [UNPRUNED, Asked("random", "random", 32, seeds=(0, 1)), Asked("labels", "stage_1", 32, pruner=photo.LABELS)]
    monkeypatch.setattr(photo, "PARTS", {"trials": ("validation", rows)})
    trained, asked = [], []

    def ask(command):
        values = dict(zip(command[::2], command[1::2]))
        asked.append((values["--model"], values["--method"], values.get("--ratio"), values["--seed"]))
        with open(values["--output"], "w") as file:
            json.dump(record_of(replace(UNPRUNED, label=values["--name"]), int(values["--seed"]), 0.5), file)
        return 0

    monkeypatch.setattr(photo.accuracy, "main", ask)
    monkeypatch.setattr(photo, "train", lambda training, seed, *_: trained.append((training.name, seed)) or "pruner")
    arguments = ["--base", "base", "--features", str(tmp_path), "--rows", "rows", "--only", "trials"]
    arguments += ["--runs", str(tmp_path / "runs")]
    assert photo.main(arguments) == 0
    assert trained == [("labels", 0)]
    assert asked == [
        ("base", "none", None, "0"),
        ("base", "random", "32/576", "0"),
        ("base", "random", "32/576", "1"),
        ("pruner", "stage_1", "32/576", "0"),
    ]
    rows[1].file("photo-validation-0", 1).unlink()
    assert photo.main(arguments) == 0
    assert asked[4:] == [("base", "random", "32/576", "1")]
    page = tmp_path / "page.md"
    page.write_text("<!-- trials -->\n<!-- /trials -->\n")
    assert photo.main(["--only", "trials", "--into", str(page)]) == 0
    assert "| 32 | random |" in page.read_text()


def test_the_table_shows_paired_differences(results):
    write(results)
    text = photo.table("conditions", 0)
    (row,) = (line for line in text.splitlines() if line.startswith("| 16 | random |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    whole, pruned = (record_of(UNPRUNED, 0, share)["accuracy"] for share in (0.9, 0.5))
    assert cells[3] == "3"
    assert cells[-1].startswith(f"{100 * (pruned - whole):+.1f} (")
    next(asked for asked in CONDITIONS if asked.method == "hawk").file(LEVEL, 0).unlink()
    assert "Not measured: hawk at 32." in photo.table("conditions", 0)
