"""A base shared by processes (FSDP2): the same pruner as without, checkpoints that open everywhere, and a run that goes
on, one process having text alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from processes import run_group
from safetensors.torch import load_file

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner_commands import main

from new_base import save_base

WORKER = Path(__file__).with_name("fsdp_on_cpu.py")
# What `accelerate launch` makes of its configuration file.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    save_base(folder / "base")
    Image.new("RGB", (192, 192), "red").save(folder / "0.png")
    seen = [{"from": "human", "value": "<image>\nis there a circle?"}, {"from": "gpt", "value": "no"}]
    text = [{"from": "human", "value": "is there a circle?"}, {"from": "gpt", "value": "no no 3 no"}]
    (folder / "data.json").write_text(json.dumps([{"image": "0.png", "conversations": seen}, {"conversations": text}]))
    settings = {
        "model_name_or_path": str(folder / "base"),
        "train_data": str(folder / "data.json"),
        "max_steps": 3,
        "save_steps": 1,
        "optim": "sgd",  # Adam would make much of rounding
        "learning_rate": 0.1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "budgets": [0.1, 0.2],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def launch(folder, *arguments, check=True):
    command = ["train", str(folder / "config.yaml"), "--per_device_train_batch_size", "1", "--ddp_backend", "gloo"]
    good, printed = run_group(2, [*command, *arguments], folder, WORKER, FSDP)
    assert good or not check, printed[-3000:]
    return good, printed


def test_shared_layers(folder):
    launch(folder, "--output_dir", str(folder / "shared"))
    one = ["train", str(folder / "config.yaml"), "--per_device_train_batch_size", "2"]
    assert main([*one, "--output_dir", str(folder / "whole")]) == 0
    shared, whole = (load_file(folder / name / "model.safetensors") for name in ("shared", "whole"))
    start = load_file(folder / "shared" / "checkpoint-1" / "model.safetensors")
    assert set(shared) == set(whole) == set(start)
    assert all(name.startswith("model.pruner.") for name in shared)
    assert any((whole[name] - start[name]).abs().max() > 1e-5 for name in whole)
    assert all((value - shared[name]).abs().max() < 1e-6 for name, value in whole.items())
    # No checkpoint holds the base, and each is as any other.
    assert max(path.stat().st_size for path in (folder / "shared").rglob("*") if path.is_file()) < 1_000_000
    assert LearnPrunerForConditionalGeneration.from_pretrained(folder / "shared").config.pruner_trained
    assert {path.name for path in (folder / "shared" / "checkpoint-1").iterdir()} - {
        path.name for path in (folder / "whole" / "checkpoint-1").iterdir()
    } == {"rng_state_0.pth", "rng_state_1.pth"}


@pytest.mark.slow
def test_a_run_goes_on(folder):
    """With momentum, so that the optimizer has something to lose."""
    adam = ("--optim", "adamw_torch", "--learning_rate", "1e-3", "--eval_data", str(folder / "data.json"))
    launch(folder, *adam, "--output_dir", str(folder / "run"))
    whole = load_file(folder / "run" / "model.safetensors")
    # As if it had been killed behind its second step.
    for path in (folder / "run").glob("*.*"):
        path.unlink()
    shutil.rmtree(folder / "run" / "checkpoint-3")
    launch(folder, *adam, "--output_dir", str(folder / "run"))
    cut = load_file(folder / "run" / "model.safetensors")
    assert set(cut) == set(whole)
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
    # As if it had been killed behind its last step: nothing is left to train, but it is evaluated and written.
    record = json.loads((folder / "run" / "training.json").read_text())
    for path in (folder / "run").glob("*.*"):
        path.unlink()
    launch(folder, *adam, "--output_dir", str(folder / "run"))
    again = json.loads((folder / "run" / "training.json").read_text())
    assert all(again[name] == record[name] for name in ("pruner_sha256", "steps", "accuracy"))
    assert len(again["accuracy"]) == 4
    # Finished, it is left alone.
    before = (folder / "run" / "training.json").stat().st_mtime_ns
    _, printed = launch(folder, *adam, "--output_dir", str(folder / "run"))
    assert "nothing is trained" in printed
    assert (folder / "run" / "training.json").stat().st_mtime_ns == before


def test_first_version_is_refused(folder, monkeypatch):
    monkeypatch.setitem(FSDP, "FSDP_VERSION", "1")
    good, printed = launch(folder, "--output_dir", str(folder / "old"), check=False)
    assert not good
    assert "FSDP2" in printed
