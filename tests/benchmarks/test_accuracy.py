"""The accuracy benchmark: what each method may keep, what is counted, and what the table says."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from learnpruner.budget_learnpruner import keep_counts
from learnpruner.hub_cards.records import code_digest, read_result
from learnpruner.methods import METHODS

import accuracy
import benches
import render_accuracy
import tiny_qwen2_vl
from new_base import save_base
from scenes import KINDS, scene_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The anatomy of the small model, untrained."""
    folder = tmp_path_factory.mktemp("untrained")
    save_base(folder)
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrained-qwen")
    save_base(folder, tiny_qwen2_vl)
    return folder


def run(folder, tmp_path, *arguments, name="result.json"):
    assert accuracy.main(["--model", str(folder), "--output", str(tmp_path / name), *map(str, arguments)]) == 0
    return json.loads((tmp_path / name).read_text())


BOTH = list(keep_counts(576, 1 / 18, num_layers=8, pruner_layer=3, stage_ratio=3.0))
# The methods of the benchmark's first tables; tests/methods has what all of them keep.
COUNTS = {method: [32] for method in ("random", "uniform", "cls_attention", "oracle_boxes", "stage_1")}
COUNTS |= {"none": [], "learnpruner": BOTH}


@pytest.mark.parametrize("method", COUNTS)
def test_each_method_keeps_its_budget(method, folder, tmp_path, monkeypatch):
    asked = []
    answer_questions = accuracy.answer_questions

    def recorded(*args):
        answers, tokens = answer_questions(*args)
        asked.append((args[2], answers))
        return answers, tokens

    monkeypatch.setattr(accuracy, "answer_questions", recorded)
    ratio = () if method == "none" else ("--ratio", "1/18")
    results = [run(folder, tmp_path, "--method", method, *ratio, "--limit", 10, "--batch-size", n) for n in (4, 10)]
    for result in results:
        assert result["tokens"]["image"] == 576
        assert result["tokens"]["after_cuts"] == COUNTS[method]
        assert result["tokens"]["mean"] == (576 if method == "none" else pytest.approx(32, abs=0.2))
        assert (
            len(result["tokens"]["foreground_recall"]) == len(COUNTS[method]) == len(result["tokens"]["objects_seen"])
        )
        assert result["n"] == 10
        assert set(result["by_kind"]) == set(KINDS)
        assert {"model_revision", "base_sha256", "seed", "versions", "data"} <= set(result)
        assert result["model"] == folder.name
    # The batch makes no difference, and exact match is what a person would count.
    (data, answers), (_, same) = asked
    assert answers == same
    right = [true == answer for true, answer in zip(data["answer"], answers)]
    assert results[0]["accuracy"] == sum(right) / 10
    # So that runs can be compared question by question, on what was asked and by what.
    for result in results:
        assert result["answers"] == {"scene": data["scene"], "expected": data["answer"], "given": answers}
        assert (
            result["pixels_sha256"]
            == hashlib.sha256(b"".join(b"((192, 192), 'RGB')" + image.tobytes() for image in data["image"])).hexdigest()
        )
        assert result["code_sha256"] == code_digest(benches.code_files())
        assert result.get("method_revision") == (None if method == "none" else METHODS[method].revision)


def test_records_are_read_and_old_ones_too(folder, tmp_path):
    result = run(folder, tmp_path, "--method", "random", "--ratio", "1/18", "--limit", 4)
    path = tmp_path / "result.json"
    assert read_result(path) == result
    # Each list is a line of the file, without spaces.
    lines = [line for line in path.read_text().splitlines() if line.startswith('  "scene":')]
    assert lines == ['  "scene": [0,0,0,0],']
    assert list(result["answers"]) == ["scene", "expected", "given"]
    new = ("answers", "scene_seed", "pixels_sha256", "code_sha256", "method_revision")
    path.write_text(json.dumps({name: value for name, value in result.items() if name not in new}))
    assert not set(new) & read_result(path).keys()
    for field, value in (
        ("answers", {**result["answers"], "scene": [0, 0, 0, 0.5]}),
        ("answers", {**result["answers"], "given": result["answers"]["given"][:3]}),
        ("answers", {**result["answers"], "given": "four"}),
        ("answers", {"scene": [0], "expected": ["two"]}),
        ("answers", [{"index": 0, "scene": 0, "expected": "two", "given": "two"}]),
        ("scene_seed", "0"),
        ("pixels_sha256", 5),
        ("code_sha256", ""),
        ("method_revision", 0),
    ):
        path.write_text(json.dumps({**result, field: value}))
        with pytest.raises(ValueError, match=rf"{field} is .*, and should be"):
            read_result(path)


def test_scenes_of_another_seed_and_of_validation(folder, tmp_path, monkeypatch):
    """They are recorded as such, so that no table takes them for the test scenes of seed 0."""
    asked = []

    def made(split, *args, **settings):
        asked.append((split, settings["level"], settings["seed"]))
        return scene_dataset("test", *args, **settings | {"level": "standard"})

    monkeypatch.setattr(benches, "scene_dataset", made)
    first = run(folder, tmp_path, "--method", "none", "--limit", 2)
    other = run(folder, tmp_path, "--method", "none", "--limit", 2, "--scene-seed", 5)
    chosen = run(folder, tmp_path, "--method", "none", "--limit", 2, "--level", "cluttered", "--split", "validation")
    assert asked == [("test", "standard", 0), ("test", "standard", 5), ("validation", "cluttered", 0)]
    assert [result["scene_seed"] for result in (first, other, chosen)] == [0, 5, 0]
    assert [result["level"] for result in (first, other, chosen)] == ["standard", "standard", "cluttered-validation"]
    assert first["pixels_sha256"] != other["pixels_sha256"]


def test_digests_are_of_pixels_and_of_code():
    data = scene_dataset("test", 2, per_scene=2)
    assert benches.pixels_digest(data) != benches.pixels_digest(scene_dataset("test", 2, per_scene=2, seed=1))
    assert benches.pixels_digest(data) == benches.pixels_digest(scene_dataset("test", 2, per_scene=2))
    names = [file.name for file in benches.code_files()]
    assert {"plan_learnpruner.py", "vispruner.py", "accuracy.py", "scenes.py", "grounds.py"} <= set(names)
    assert not any(name.startswith("test") for name in names)


def test_what_is_left_of_the_objects(folder, tmp_path):
    """Boxes first, objects in turn: every object is seen, and of the boxes' patches as many as the budget allows."""
    tokens = run(folder, tmp_path, "--method", "oracle_boxes", "--ratio", "1/18", "--limit", 12)["tokens"]
    assert tokens["objects_seen"] == [1.0]
    shares = []
    for row in scene_dataset("test", 3, per_scene=4):
        centers = [(8 * (token % 24) + 4, 8 * (token // 24) + 4) for token in range(576)]
        inside = sum(any(l <= x < r and t <= y < b for l, t, r, b in row["boxes"]) for x, y in centers)  # noqa: E741
        shares.append(min(1.0, 32 / inside))
    assert tokens["foreground_recall"] == [pytest.approx(sum(shares) / len(shares), abs=0.02)]


def test_a_cap_counts_what_the_last_cut_leaves(folder, tmp_path):
    common = ("--ratio", "1/18", "--accounting", "cap", "--limit", 4)
    tokens = run(folder, tmp_path, "--method", "fastv", "--set", "layer=3", *common)["tokens"]
    assert (tokens["after_cuts"], tokens["cut_layers"]) == ([32], [3])
    assert tokens["mean"] == (3 * 576 + 5 * 32) / 8


def test_an_image_is_encoded_once_for_its_questions(folder):
    model = accuracy.LearnPrunerForConditionalGeneration.from_pretrained(folder).eval()
    tower, inner = model.model.vision_tower, []
    pixels = torch.randn(3, 3, 192, 192)[[0, 0, 1, 2, 2, 0]]
    embeddings = next(module for name, module in tower.named_modules() if name.endswith("embeddings"))
    embeddings.register_forward_pre_hook(lambda module, args: inner.append(len(args[0])))
    with torch.no_grad():
        plain = tower(pixels, output_hidden_states=True)
        with accuracy.each_image_encoded_once(tower):
            shared = tower(pixels, output_hidden_states=True)
        again = tower(pixels, output_hidden_states=True)
    assert inner == [6, 4, 6]
    assert len(plain.hidden_states) == len(shared.hidden_states)
    for one, other in zip(plain.hidden_states, shared.hidden_states):
        assert (one - other).abs().max() < 1e-5
    assert torch.equal(again.last_hidden_state, plain.last_hidden_state)


@torch.no_grad()
def test_an_image_is_encoded_once_on_models_of_native_resolution(qwen):
    tower = accuracy.LearnPrunerForConditionalGeneration.from_pretrained(qwen).eval().get_encoder("image")
    # Three images of 4 x 8 patches, the questions of each side by side.
    pixels = torch.randn(3, 32, 96)[[0, 0, 1, 2, 2, 2]].flatten(0, 1)
    grids, inner = torch.tensor([[1, 4, 8]]).repeat(6, 1), []
    tower.patch_embed.register_forward_pre_hook(lambda module, args: inner.append(len(args[0])))
    plain = tower(pixels, grid_thw=grids)
    with accuracy.each_image_encoded_once(tower):
        shared = tower(pixels, grid_thw=grids)
    assert inner == [6 * 32, 3 * 32]
    for name in ("last_hidden_state", "pooler_output"):
        assert (plain[name] - shared[name]).abs().max() < 1e-5


@pytest.mark.parametrize(("level", "tokens"), [pytest.param("standard", 576, marks=pytest.mark.slow), ("wide", 512)])
def test_models_of_native_resolution(level, tokens, qwen, tmp_path):
    """A ratio is of each image's own tokens, and foreground lies where the image says."""
    for method in ("none", "random", "uniform", "oracle_boxes", "learnpruner"):
        ratio = () if method == "none" else ("--ratio", "1/16")
        common = ("--trust-remote-code", "--level", level, "--method", method, *ratio, "--limit", 5)
        result = run(qwen, tmp_path, *common, "--batch-size", 3)
        assert result["tokens"]["image"] == tokens
        if method != "none":
            assert result["tokens"]["mean"] == pytest.approx(tokens / 16, rel=0.02)
        if method == "oracle_boxes":
            assert result["tokens"]["objects_seen"] == [1.0]
            assert result["tokens"]["foreground_recall"][0] > 0.5


def test_what_a_model_has_not_is_said(qwen, folder, tmp_path, capsys):
    common = ["--limit", "2", "--ratio", "1/16", "--output", str(tmp_path / "x.json")]
    arguments = ["--model", str(qwen), "--trust-remote-code", "--method", "cls_attention", *common]
    assert accuracy.main(arguments) == 2
    assert "[CLS]" in capsys.readouterr().err
    # LLaVA's processor makes a square of everything.
    assert accuracy.main(["--model", str(folder), "--level", "wide", "--method", "random", *common]) == 2
    assert "256 x 128" in capsys.readouterr().err
    # The processor's code is not run unasked.
    assert accuracy.main(["--model", str(qwen), "--method", "random", *common]) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_fields_of_the_pruner_can_be_set(folder, tmp_path):
    common = ("--method", "learnpruner", "--ratio", "1/18", "--limit", 4)
    result = run(folder, tmp_path, *common, "--set", "pruner_layer=2", "--set", "pruner_query=last", "--name", "early")
    assert result["fields"]["pruner_layer"] == 2
    assert result["fields"]["pruner_query"] == "last"
    assert result["name"] == "early"
    assert result["tokens"]["cut_layers"] == [0, 2]
    assert "pruner_trained" not in result["fields"]


def test_the_random_weights_of_a_new_pruner_choose_where_it_is_said_to_be_trained(folder, tmp_path):
    common = ("--method", "learnpruner", "--ratio", "1/18", "--limit", 4)
    free = [run(folder, tmp_path, *common, "--seed", seed) for seed in (0, 1)]
    control = [run(folder, tmp_path, *common, "--seed", seed, "--set", "pruner_trained=true") for seed in (0, 1)]
    kept = [result["tokens"]["foreground_recall"] for result in (*free, *control)]
    assert kept[0] == kept[1]
    assert len({tuple(shares) for shares in kept[1:]}) == 3
    assert [result["pruner_trained"] for result in (*free, *control)] == [False, False, True, True]
    assert [result["fields"].get("pruner_trained") for result in (*free, *control)] == [None, None, True, True]


def test_exact_match_by_kind():
    data = scene_dataset("test", 3, per_scene=4)
    answers = [answer if number % 3 else "nothing" for number, answer in enumerate(data["answer"])]
    result = accuracy.scored(data, answers)
    assert result["accuracy"] == pytest.approx(8 / 12)
    for kind in KINDS:
        rows = [number for number, name in enumerate(data["kind"]) if name == kind]
        wrong = [number for number in rows if number % 3 == 0]
        assert result["by_kind"][kind] == {"accuracy": 1 - len(wrong) / len(rows), "n": len(rows)}


def fake(method, ratio, seed, right, **changes):
    """A result file as the command writes it, with `right` of 10 for each kind in turn."""
    by_kind = {kind: {"accuracy": number / 10, "n": 10} for kind, number in zip(sorted(KINDS), right)}
    result = {
        "method": method,
        "ratio": ratio,
        "name": method,
        "seed": seed,
        "level": "standard",
        "n": 40,
        "by_kind": by_kind,
    }
    result |= {"accuracy": sum(right) / 40, "base_sha256": "a", "data": "d", "versions": {"transformers": "5.23.0"}}
    cuts = [] if method == "none" else [round(576 * ratio)]
    result["pruner_sha256"] = "p" if method == "learnpruner" else None
    tokens = {"image": 576, "after_cuts": cuts, "mean": 576 * ratio, "objects_seen": [0.5] * len(cuts)}
    tokens["foreground_recall"] = [0.25] * len(cuts)
    return result | {"tokens": tokens} | changes


def write(folder, *results):
    paths = [folder / f"{number}.json" for number in range(len(results))]
    for path, result in zip(paths, results):
        path.write_text(json.dumps(result))
    return [str(path) for path in paths]


def test_relative_accuracy_is_a_mean_of_ratios(folder, tmp_path):
    unpruned, pruned = fake("none", 1, 0, (10, 5, 8, 10)), fake("random", 0.1, 0, (5, 5, 4, 0))
    assert accuracy.relative_accuracy(pruned, unpruned) == pytest.approx((0.5 + 1 + 0.5 + 0) / 4)
    for change in ({"base_sha256": "b"}, {"data": "e"}, {"level": "hard"}):
        with pytest.raises(ValueError, match=next(iter(change))):
            accuracy.relative_accuracy(pruned, unpruned | change)


def test_nothing_right_unpruned_is_said(tmp_path):
    with pytest.raises(ValueError, match="not above 0"):
        accuracy.relative_accuracy(fake("random", 0.1, 0, (1,) * 4), fake("none", 1, 0, (1, 0, 1, 1)))


def test_unpruned_file_gives_relative_accuracy(folder, tmp_path, monkeypatch):
    tokens = {"image": 576, "after_cuts": [], "mean": 576}
    monkeypatch.setattr(accuracy, "answer_questions", lambda model, p, data, *rest: (data["answer"], tokens))
    run(folder, tmp_path, "--method", "none", "--limit", 8, name="none.json")
    unpruned = ("--unpruned", tmp_path / "none.json")
    result = run(folder, tmp_path, "--method", "random", "--ratio", 0.2, "--limit", 8, *unpruned)
    assert result["relative_accuracy"] == 1.0


def test_table_and_plot(tmp_path, capsys):
    paths = write(
        tmp_path,
        fake("none", 1, 0, (10, 10, 10, 8)),
        fake("random", 1 / 18, 0, (5, 5, 5, 4)),
        fake("random", 1 / 18, 1, (6, 6, 5, 4)),
        fake("learnpruner", 1 / 18, 0, (9, 9, 9, 8)),
        fake("random", 1 / 18, 0, (5, 5, 5, 4), level="hard"),
        fake("random", 1 / 18, 0, (10, 10, 10, 10), scene_seed=7, data="e"),
    )
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- accuracy -->\nold\n<!-- /accuracy -->\nafter\n")
    assert render_accuracy.main([*paths, "--into", str(page), "--plot", str(tmp_path / "plot.png")]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- accuracy -->\n")
    assert text.endswith("<!-- /accuracy -->\nafter\n")
    assert "old" not in text
    rows = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line.startswith("| ")]
    by_name = {(row[0], row[1]): row for row in rows}
    assert by_name["standard", "none"][2:7] == ["576.0", "none", "1", "95.0", "100.0"]
    assert by_name["standard", "random"][2:7] == ["32.0", "32", "2", "50.0 (47.5-52.5)", "52.5 (50.0-55.0)"]
    assert by_name["standard", "learnpruner"][5:7] == ["87.5", "92.5"]
    assert by_name["standard", "random"][-2:] == ["50.0 (50.0-50.0)", "25.0 (25.0-25.0)"]
    assert "objects seen | boxes kept by cut 1 |" in text
    assert "minus" not in text
    # Other scenes of a level are other rows.
    assert by_name["standard, seed 7", "random"][4:6] == ["1", "100.0"]
    # No unpruned run of the hard scenes was given.
    assert by_name["hard", "random"][6] == "not measured"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    assert render_accuracy.main([*paths, "--into", str(paths[0])]) == 2
    assert "<!-- accuracy -->" in capsys.readouterr().err
    assert (
        render_accuracy.main(
            write(tmp_path, fake("none", 1, 0, (1,) * 4), fake("none", 1, 0, (1,) * 4, base_sha256="b"))
        )
        == 2
    )
    assert "several base models" in capsys.readouterr().err
    for change, says in (({}, "same seed"), ({"seed": 1, "data": "e"}, "questions"), ({"seed": 1}, None)):
        results = fake("random", 0.1, 0, (1,) * 4), fake("random", 0.1, 0, (1,) * 4) | change
        assert render_accuracy.main(write(tmp_path, *results)) == (2 if says else 0)
        assert (says or "") in capsys.readouterr().err
    # Three seeds of one pruner are no spread; three pruners are.
    pruners = [fake("learnpruner", 0.1, seed, (1,) * 4) for seed in range(3)]
    assert render_accuracy.main(write(tmp_path, *pruners)) == 2
    assert "one pruner" in capsys.readouterr().err
    assert render_accuracy.main(write(tmp_path, *[run | {"pruner_sha256": str(run["seed"])} for run in pruners])) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "none", "--ratio", "0.5"], "--ratio"),
        (["--method", "random"], "--ratio"),
        (["--method", "random", "--ratio", "0"], "--ratio"),
        (["--method", "guess", "--ratio", "0.5"], "learnpruner"),
        (["--method", "none", "--level", "easy"], "hard"),
        (["--method", "none", "--limit", "0"], "--limit"),
        (["--method", "none", "--photo", "features", "--scene-seed", "1"], "--scene-seed"),
        (["--method", "none", "--photo", "features", "--split", "validation"], "--split"),
        (["--method", "none", "--set", "pruner_depth=3"], "pruner_layer"),
        (["--method", "none", "--set", "pruner_layer"], "pruner_layer=2"),
    ],
)
def test_bad_arguments(arguments, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        accuracy.main(["--model", "nowhere", "--output", str(tmp_path / "x.json"), *arguments])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_bad_files(folder, tmp_path, capsys):
    (path,) = write(tmp_path, fake("random", 0.1, 0, (1,) * 4))
    output = ["--output", str(tmp_path / "out" / "x.json"), "--method", "none"]
    for arguments, says in (
        (["--model", str(tmp_path / "nowhere")], "nowhere"),
        (["--model", str(folder), "--unpruned", str(tmp_path / "missing.json")], "missing.json"),
        (["--model", str(folder), "--unpruned", str(folder / "config.json")], "it lacks"),
        (["--model", str(folder), "--unpruned", path], "'random'"),
    ):
        assert accuracy.main([*output, *arguments]) == 2
        assert says in capsys.readouterr().err
    assert not Path(output[1]).exists()
    assert render_accuracy.main([str(tmp_path / "missing.json")]) == 2
    assert "missing.json" in capsys.readouterr().err


def test_a_checkpoint_of_another_shape(folder, tmp_path, capsys):
    """Weights that do not fit the configuration are an error, not a model with random weights."""
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 256
    (other / "config.json").write_text(json.dumps(config))
    arguments = ["--model", str(other), "--method", "none", "--limit", "4", "--output", str(tmp_path / "x.json")]
    assert accuracy.main(arguments) == 2
    assert "gate_proj" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
