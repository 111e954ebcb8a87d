"""`learnpruner train`: a file of settings, flags that win, a pruner's checkpoint that opens, and a run that goes on."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from learnpruner import LearnPrunerForConditionalGeneration, cli
from learnpruner.training.command import parse_arguments

import tiny_llava

CONFIGS = sorted((Path(__file__).parents[2] / "training" / "configs").glob("*.yaml"))


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    processor = tiny_llava.build_processor()
    tiny_llava.build_model(processor).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    Image.new("RGB", (192, 192), "red").save(tmp_path / "0.png")
    turns = [{"from": "human", "value": "is there a circle?"}, {"from": "gpt", "value": "no"}]
    seen = [{"from": "human", "value": "<image>\nis there a circle?"}, turns[1]]
    rows = [{"image": "0.png", "conversations": seen}, {"conversations": turns}]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    settings = {
        "model_name_or_path": str(tmp_path / "base"),
        "train_data": str(tmp_path / "data.json"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "save_steps": 1,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "budgets": [0.1, 0.2],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_train(folder):
    assert cli.main(["train", str(folder / "config.yaml"), "--pruner_ratio", "0.2"]) == 0
    weights = load_file(folder / "out" / "model.safetensors")
    assert all(name.startswith("model.pruner.") for name in weights)
    model = LearnPrunerForConditionalGeneration.from_pretrained(folder / "out")
    assert model.config.pruner_trained
    assert model.config.pruner_ratio == 0.2
    # The same command goes on from the last checkpoint: at the last step there is nothing left to do.
    assert cli.main(["train", str(folder / "config.yaml"), "--pruner_ratio", "0.2"]) == 0
    again = load_file(folder / "out" / "model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_flags_win(folder):
    data, training = parse_arguments(folder / "config.yaml", ["--learning_rate", "5e-4", "--data_share", "0.5"])
    assert training.learning_rate == 5e-4
    assert training.budgets == [0.1, 0.2]
    assert data.data_share == 0.5


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_ready_configurations(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # bfloat16 of a GPU is refused on a machine without one.
    data, training = parse_arguments(path, ["--bf16", "false", "--use_cpu", "true"])
    assert data.model_name_or_path.startswith("llava-hf/")
    assert training.objective == "default"


@pytest.mark.parametrize(
    ("text", "says"),
    [("[", "not YAML"), ("- a", "list of settings"), ("", "list of settings"), ("learning_rat: 1", "learning_rat")],
)
def test_bad_files(text, says, folder, capsys):
    (folder / "bad.yaml").write_text(text if "learning" not in text else (folder / "config.yaml").read_text() + text)
    assert cli.main(["train", str(folder / "bad.yaml")]) == 2
    assert says in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_missing_files(folder, capsys):
    assert cli.main(["train", str(folder / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    assert cli.main(["train", str(folder / "config.yaml"), "--train_data", str(folder / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
