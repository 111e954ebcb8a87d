"""`learnpruner train`: a file of settings, flags that win, a pruner's checkpoint that opens, and a run that goes on."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from processes import run_group, start
from safetensors.torch import load_file

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.compare import load_processor
from learnpruner.training.command import parse_arguments
from learnpruner_commands import main

import tiny_llava

CONFIGS = sorted((Path(__file__).parents[2] / "training" / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    processor = tiny_llava.build_processor()
    tiny_llava.build_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    Image.new("RGB", (192, 192), "red").save(tmp_path / "0.png")
    turns = [{"from": "human", "value": "is there a circle?"}, {"from": "gpt", "value": "no no 3 no"}]
    seen = [{"from": "human", "value": "<image>\nis there a circle?"}, {"from": "gpt", "value": "no"}]
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
    assert main(["train", str(folder / "config.yaml"), "--pruner_ratio", "0.2"]) == 0
    weights = load_file(folder / "out" / "model.safetensors")
    assert all(name.startswith("model.pruner.") for name in weights)
    model = LearnPrunerForConditionalGeneration.from_pretrained(folder / "out")
    assert model.config.pruner_trained
    assert model.config.pruner_ratio == 0.2
    # The same command goes on from the last checkpoint: at the last step there is nothing left to do, or to record.
    record = (folder / "out" / "training.json").read_text()
    assert main(["train", str(folder / "config.yaml"), "--pruner_ratio", "0.2"]) == 0
    assert (folder / "out" / "training.json").read_text() == record
    again = load_file(folder / "out" / "model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_what_it_records(folder, capsys):
    arguments = ["--relative_base", "true", "--output_dir", str(folder / "deep" / "out")]
    assert main(["train", str(folder / "config.yaml"), *arguments]) == 0
    assert "trainable params" in capsys.readouterr().out
    record = json.loads((folder / "deep" / "out" / "training.json").read_text())
    assert record["metrics"]["trained_parameters"] == 2 * 128 + (128 + 1) * 512 + (512 + 1) * 2
    assert record["metrics"]["peak_memory_bytes"] > 1e8
    assert record["metrics"]["train_runtime"] > 0
    assert record["metrics"]["seconds"] > 0
    assert (record["samples"], record["steps"], record["budgets"]) == (2, 2, [0.1, 0.2])
    assert not list((folder / "deep" / "out").glob("*.bin"))
    # Both open wherever they are moved together.
    (folder / "deep" / "out").rename(folder / "moved")
    (folder / "elsewhere").mkdir()
    shutil.move(folder / "moved", folder / "elsewhere" / "deep" / "out")
    shutil.move(folder / "base", folder / "elsewhere" / "base")
    assert LearnPrunerForConditionalGeneration.from_pretrained(folder / "elsewhere" / "deep" / "out")


@pytest.mark.parametrize("after", [1, 3])
def test_a_killed_run_goes_on(after, folder):
    """Killed as soon as so many checkpoints have been begun: the weights are the uninterrupted run's."""
    arguments = ["train", str(folder / "config.yaml"), "--max_steps", "4", "--output_dir"]
    # As many threads as here: sums of more would round otherwise.
    run = start([*arguments, str(folder / "cut")], threads=torch.get_num_threads())
    while len(list((folder / "cut").glob("checkpoint-*"))) < after:
        assert run.is_alive()
        time.sleep(0.01)
    run.kill()
    run.join()
    assert not (folder / "cut" / "model.safetensors").exists()
    for name in ("cut", "whole"):
        assert main([*arguments, str(folder / name)]) == 0
    cut, whole = (load_file(folder / name / "model.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


@pytest.mark.parametrize("objective", ["default", "paper"])
def test_two_processes_are_one_batch(objective, folder):
    """Data parallel over two processes, one of them with a longer text alone in each step: as one process with both.

    By plain gradient descent: Adam would make much of rounding.
    """
    arguments = ["train", str(folder / "config.yaml"), "--max_steps", "3", "--objective", objective]
    arguments += ["--optim", "sgd", "--learning_rate", "0.1", "--output_dir"]
    two = [*arguments, str(folder / "two"), "--per_device_train_batch_size", "1", "--ddp_backend", "gloo"]
    if objective == "default":
        good, printed = run_group(2, two, folder)
        assert good, printed[-3000:]
    else:  # as a user starts them
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "learnpruner"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *launch, *two], check=True, capture_output=True, env=environment, timeout=300)
    assert main([*arguments, str(folder / "one"), "--save_steps", "3"]) == 0
    one, other = (load_file(folder / name / "model.safetensors") for name in ("one", "two"))
    start = load_file(folder / "two" / "checkpoint-1" / "model.safetensors")
    assert any((one[name] - start[name]).abs().max() > 1e-5 for name in one)
    assert all((value - other[name]).abs().max() < 1e-6 for name, value in one.items())
    records = [json.loads((folder / name / "training.json").read_text()) for name in ("one", "two")]
    assert [record["processes"] for record in records] == [1, 2]


def test_flags_win(folder):
    _, data, training = parse_arguments(folder / "config.yaml", ["--learning_rate", "5e-4", "--data_share", "0.5"])
    assert training.learning_rate == 5e-4
    assert training.budgets == [0.1, 0.2]
    assert data.data_share == 0.5


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_ready_configurations(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # bfloat16 of a GPU is refused on a machine without one.
    model, _, training = parse_arguments(path, ["--bf16", "false", "--use_cpu", "true"])
    assert model.model_name_or_path.startswith("llava-hf/" if "tiny" not in path.stem else "examples/")
    assert training.objective == "default"


@pytest.mark.parametrize(
    ("text", "says"),
    [("[", "not YAML"), ("- a", "list of settings"), ("", "list of settings"), ("learning_rat: 1", "learning_rat")],
)
def test_bad_files(text, says, folder, capsys):
    (folder / "bad.yaml").write_text(text if "learning" not in text else (folder / "config.yaml").read_text() + text)
    assert main(["train", str(folder / "bad.yaml")]) == 2
    assert says in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_values_of_every_kind(folder):
    text = (folder / "config.yaml").read_text()
    more = "eval_data: null\nlr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 0.0001}\n"
    (folder / "config.yaml").write_text(text + more)
    _, data, training = parse_arguments(folder / "config.yaml", [])
    assert data.eval_data is None
    assert training.lr_scheduler_kwargs == {"min_lr": 0.0001}
    with pytest.raises(ValueError, match=r"max_steps.*many"):
        parse_arguments(folder / "config.yaml", ["--max_steps", "many"])


def test_a_relative_base_must_be_a_folder(folder, capsys):
    LearnPrunerForConditionalGeneration.from_pretrained(folder / "base").save_pretrained(folder / "full")
    load_processor(str(folder / "base")).save_pretrained(folder / "full")
    command = ["train", str(folder / "config.yaml"), "--model_name_or_path", str(folder / "full")]
    assert main([*command, "--relative_base", "true"]) == 2
    assert "relative_base" in capsys.readouterr().err
    assert not list((folder / "out").glob("checkpoint-*"))


def test_missing_files(folder, capsys):
    assert main(["train", str(folder / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    assert main(["train", str(folder / "config.yaml"), "--train_data", str(folder / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_the_base_is_not_overwritten(folder, capsys):
    before = (folder / "base" / "model.safetensors").read_bytes()
    assert main(["train", str(folder / "config.yaml"), "--output_dir", str(folder / "base")]) == 2
    assert "would replace" in capsys.readouterr().err
    assert (folder / "base" / "model.safetensors").read_bytes() == before


def test_a_base_of_another_shape(folder, capsys):
    config = (folder / "base" / "config.json").read_text()
    (folder / "base" / "config.json").write_text(config.replace('"intermediate_size": 512', '"intermediate_size": 256'))
    assert main(["train", str(folder / "config.yaml")]) == 2
    assert "of another shape" in capsys.readouterr().err
    assert not (folder / "out").exists()
