"""The shipped small Qwen2-VL: it opens with transformers alone, it sees at both sizes, and its pruner keeps enough.

Its processor is code beside the weights, since the stock one needs torchvision."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.compare import load_processor

import accuracy
import processing_tiny_qwen2_vl
import render_accuracy
from scenes import scene_dataset

HERE = Path(__file__).parents[2]
FOLDER = HERE / "examples" / "easy_vqa" / "tiny-qwen2-vl"
PRUNER = FOLDER.parent / "learnpruner-tiny-qwen2-vl"
RESULTS = HERE / "benchmarks" / "results" / "qwen2_vl"
LEVELS = ("standard", "wide")
# RelAcc at mean tokens of 576.
BARS = {128: 0.99, 64: 0.98, 32: 0.95}


def test_it_opens_with_transformers_alone():
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"]
    assert (FOLDER / "model.safetensors").stat().st_size <= 12_000_000
    model, info = AutoModelForImageTextToText.from_pretrained(FOLDER, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float32
    AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
    # The processor's code is the one that the tests hold.
    shipped = (FOLDER / "processing_tiny_qwen2_vl.py").read_text()
    assert shipped == Path(processing_tiny_qwen2_vl.__file__).read_text()


@pytest.mark.parametrize("level", ["standard", pytest.param("wide", marks=pytest.mark.slow)])
def test_it_answers(level):
    """A sample of the benchmark, asked of the stock class; the bars themselves are on the recorded 2,000 questions."""
    model = AutoModelForImageTextToText.from_pretrained(FOLDER).eval()
    processor = load_processor(str(FOLDER), trust_remote_code=True)
    data = scene_dataset("test", 6, level=level, seed=1, per_scene=4)
    inputs = processor(
        images=list(data["image"]),
        text=[accuracy.build_prompt(processor, question) for question in data["question"]],
        padding=True,
        return_tensors="pt",
    )
    replies = model.generate(**inputs, do_sample=False, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
    answers = processor.batch_decode(replies, skip_special_tokens=True)
    assert sum(answer.strip() == true for answer, true in zip(answers, data["answer"])) / len(data) >= 0.85


@pytest.fixture(scope="module")
def recorded():
    return {path.stem: accuracy.read_result(path) for path in sorted(RESULTS.glob("*.json"))}


def test_results_are_of_the_shipped_weights(recorded):
    model = LearnPrunerForConditionalGeneration.from_pretrained(PRUNER)
    assert model.config.pruner_trained
    assert {result["base_sha256"] for result in recorded.values()} == {accuracy.weights_digest(model)}
    measured = {result["pruner_sha256"] for result in recorded.values() if result["method"] == "learnpruner"}
    assert measured == {accuracy.weights_digest(model, pruner=True)}
    assert all(result["n"] >= 2000 for result in recorded.values())
    assert json.loads((PRUNER / "config.json").read_text())["base_model_name_or_path"] == "./../tiny-qwen2-vl"


@pytest.mark.parametrize("level", LEVELS)
def test_the_model_sees(level, recorded):
    assert recorded[f"{level}-none"]["level"] == level
    assert recorded[f"{level}-none"]["accuracy"] >= 0.97


@pytest.mark.parametrize("tokens", BARS)
@pytest.mark.parametrize("level", LEVELS)
def test_the_pruner_keeps_what_it_needs(level, tokens, recorded):
    unpruned, pruned, chance = (recorded[f"{level}-{name}"] for name in ("none", f"learnpruner-{tokens}", "random-32"))
    whole = {"standard": 576, "wide": 512}[level]
    assert pruned["tokens"]["image"] == whole
    assert pruned["tokens"]["mean"] == pytest.approx(whole * tokens / 576, rel=0.02)
    assert accuracy.relative_accuracy(pruned, unpruned) >= BARS[tokens]
    assert accuracy.relative_accuracy(chance, unpruned) < 0.8 < accuracy.relative_accuracy(pruned, unpruned)


def test_the_page_shows_what_was_recorded(recorded):
    page = (FOLDER.parent / "README.md").read_text()
    table = render_accuracy.table(render_accuracy.group_runs(list(recorded.values())))
    assert f"<!-- qwen2_vl -->\n{table}\n<!-- /qwen2_vl -->" in page
