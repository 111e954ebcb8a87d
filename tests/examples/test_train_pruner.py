"""The script that trains the small model's pruner: what it writes opens, goes on, and is never another run's."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from learnpruner import LearnPrunerForConditionalGeneration

import tiny_llava
import train_pruner


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    torch.manual_seed(0)
    processor = tiny_llava.build_processor()
    tiny_llava.build_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def train(base, output, *more):
    arguments = ["--base", str(base), "--output", str(output), "--steps", "2", "--batch-size", "1", *more]
    return train_pruner.main(arguments)


def test_what_it_writes(base, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "here" / "base")
    output = tmp_path / "here" / "pruner"
    assert train(tmp_path / "here" / "base", output) == 0
    weights = load_file(output / "model.safetensors")
    assert all(name.startswith("model.pruner.") for name in weights)
    shutil.move(tmp_path / "here", tmp_path / "there")
    model = LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "there" / "pruner")
    assert model.config.pruner_trained
    pruner = {f"model.pruner.{name}": value for name, value in model.model.pruner.state_dict().items()}
    assert all(torch.equal(pruner[name], value) for name, value in weights.items())

    # The checkpoints that it left are of this seed, and no other run's.
    moved = tmp_path / "there"
    assert train(moved / "base", moved / "pruner", "--seed", "1") == 2
    assert "another run" in capsys.readouterr().err
    assert all(torch.equal(load_file(moved / "pruner" / "model.safetensors")[name], weights[name]) for name in weights)


def test_bad_input(base, tmp_path, capsys):
    assert train(tmp_path / "none", tmp_path / "out") == 2
    assert "none" in capsys.readouterr().err
    before = (base / "model.safetensors").read_bytes()
    assert train(base, base) == 2
    assert "would replace" in capsys.readouterr().err
    assert (base / "model.safetensors").read_bytes() == before
    other = tmp_path / "other"
    shutil.copytree(base, other)
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"intermediate_size": 512', '"intermediate_size": 256'))
    assert train(other, tmp_path / "out") == 2
    assert "of another shape" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
