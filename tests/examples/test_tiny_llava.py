"""The shipped model: it opens without us, it sees, and the recorded results are its own and are what the page says."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from learnpruner import LearnPrunerForConditionalGeneration

import accuracy
import render_accuracy
from scenes import scene_dataset

HERE = Path(__file__).parents[2]
FOLDER = HERE / "examples" / "easy_vqa" / "tiny-llava"
RESULTS = HERE / "benchmarks" / "results"


def test_it_opens_with_transformers_alone():
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert "auto_map" not in config
    assert not list(FOLDER.glob("*.py"))
    assert (FOLDER / "model.safetensors").stat().st_size <= 12_000_000
    model, info = AutoModelForImageTextToText.from_pretrained(FOLDER, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float32
    assert model.config.text_config.num_hidden_layers >= 8
    assert type(AutoProcessor.from_pretrained(FOLDER)).__name__ == "LlavaProcessor"


@pytest.mark.parametrize(("level", "least"), [("standard", 0.9), ("hard", 0.8)])
def test_it_answers(level, least):
    """A sample of the benchmark, asked of the stock class; the bars themselves are on the recorded 2,000 questions."""
    model = AutoModelForImageTextToText.from_pretrained(FOLDER).eval()
    processor = AutoProcessor.from_pretrained(FOLDER)
    data = scene_dataset("test", 12, level=level, seed=1, per_scene=4)
    inputs = processor(
        images=list(data["image"]),
        text=[accuracy.build_prompt(processor, question) for question in data["question"]],
        padding=True,
        return_tensors="pt",
    )
    replies = model.generate(**inputs, do_sample=False, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
    answers = processor.batch_decode(replies, skip_special_tokens=True)
    right = sum(answer.strip() == true for answer, true in zip(answers, data["answer"]))
    assert right / len(data) >= least


@pytest.fixture(scope="module")
def recorded():
    return {path.stem: accuracy.read_result(path) for path in sorted((RESULTS / "accuracy").glob("*.json"))}


def test_results_are_of_the_shipped_weights(recorded):
    digest = accuracy.weights_digest(LearnPrunerForConditionalGeneration.from_pretrained(FOLDER))
    assert recorded
    assert {result["base_sha256"] for result in recorded.values()} == {digest}
    assert all(result["n"] >= 2000 for result in recorded.values())


@pytest.mark.parametrize(("level", "least"), [("standard", 0.97), ("hard", 0.90)])
def test_the_model_sees(level, least, recorded):
    assert recorded[f"{level}-none"]["level"] == level
    assert recorded[f"{level}-none"]["accuracy"] >= least


@pytest.mark.parametrize(("level", "least"), [("standard", 0.97), ("hard", 0.90)])
def test_another_seed_reaches_the_same_bars(level, least, recorded):
    other = accuracy.read_result(RESULTS / "retrained" / f"{level}-none.json")
    assert other["base_sha256"] != recorded[f"{level}-none"]["base_sha256"]
    assert other["data"] == recorded[f"{level}-none"]["data"]
    assert other["accuracy"] >= least


def test_random_choice_loses_answers(recorded):
    """At a mean of 32 of 576 tokens: at least 15 points."""
    runs = [run for run in recorded.values() if (run["method"], run["level"]) == ("random", "standard")]
    runs = [result["accuracy"] for result in runs if round(result["tokens"]["mean"]) == 32]
    assert len(runs) >= 2
    assert max(runs) <= recorded["standard-none"]["accuracy"] - 0.15


def test_tokens_of_the_objects_are_enough(recorded):
    """At a mean of 32 of 576 tokens: at most 3 points."""
    boxes = recorded["standard-oracle_boxes-32"]
    assert round(boxes["tokens"]["mean"]) == 32
    assert boxes["accuracy"] >= recorded["standard-none"]["accuracy"] - 0.03


@pytest.mark.parametrize("folder", ["accuracy", "retrained"])
def test_the_page_shows_what_was_recorded(folder):
    page = (HERE / "examples" / "easy_vqa" / "README.md").read_text()
    results = [accuracy.read_result(path) for path in sorted((RESULTS / folder).glob("*.json"))]
    table = render_accuracy.table(render_accuracy.group_runs(results))
    assert f"<!-- {folder} -->\n{table}\n<!-- /{folder} -->" in page


def test_the_pruner_is_the_one_that_was_measured(recorded):
    model = LearnPrunerForConditionalGeneration.from_pretrained(FOLDER.parent / "learnpruner-tiny-llava")
    assert model.config.pruner_trained
    measured = {result["pruner_sha256"] for result in recorded.values() if result["method"] == "learnpruner"}
    assert measured == {accuracy.weights_digest(model, pruner=True)}
    # Found beside it, wherever the two are.
    config = json.loads((FOLDER.parent / "learnpruner-tiny-llava" / "config.json").read_text())
    assert config["base_model_name_or_path"] == "./../tiny-llava"
