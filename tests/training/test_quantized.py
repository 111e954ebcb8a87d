"""A base in 8 or 4 bits (bitsandbytes, on the CPU): the pruner stays as it is, learns, and opens on any copy."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BitsAndBytesConfig

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.compare import load_processor
from learnpruner.compat_learnpruner import CACHE
from learnpruner.training import PrunerCollator, PrunerTrainer, PrunerTrainingArguments

pytest.importorskip("bitsandbytes")

# Large enough for blocks of 4-bit weights, which the random models are not.
BASE = Path(__file__).parents[2] / "examples" / "easy_vqa" / "tiny-llava"
SKIP = ["model.pruner", "model.vision_tower", "model.multi_modal_projector", "lm_head"]


@pytest.fixture(scope="module")
def batch():
    row = {"image": Image.new("RGB", (192, 192), "red"), "question": "is there a circle?", "answer": "no"}
    return dict(PrunerCollator(load_processor(str(BASE)))([row]))


def load(path=BASE, skip=SKIP, **bits):
    quantization = BitsAndBytesConfig(**(bits or {"load_in_8bit": True}), llm_int8_skip_modules=skip)
    return LearnPrunerForConditionalGeneration.from_pretrained(path, quantization_config=quantization)


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_the_pruner_is_left_out(bits, batch):
    model = load(**{bits: True}).eval()
    layers = model.model.language_model.layers
    assert type(layers[0].mlp.up_proj) is not torch.nn.Linear
    assert type(model.model.pruner.hidden) is torch.nn.Linear
    assert {parameter.dtype for parameter in model.model.pruner.parameters()} == {torch.float32}
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    output = model.generate(**prompt, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    counts = [int(mask.sum()) for mask in output[CACHE].kept_mask]
    assert batch["input_ids"].numel() > counts[0] > counts[1]


def test_a_quantised_pruner_is_refused():
    with pytest.raises(ValueError, match="llm_int8_skip_modules"):
        load(skip=None)


def test_training_on_eight_bits(batch, tmp_path):
    model = load()
    arguments = PrunerTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_steps=2, learning_rate=1e-3, report_to=[], use_cpu=True
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = PrunerTrainer(model, arguments, lambda rows: rows[0], [batch] * 16)
    trainer.train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".pruner." in name}
    assert model.is_quantized
    checkpoint = tmp_path / "checkpoint-2"
    assert "quantization_config" not in json.loads((checkpoint / "config.json").read_text())
    for opened in (LearnPrunerForConditionalGeneration.from_pretrained(checkpoint), load(checkpoint)):
        pruner = opened.model.pruner.state_dict()
        assert all(torch.equal(value, pruner[name]) for name, value in model.model.pruner.state_dict().items())
