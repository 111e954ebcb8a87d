"""DeepSpeed: ZeRO-2 trains by the plain Trainer; ZeRO-3, and any of it in PrunerTrainer, are refused by name."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.training import PrunerTrainer, PrunerTrainingArguments

from tiny_models import FAMILIES, PRUNED, labelled, tiny_pair

HERE = Path(__file__).parent


class Zero3:
    """What transformers keeps, and asks, of a DeepSpeed configuration."""

    def is_zero3(self):
        return True


@pytest.mark.parametrize("family", FAMILIES)
def test_zero3_is_refused_before_any_work(family, tmp_path):
    stock, _ = tiny_pair(family)
    folder = tmp_path / "nothing is read here"
    configuration = Zero3()
    set_hf_deepspeed_config(configuration)
    try:
        with pytest.raises(ValueError, match="ZeRO-3: use ZeRO-2"):
            PRUNED[family].from_pretrained(folder)
        with pytest.raises(ValueError, match="ZeRO-3: use ZeRO-2"):
            PRUNED[family].model_class.adopt(stock.model)
    finally:
        unset_hf_deepspeed_config()


class MadeBefore(PrunerTrainer):
    """Finds DeepSpeed in what accelerate shares between all that are made of it."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.is_deepspeed_enabled = True


# The argument, which needs the package; what `accelerate launch --use_deepspeed` makes; an Accelerator made before.
WAYS = {
    "argument": ({"deepspeed": {"zero_optimization": {"stage": 2}}}, PrunerTrainer),
    "launch": ({"deepspeed_plugin": SimpleNamespace(zero_stage=2)}, PrunerTrainer),
    "accelerator": ({}, MadeBefore),
}


@pytest.mark.parametrize("way", WAYS)
def test_pruner_trainer_refuses_it(way, tmp_path):
    _, model = tiny_pair("llava")
    arguments = PrunerTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    for name, value in WAYS[way][0].items():
        assert hasattr(arguments, name)
        setattr(arguments, name, value)
    with pytest.raises(ValueError, match="has not been made for DeepSpeed"):
        WAYS[way][1](model, arguments, lambda rows: rows[0], [labelled("llava", [[2, (32, 32), 8]])])


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs: pip install deepspeed")
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_zero2_trains_as_without(family, tmp_path):
    tiny_pair(family)[0].save_pretrained(tmp_path / "base")
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    settings = {**os.environ, "PYTHONPATH": paths, "LOCAL_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    found = []
    for how in ([], ["zero2"]):
        folder = tmp_path / f"run{len(how)}"
        own = {**place, "ACCELERATE_USE_DEEPSPEED": "true"} if how else {"ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, str(HERE / "zero2_on_cpu.py"), str(tmp_path / "base"), str(folder), family, *how]
        run = subprocess.run(command, capture_output=True, text=True, check=False, env={**settings, **own})
        assert run.returncode == 0, run.stderr[-3000:]
        found.append(torch.load(folder / "pruner.pt"))
        assert LearnPrunerForConditionalGeneration.from_pretrained(folder).config.pruner_trained
    # Gates sum to the budget, whatever is added to all scores: this gradient is noise, which Adam makes large.
    del found[0]["output.bias"]
    for name, value in found[0].items():
        assert (value - found[1][name]).abs().max() < 1e-5, name
