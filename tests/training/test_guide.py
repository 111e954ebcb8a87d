"""The Python of training/README.md, run as it is printed, where a small model stands at the address that it names."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

from learnpruner import LearnPrunerForConditionalGeneration

from new_base import save_base

GUIDE = (Path(__file__).parents[2] / "training" / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
BASE = "llava-hf/llava-1.5-7b-hf"
# Packages that an environment may lack, by what of them a block names, and why it may.
EXTRAS = {
    "from trl": ("trl", "an extra, which the lowest supported versions leave out"),
    "BitsAndBytesConfig": ("bitsandbytes", "has no build for every machine"),
}
QUESTION = "is there a circle?"


def said(role, words):
    return [{"role": role, "content": words}]


def block(name):
    """The one block that has this name."""
    (code,) = [code for code in BLOCKS if f"{name}(" in code]
    for extra, (package, why) in EXTRAS.items():
        if extra in code:
            pytest.importorskip(package, reason=f"{package}: {why}")
    return code


@pytest.fixture
def names(tmp_path, monkeypatch):
    """A folder to stand in: the base that the guide names, the pruner and the samples of its command; and its data."""
    monkeypatch.chdir(tmp_path)
    save_base(BASE)
    fresh = LearnPrunerForConditionalGeneration.from_pretrained(BASE, pruner_ratio=0.2, pruner_trained=True)
    fresh.train_pruner_only().save_pretrained("my-pruner")
    picture = Image.effect_noise((192, 192), 50).convert("RGB")
    picture.save("0.png")
    Path("my.jsonl").write_text(json.dumps({"image": "0.png", "question": QUESTION, "answer": "no"}) + "\n")
    rows = {"images": [[picture]] * 4, "prompt": [said("user", QUESTION)] * 4}
    answers = [[said("assistant", word)] * 4 for word in ("no", "yes")]
    return {
        "base": BASE,
        "processor": AutoProcessor.from_pretrained(BASE),
        "data": Dataset.from_dict({**rows, "completion": answers[0]}),
        "pairs": Dataset.from_dict({**rows, "chosen": answers[0], "rejected": answers[1]}),
    }


def run(name, names):
    exec(compile(block(name), "training/README.md", "exec"), names)
    return names


@pytest.fixture
def trl(monkeypatch):
    trl = pytest.importorskip("trl", reason=EXTRAS["from trl"][1])
    for config in ("SFTConfig", "DPOConfig"):
        # Unless it is told to, TRL does not compute on a CPU in bfloat16, its default.
        monkeypatch.setattr(trl, config, partial(getattr(trl, config), use_cpu=True))


# TRL's own use of a name that transformers 5.24 renamed.
RENAMED = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


def test_every_block_is_run():
    """By one of the tests below."""
    names = ("PrunerTrainer(", "SFTTrainer(", "DPOTrainer(", "BitsAndBytesConfig(")
    assert sorted(name for code in BLOCKS for name in names if name in code) == sorted(names)
    assert len(BLOCKS) == len(names)


def test_adapters_and_pruner(names):
    only = {"__name__": "guide"}  # it needs no name from elsewhere
    assert run("PrunerTrainer", only)["base"] == BASE
    merged = LearnPrunerForConditionalGeneration.from_pretrained("merged")
    assert merged.config.pruner_trained
    stock = load_file(f"{BASE}/model.safetensors")
    assert any("pruner" in name for name in load_file("merged/model.safetensors"))
    assert len(load_file("merged/model.safetensors")) > len(stock)


@RENAMED
def test_sft(names, trl):
    run("SFTTrainer", names)
    assert names["trainer"].state.global_step == 3
    assert names["model"].config.pruner_trained


@RENAMED
def test_dpo(names, trl):
    run("DPOTrainer", names)
    assert names["trainer"].state.global_step == 3
    # LoRA alone: the pruner is as it was.
    before = load_file("my-pruner/model.safetensors")
    after = names["model"].model.pruner.state_dict()
    assert all(torch.equal(value, after[name.removeprefix("model.pruner.")]) for name, value in before.items())


def test_eight_bits(names):
    run("BitsAndBytesConfig", names)
    model = names["model"]
    assert type(model.model.language_model.layers[0].mlp.up_proj) is not torch.nn.Linear
    assert type(model.model.pruner.hidden) is torch.nn.Linear
