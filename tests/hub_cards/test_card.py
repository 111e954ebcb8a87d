"""The card: every number on it is one of the records, and what was not recorded is said to be missing."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image

import learnpruner
from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.hub_cards.card import NEWEST_TESTED, OLDEST, check_card, write_card
from learnpruner.hub_cards.checks import check_code
from learnpruner.hub_cards.records import (
    LEARNED,
    check_recorded_of,
    check_training,
    read_results,
    read_training,
    weights_digest,
)

from recorded import digest, records, speed_record, training_record, write
from tiny_models import tiny_pair

COMMIT = "c" * 40
CODE = {"a_learnpruner.py": "0" * 64, "b_learnpruner.py": "1" * 64}
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "accuracy"
EASY_VQA = Path(__file__).parents[2] / "examples" / "easy_vqa"
EXAMPLE = EASY_VQA / "learnpruner-tiny-llava"


@pytest.fixture(scope="module")
def model(base_folder):
    model = LearnPrunerForConditionalGeneration.from_pretrained(base_folder)
    model.config.pruner_trained = True
    return model


def rendered(folder, model, recorded, training=None, base="user/base", merged=False, picture=True, code=CODE):
    folder.mkdir(exist_ok=True)
    if picture:
        Image.new("RGB", (4, 4)).save(folder / "kept_tokens.png")
    write_card(folder, "user/pruner", model, code, recorded, training, base, base and COMMIT, merged, ["a-tag"])
    return ModelCard.load(folder / "README.md")


def section(card, title):
    _, _, after = card.text.partition(f"\n## {title}\n")
    assert after, title
    return after.partition("\n## ")[0]


def table(card, title):
    rows = [line for line in section(card, title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


@pytest.fixture
def full(model, tmp_path):
    recorded = {**records("b", "p"), "speed.json": speed_record("b", "p")}
    return recorded, rendered(tmp_path / "full", model, recorded, training_record("p"))


def test_accuracy(full):
    recorded, card = full
    stock = recorded["none.json"]["by_kind"]
    expected = []
    for name in ("none", "half", "random", "tenth"):  # from many tokens to few
        record = recorded[f"{name}.json"]
        ratios = [kind["accuracy"] / stock[which]["accuracy"] for which, kind in record["by_kind"].items()]
        cuts = " -> ".join(str(count) for count in record["tokens"]["after_cuts"]) or "no cut"
        ratio, mean = (str(value).removesuffix(".0") for value in (record["ratio"], record["tokens"]["mean"]))
        shares = (f"{100 * value:.2f}" for value in (record["accuracy"], sum(ratios) / len(ratios)))
        expected.append(["standard", record["name"], "0", ratio, f"{mean} of 16", cuts, "2000", *shares])
    assert table(card, "Accuracy") == expected


def test_metrics_of_both_kinds(full, tmp_path):
    """The pruner's own, exactly as recorded: the unpruned model's and other methods' are not this repository's."""
    recorded, card = full
    own = {7.5: recorded["half.json"]["accuracy"], 2.0: recorded["tenth.json"]["accuracy"]}
    found = {result.metric_name.split()[3]: result for result in card.data.eval_results}
    assert {float(mean): result.metric_value for mean, result in found.items()} == own
    assert {result.dataset_config for result in found.values()} == {"standard"}
    assert card.data.model_name == "pruner"
    (file,) = (tmp_path / "full" / ".eval_results").iterdir()
    entries = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert [(entry.value, entry.task_id) for entry in entries] == [(value, "standard") for value in own.values()]


def test_the_first_cut_alone_is_in_the_table_and_no_metric_of_the_pruner(model, tmp_path):
    half = records("b", "p")["half.json"]
    alone = {**half, "method": "stage_1", "name": "stage_1", "accuracy": 0.5015}
    card = rendered(tmp_path / "card", model, {"half.json": half, "alone.json": alone})
    assert [result.metric_value for result in card.data.eval_results] == [half["accuracy"]]
    assert "0.5015" not in (tmp_path / "card" / ".eval_results" / "easy-vqa-scenes-standard.yaml").read_text()
    assert [row[1] for row in table(card, "Accuracy")] == ["learnpruner", "stage_1"]


@pytest.mark.parametrize(("ratio", "shown"), [(0.4, "40.0"), (1 / 9, "11.1")])
def test_the_ratio_is_the_configurations(model, tmp_path, monkeypatch, ratio, shown):
    monkeypatch.setattr(model.config, "pruner_ratio", ratio)
    card = rendered(tmp_path / "card", model, {})
    assert f"the model answers from {shown} % of its vision tokens" in card.text


def test_speed(full):
    recorded, card = full
    ((ratio, device, settings, *speeds),) = table(card, "Speed")
    record = recorded["speed.json"]
    names = ("prefill_speedup", "prefill_ceiling", "end_to_end_speedup", "overhead_at_ratio_one")
    assert [float(value) for value in speeds] == [record[name] for name in names]
    assert (float(ratio), device) == (record["ratio"], record["device"])
    for name, value in {**record["settings"], **record["versions"]}.items():
        assert f"{name} {value}" in settings


def test_training(full):
    _, card = full
    record = training_record("p")
    shown = {name.replace(" ", "_"): value for name, value in table(card, "Training")}
    names = ("train_data", "samples", "objective", "steps", "learning_rate", "seed", "device")
    expected = {name: str(record[name]) for name in names} | {"budgets": "0.3333, 0.05"}
    assert shown == expected | {name: str(value) for name, value in record["metrics"].items()}


def test_base_code_picture_and_citation(full):
    _, card = full
    assert (card.data.base_model, card.data.base_model_relation) == ("user/base", "adapter")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "a-tag" in card.data.tags
    assert f"https://huggingface.co/user/base/tree/{COMMIT}" in card.text
    assert table(card, "Code that is executed") == [[f"`{name}`", f"`{digest}`"] for name, digest in CODE.items()]
    assert "](kept_tokens.png)" in section(card, "What is kept")
    load = section(card, "Load it")
    assert "revision=revision, trust_remote_code=True" in load
    assert 'LearnPrunerForConditionalGeneration.from_pretrained("user/pruner", revision=' in load
    for snippet in load.split("```python\n")[1:]:
        compile(snippet.partition("```")[0], "card", "exec")
    oldest, newest = (".".join(map(str, release)) for release in (OLDEST, NEWEST_TESTED))
    assert f"tested from {oldest} to {newest}" in card.text
    assert f"learnpruner {learnpruner.__version__}" in card.text
    assert "OCR" in section(card, "Limits")
    assert "2604.23950" in section(card, "Citation")


def test_what_was_not_recorded_is_said_to_be_missing(model, tmp_path):
    card = rendered(tmp_path / "bare", model, {}, picture=False)
    for title in ("Accuracy", "Speed"):
        assert section(card, title).strip() == "Not measured."
    assert section(card, "Training").strip() == "Not recorded."
    assert section(card, "What is kept").strip() == "No picture was recorded."
    assert card.data.eval_results is None
    assert not (tmp_path / "bare" / ".eval_results").exists()
    # A pruned run without its unpruned one has no RelAcc; a speed that could not be had is none.
    half = {"half.json": records("b", "p")["half.json"]}
    slow = {"speed.json": {**speed_record("b", "p"), "prefill_ceiling": None}}
    card = rendered(tmp_path / "some", model, {**half, **slow})
    assert [row[-2:] for row in table(card, "Accuracy")] == [["97.65", "not measured"]]
    assert [row[3:5] for row in table(card, "Speed")] == [["1.83", "not measured"]]
    # Nor where the unpruned model has none of a kind right.
    none = records("b", "p")["none.json"]
    none["by_kind"]["count"]["accuracy"] = 0.0
    card = rendered(tmp_path / "zero", model, {**half, "none.json": none})
    assert [row[-1] for row in table(card, "Accuracy")] == ["not measured"] * 2
    # Without a base on the Hub, none is named; an untrained pruner is called so.
    model.config.pruner_trained = False
    card = rendered(tmp_path / "merged", model, {}, base=None, merged=True)
    model.config.pruner_trained = True
    assert card.data.base_model is None
    assert "| Base model | not recorded |" in card.text
    assert "has not been trained" in card.text


@pytest.mark.parametrize("name", ["learnpruner-tiny-llava", "learnpruner-tiny-qwen2-vl"])
def test_the_shipped_trainings_are_of_their_weights(name):
    model = LearnPrunerForConditionalGeneration.from_pretrained(EASY_VQA / name)
    training = read_training(EASY_VQA / name / "training.json")
    assert training["pruner_sha256"] == weights_digest(model, pruner=True)
    check_recorded_of(model, {"training.json": training})


def test_the_records_of_the_example_are_of_its_weights(tmp_path):
    """The pruner that the project has, with what was measured of it, to the last digit."""
    paths = sorted(RESULTS.glob("standard-*.json"))
    recorded = read_results(paths)
    model = LearnPrunerForConditionalGeneration.from_pretrained(EXAMPLE)
    training = read_training(EXAMPLE / "training.json")
    check_recorded_of(model, {**recorded, "training.json": training})
    card = rendered(tmp_path / "example", model, recorded, training)
    check_card(tmp_path / "example", recorded, training)
    (own,) = (record for record in recorded.values() if record["method"] == "learnpruner")
    (result,) = card.data.eval_results
    assert result.metric_value == own["accuracy"]
    assert [row[1] for row in table(card, "Accuracy")].count("random") == 3
    assert dict(table(card, "Training"))["steps"] == "120"


def test_records_of_other_settings_are_refused(model):
    record = {**records("b", "p")["half.json"], "base_sha256": weights_digest(model)}
    record["fields"] = {**record["fields"], "pruner_layer": 1}
    with pytest.raises(ValueError, match=r"half\.json: recorded of other weights .*pruner_sha256"):
        check_recorded_of(model, {"half.json": record})
    record["pruner_sha256"] = weights_digest(model, pruner=True)
    with pytest.raises(ValueError, match="pruner_layer=1"):
        check_recorded_of(model, {"half.json": record})


@pytest.mark.parametrize("content", ["", "[]", '{"accuracy": 1}', '{"prefill_speedup": 2}'])
def test_files_that_are_no_results_are_refused(content, tmp_path):
    (tmp_path / "odd.json").write_text(content)
    with pytest.raises(ValueError, match=r"odd\.json is not a result of benchmarks/"):
        read_results([tmp_path / "odd.json"])


def test_a_result_that_a_repository_would_not_find_is_refused(tmp_path):
    (path,) = write(tmp_path, {"half.out": records("b", "p")["half.json"]})
    with pytest.raises(ValueError, match=r"half\.out is not called \.json"):
        read_results([Path(path)])


def test_two_results_of_one_name_are_refused(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name, {"same.json": records("b", "p")["half.json"]})
    with pytest.raises(ValueError, match=r"called same\.json"):
        read_results([tmp_path / name / "same.json" for name in ("one", "two")])


def changed(record, place, value):
    """A copy of a record with another value, or none, at a path of keys."""
    copy = json.loads(json.dumps(record))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    if value is LEFT_OUT:
        del inner[place[-1]]
    return copy


LEFT_OUT = object()
NAN = float("nan")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((("accuracy",), value) for value in (97.65, NAN, -0.1, "0.5", None, True, LEFT_OUT)),
        *((("n",), value) for value in (-2000, 0, 2000.5, None)),
        *((("ratio",), value) for value in (1.2, 0, -1, NAN)),
        *((("level",), value) for value in ("../../x", "", 3, "a|b")),
        *((("tokens",), value) for value in ([], None, {}, LEFT_OUT)),
        *((("tokens", "after_cuts"), value) for value in (4, [1.5], [-1])),
        *((("tokens", "mean"), value) for value in (-1.0, NAN, "4")),
        *((("by_kind",), value) for value in ([], None, {}, {"color": 0.5}, {"color": {"accuracy": 2, "n": 9}})),
        *((("fields",), value) for value in (None, [], {"pruner_layer": [2]})),
        *((("name",), value) for value in ("a | 100.00", "two\nlines", None)),
        *((("versions",), value) for value in (None, {"torch": "2"}, LEFT_OUT)),
        (("relative_accuracy",), NAN),
        (("base_sha256",), 3),
    ],
)
def test_what_cannot_have_been_measured_is_refused(place, value, tmp_path):
    half = records("b", "p")["half.json"]
    half.setdefault("relative_accuracy", 0.5)
    (path,) = write(tmp_path, {"half.json": changed(half, place, value)})
    with pytest.raises(ValueError, match=r"half\.json is not a result of benchmarks/accuracy\.py: ") as error:
        read_results([Path(path)])
    (line,) = str(error.value).splitlines()
    assert place[-1] in line.partition("accuracy.py: ")[2]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((("prefill_speedup",), value) for value in (-1.8, 0, NAN, "2x")),
        *((("overhead_at_ratio_one",), value) for value in (-1.0, LEFT_OUT)),
        *((("settings",), value) for value in ([], None, {"batch_size": [4]})),
        (("device",), None),
        (("ratio",), 47),
    ],
)
def test_speeds_that_cannot_be_are_refused(place, value, tmp_path):
    (path,) = write(tmp_path, {"speed.json": changed(speed_record("b", "p"), place, value)})
    with pytest.raises(ValueError, match=rf"speed\.json is not a result of benchmarks/speed\.py: .*{place[-1]}"):
        read_results([Path(path)])


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((("metrics",), value) for value in (None, [])),
        (("metrics", "seconds"), -1),
        (("steps",), {"many": 1}),
        (("train_data",), "a\nb"),
        (("pruner_sha256",), LEFT_OUT),
    ],
)
def test_trainings_that_cannot_be_are_refused(place, value, tmp_path):
    record = changed(training_record("p"), place, value)
    (path,) = write(tmp_path, {"training.json": record})
    with pytest.raises(ValueError, match=rf"training\.json is not a record of `learnpruner train`: .*{place[-1]}"):
        read_training(Path(path))
    with pytest.raises(ValueError, match=rf"training\.json.*{place[-1]}"):
        check_training(record)


def test_every_record_of_the_project_is_read():
    # Of other commands: trainings, cost and calibrated heads of the methods, lines of code, a proof on a GPU, TRL, and
    # what of the photo bench is right without looking.
    others = ("cost.json", "hawk_weights.json", "bundle_lines.json", "baselines.json")
    paths = [path for path in RESULTS.parent.rglob("*.json") if path.parent.name != "trainings"]
    paths = [path for path in paths if not {RESULTS.parent / "gpu", RESULTS.parent / "trl"} & set(path.parents)]
    paths = [path for path in paths if path.name not in others]
    assert paths
    for path in paths:
        (record,) = read_results([path]).values()
        # A record of speed has no method, and names the pruner that it ran.
        assert (record["pruner_sha256"] is not None) == ("method" not in record or record["method"] in LEARNED)


@pytest.mark.parametrize("missing", [None, LEFT_OUT])
def test_records_that_name_no_weights_are_not_of_these(model, missing):
    digests = weights_digest(model), weights_digest(model, pruner=True)
    recorded = {**records(*digests), "speed.json": speed_record(*digests), "training.json": training_record(digests[1])}
    # The unpruned model's and the random method's have no pruner to name.
    assert recorded["none.json"]["pruner_sha256"] is recorded["random.json"]["pruner_sha256"] is None
    check_recorded_of(model, recorded)
    needs = dict.fromkeys(("half.json", "tenth.json", "speed.json"), ("base_sha256", "pruner_sha256"))
    needs |= dict.fromkeys(("none.json", "random.json"), ("base_sha256",)) | {"training.json": ("pruner_sha256",)}
    for name, fields in needs.items():
        for field in fields:
            with pytest.raises(ValueError, match=rf"{name} does not say of which weights it is \({field}\)"):
                check_recorded_of(model, recorded | {name: changed(recorded[name], (field,), missing)})


def test_a_written_card_is_as_its_records(full, tmp_path):
    recorded, _ = full
    check_card(tmp_path / "full", recorded, training_record("p"))
    # Without metrics and records there is nothing to compare; nor without a card.
    check_card(tmp_path, {}, None)


def in_section(text, title, old, new):
    before, mark, after = text.partition(f"\n## {title}\n")
    assert old in after
    return before + mark + after.replace(old, new, 1)


METRICS = "value: 0.9765"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace(METRICS, "value: 0.9865", 1), r"0\.9865 .*results/half\.json has 0\.9765"),
        (lambda text: text.replace(METRICS, "value: '97.65'", 1), r"97\.65 .*results/half\.json has 0\.9765"),
        (lambda text: text.replace("exact match at 7.5 of", "exact match at 1.5 of", 1), "no record has it"),
        (lambda text: text.replace("model-index:", "model-index: 3\nother:", 1), "cannot be read"),
        (lambda text: text.replace("tags:", "tags: [", 1), "cannot be read"),
        (lambda text: in_section(text, "Accuracy", "97.65", "98.65"), r"Accuracy: no record has the row .*98\.65"),
        (lambda text: in_section(text, "Accuracy", "| 0.47 |", "| 0.12 |"), r"Accuracy: no record .*0\.12"),
        (lambda text: in_section(text, "Speed", "1.83", "3.2"), r"Speed: no record .*3\.2"),
        (lambda text: in_section(text, "Training", "961", "9610"), "Training: no record .*9610"),
        (lambda text: in_section(text, "Training", "961", "9610").replace("\n", "\r\n"), "Training: no record .*9610"),
    ],
)
def test_a_changed_card_is_refused(full, tmp_path, change, message):
    recorded, _ = full
    path = tmp_path / "full" / "README.md"
    text = path.read_text()
    assert change(text) != text
    path.write_bytes(change(text).encode())
    with pytest.raises(ValueError, match=rf"README\.md.*{message}"):
        check_card(tmp_path / "full", recorded, training_record("p"))


def test_a_card_of_another_release_says_which(full, tmp_path):
    (tmp_path / "full" / "config.json").write_text('{"learnpruner_version": "0.0.7"}')
    with pytest.raises(ValueError, match=r"`pip install learnpruner==0\.0\.7` to verify it"):
        check_card(tmp_path / "full", {}, None)


def test_numbers_whose_record_is_gone_are_refused(full, tmp_path):
    recorded, _ = full
    (tmp_path / "full" / "README.md").unlink()
    file = ".eval_results/easy-vqa-scenes-standard.yaml"
    with pytest.raises(ValueError, match=rf"{file} says 0\.8125 .*no record has it"):
        check_card(tmp_path / "full", {"half.json": recorded["half.json"]}, None)
    path = tmp_path / "full" / file
    path.write_text(path.read_text().replace("0.8125", "0.9125"))
    with pytest.raises(ValueError, match=rf"{file} says 0\.9125 .*results/tenth\.json has 0\.8125"):
        check_card(tmp_path / "full", recorded, None)
    path.write_text("- 3\n")
    with pytest.raises(ValueError, match=rf"{file} cannot be read"):
        check_card(tmp_path / "full", recorded, None)
    # What others measured on other data is theirs.
    path.write_text("- dataset:\n    id: other/data\n    task_id: default\n  value: 20.9\n")
    check_card(tmp_path / "full", recorded, None)


def test_a_card_of_qwen(tmp_path):
    """From the checkpoint to the card: code, digests and counts are those of the files beside it."""
    _, model = tiny_pair("qwen2_5_vl")
    folder = tmp_path / "qwen"
    model.save_pretrained(folder)
    digests = weights_digest(model), weights_digest(model, pruner=True)
    recorded = records(*digests)
    card = rendered(folder, model, recorded, code=check_code(folder))
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.py")}
    assert "modeling_learnpruner_qwen2_5_vl.py" in files
    assert table(card, "Code that is executed") == [[f"`{n}`", f"`{digest}`"] for n, digest in sorted(files.items())]
    pruner = {name: value for name, value in model.state_dict().items() if ".pruner." in name}
    assert f"sha256 `{digest(pruner)}`" in card.text
    assert f"A pruner of {sum(value.numel() for value in pruner.values()):,} parameters" in card.text
    check_card(folder, recorded, None)
