"""Checkpoints that version 0.1 wrote: the installed code reads them, and keeps and answers what version 0.1 did."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from learnpruner import LearnPrunerForConditionalGeneration

from tiny_models import IMAGE, PRUNED, STOCK, VIDEO, build_inputs

pytestmark = pytest.mark.core
FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "version_0_1"
QUESTIONS = json.loads((FOLDER / "questions.json").read_text())
FAMILY = {"llava": "llava", "qwen2_vl": "qwen2_vl", "pruner_only": "llava"}


@pytest.mark.parametrize("name", FAMILY)
def test_a_checkpoint_of_version_0_1(name):
    stored = json.loads((FOLDER / name / "config.json").read_text())
    assert stored["learnpruner_version"] == "0.1.0"
    model = LearnPrunerForConditionalGeneration.from_pretrained(FOLDER / name, dtype=torch.float32).eval()
    assert type(model) is PRUNED[FAMILY[name]]
    fields = {field: value for field, value in stored.items() if field.startswith("pruner_")}
    assert fields.items() <= model.config.to_dict().items()

    recorded = load_file(FOLDER / name / "answers.safetensors")
    inputs = build_inputs(FAMILY[name], QUESTIONS["samples"][FAMILY[name]], seed=QUESTIONS["seed"])
    output = model(**inputs)
    first, second = output.kept_mask
    assert torch.equal(first, recorded["first_kept"])
    assert torch.equal(second, recorded["second_kept"])
    assert (output.logits[:, -3:] - recorded["logits"]).abs().max() < 1e-4
    # What version 0.1's own code scored (record_scores.py), in float32. Equal to the last bit where it was recorded;
    # another CPU may round otherwise.
    scored = load_file(FOLDER / name / "scores.safetensors")
    for found, of_old in zip(output.vision_scores, (scored["first"], scored["second"]), strict=True):
        assert torch.equal(found.isnan(), of_old.isnan())
        assert len(of_old[~of_old.isnan()].unique()) > 16
        torch.testing.assert_close(found, of_old, rtol=1e-5, atol=1e-5, equal_nan=True)
    # At a ratio of 1 it is the stock model of its weights.
    stock_class = STOCK[FAMILY[name]]
    kept = {key: value for key, value in model.config.to_dict().items() if key not in ("model_type", "auto_map")}
    stock = stock_class(stock_class.config_class(**kept)).eval()
    stock.load_state_dict({key: value for key, value in model.state_dict().items() if "pruner" not in key})
    assert torch.equal(model(**inputs, pruner_ratio=1.0).logits, stock(**inputs).logits)
    new = QUESTIONS["max_new_tokens"]
    sequences = model.generate(**inputs, do_sample=False, max_new_tokens=new, suppress_tokens=[IMAGE, VIDEO])
    assert torch.equal(sequences, recorded["sequences"])
    # Both cuts were made, and no two samples got one answer.
    kept = [mask.sum() for mask in (inputs["attention_mask"], first, second)]
    assert kept[0] > kept[1] > kept[2]
    assert len({tuple(row) for row in sequences[:, -new:].tolist()}) == len(sequences)


def test_a_pruner_only_checkpoint_is_the_pruner_on_its_base():
    names = set(load_file(FOLDER / "pruner_only" / "model.safetensors"))
    assert names
    assert all(name.startswith("model.pruner.") for name in names)
