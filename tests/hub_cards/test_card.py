"""The card: every number on it is one of the records, and what was not recorded is said to be missing."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image

import learnpruner
from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.hub_cards.card import write_card
from learnpruner.hub_cards.records import check_recorded_of, read_results, weights_digest

from recorded import records, speed_record, training_record, write

COMMIT = "c" * 40
CODE = {"a_learnpruner.py": "0" * 64, "b_learnpruner.py": "1" * 64}
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "accuracy"
EXAMPLE = Path(__file__).parents[2] / "examples" / "easy_vqa" / "learnpruner-tiny-llava"


@pytest.fixture(scope="module")
def model(base_folder):
    model = LearnPrunerForConditionalGeneration.from_pretrained(base_folder)
    model.config.pruner_trained = True
    return model


def rendered(folder, model, recorded, training=None, base="user/base", merged=False, picture=True):
    folder.mkdir()
    if picture:
        Image.new("RGB", (4, 4)).save(folder / "kept_tokens.png")
    write_card(folder, "user/pruner", model, CODE, recorded, training, base, base and COMMIT, merged, ["a-tag"])
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
    expected = {name: str(record[name]) for name in names}
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
    assert "tested from 5.20 to 5.23" in card.text
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


def test_the_records_of_the_example_are_of_its_weights(tmp_path):
    """The pruner that the project has, with what was measured of it, to the last digit."""
    paths = sorted(RESULTS.glob("standard-*.json"))
    recorded = read_results(paths)
    model = LearnPrunerForConditionalGeneration.from_pretrained(EXAMPLE)
    check_recorded_of(model, recorded)
    card = rendered(tmp_path / "example", model, recorded, json.loads((EXAMPLE / "training.json").read_text()))
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


def test_two_results_of_one_name_are_refused(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name, {"same.json": records("b", "p")["half.json"]})
    with pytest.raises(ValueError, match=r"called same\.json"):
        read_results([tmp_path / name / "same.json" for name in ("one", "two")])
