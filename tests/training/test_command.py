"""`learnpruner train`: a file of settings, flags that win, a pruner's checkpoint that opens, and a run that goes on."""

import codecs
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from processes import run_group, start
from safetensors.torch import load_file
from transformers import EvalPrediction

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.compare import load_processor
from learnpruner.training import PrunerCollator, PrunerTrainer, PrunerTrainingArguments, load_samples
from learnpruner.training.command import installed_setting, parse_arguments
from learnpruner.training.loading import load_model
from learnpruner.training.trainer import answer_accuracy
from learnpruner_commands import main
from learnpruner_commands.train_settings import (
    RECIPE,
    PrunerDataArguments,
    PrunerModelArguments,
    PrunerObjectiveArguments,
)

from new_base import save_base

OWN = (PrunerModelArguments, PrunerDataArguments, PrunerObjectiveArguments)
CONFIGS = sorted((Path(__file__).parents[2] / "training" / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_base(folder)
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


def many(folder, count=5):
    """As many samples: with two a batch and `max_steps` of 4 a run ends inside its second epoch."""
    seen = [{"from": "human", "value": "<image>\nis there a circle?"}, {"from": "gpt", "value": "no"}]
    (folder / "data.json").write_text(json.dumps([{"image": "0.png", "conversations": seen}] * count))


def state_of(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "settings", [[], pytest.param(["--save_strategy", "no"], marks=pytest.mark.slow), ["--relative_base"]], ids=" ".join
)
def test_a_finished_run_trains_nothing(settings, folder, capsys, monkeypatch):
    many(folder)
    command = ["train", str(folder / "config.yaml"), "--max_steps", "4", "--eval_data", str(folder / "data.json")]
    assert main([*command, *settings]) == 0
    before = state_of(folder / "out")
    assert json.loads((folder / "out" / "training.json").read_text())["steps"] == 4
    said = capsys.readouterr().out
    monkeypatch.setattr(PrunerTrainer, "training_step", lambda *_: pytest.fail("a step was trained"))
    monkeypatch.setattr(PrunerTrainer, "predict", lambda *_: pytest.fail("it was evaluated again"))
    assert main([*command, *settings]) == 0
    again = capsys.readouterr().out
    assert state_of(folder / "out") == before
    assert "is finished, after 4 steps: nothing is trained" in again
    assert again.endswith(said[said.index("\nThe pruner is in") :])
    for change in (["--learning_rate", "1"], ["--max_steps", "6"]):
        assert main([*command, *settings, *change]) == 2
        assert f"is of another run ({change[0][2:]}" in capsys.readouterr().err
    assert state_of(folder / "out") == before


@pytest.mark.parametrize(
    "best",
    [
        pytest.param([], marks=pytest.mark.slow),
        ["--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", "1"],
    ],
)
def test_a_run_that_was_killed_behind_its_last_step(best, folder, monkeypatch):
    """The pruner is written, and what is written is what was trained."""
    many(folder)
    command = ["train", str(folder / "config.yaml"), "--max_steps", "4", "--eval_data", str(folder / "data.json")]
    command += ["--logging_steps", "1", *best]
    assert main(command) == 0
    expected = load_file(folder / "out" / "model.safetensors")
    record = json.loads((folder / "out" / "training.json").read_text())
    for name in ("training.json", "model.safetensors", "config.json"):
        (folder / "out" / name).unlink()
    monkeypatch.setattr(PrunerTrainer, "training_step", lambda *_: pytest.fail("a step was trained"))
    assert main(command) == 0
    found = load_file(folder / "out" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    again = json.loads((folder / "out" / "training.json").read_text())
    for name in ("steps", "accuracy", "pruner_sha256", "learning_rate"):
        assert again[name] == record[name], name
    assert again["log"] == [entry for entry in record["log"] if "train_runtime" not in entry]
    assert len(again["log"]) >= 4
    assert LearnPrunerForConditionalGeneration.from_pretrained(folder / "out").config.pruner_trained


def test_a_trained_run_is_loaded_by_the_trainer(folder, monkeypatch):
    """Not by the command alone."""
    many(folder)
    command = ["train", str(folder / "config.yaml"), "--max_steps", "4"]
    assert main(command) == 0
    expected = load_file(folder / "out" / "model.safetensors")
    monkeypatch.setattr(PrunerTrainer, "training_step", lambda *_: pytest.fail("a step was trained"))
    settings = parse_arguments(folder / "config.yaml", command[2:])
    processor = load_processor(str(folder / "base"))
    model = load_model(settings.model, settings.training)
    trainer = PrunerTrainer(model, settings.training, PrunerCollator(processor), load_samples(settings.data.train_data))
    assert trainer.train(resume_from_checkpoint=True).global_step == 4
    assert trainer.state.global_step == 4
    assert model.config.pruner_trained
    found = model.model.pruner.state_dict()
    assert all(torch.equal(value, found[name.removeprefix("model.pruner.")]) for name, value in expected.items())


@pytest.mark.parametrize(
    ("objective", "ratios"),
    [
        ("default", ["1", "0.3", "0.2", "0.1"]),
        pytest.param("hard", ["1", "0.3", "0.2", "0.1"], marks=pytest.mark.slow),
        pytest.param("paper", ["1", "0.3"], marks=pytest.mark.slow),
    ],
)
def test_the_end_says_where_how_good_and_what_next(objective, ratios, folder, capsys):
    """With evaluation data and no strategy it evaluates at the end, at each budget, and unpruned."""
    command = ["train", str(folder / "config.yaml"), "--eval_data", str(folder / "data.json"), "--pruner_ratio", "0.3"]
    assert main([*command, "--budgets", "0.2", "0.1", "0.30000001", "--objective", objective]) == 0
    record = json.loads((folder / "out" / "training.json").read_text())
    assert list(record["accuracy"]) == ratios
    model = LearnPrunerForConditionalGeneration.from_pretrained(folder / "out").eval()
    samples = load_samples(folder / "data.json")
    batch = PrunerCollator(load_processor(str(folder / "base")))([samples[0], samples[1]])
    for ratio, accuracy in record["accuracy"].items():
        with torch.no_grad():
            logits = model(**batch, pruner_ratio=float(ratio)).logits
        assert answer_accuracy(EvalPrediction(logits.argmax(-1).numpy(), batch["labels"].numpy())) == {
            "accuracy": accuracy
        }
    said = capsys.readouterr().out
    lines = said[said.index("\nThe pruner is in") + 1 :].splitlines()
    assert lines[0].startswith(f"The pruner is in {folder / 'out'} (0.3 MB), for the base {folder / 'base'}")
    assert [line.split()[0] for line in lines[2 : 2 + len(ratios)]] == [
        "unpruned",
        *(f"{float(ratio):.1%}" for ratio in ratios[1:]),
    ]
    # The next command is one that runs.
    (next_command,) = [line for line in lines if line.startswith("  learnpruner compare")]
    assert main([*shlex.split(next_command)[1:], "--max-new-tokens", "2"]) == 0
    assert "is there a circle?" in capsys.readouterr().out


@pytest.mark.parametrize("after", [0, 1])
def test_ctrl_c_says_how_to_go_on(after, folder, capsys, monkeypatch):
    step = PrunerTrainer.training_step

    def stopped(self, *arguments, **options):
        if self.state.global_step >= after:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    monkeypatch.setattr(PrunerTrainer, "training_step", stopped)
    command = ["train", str(folder / "config.yaml"), "--run_name", "a b"]
    assert main(command) == 130
    error = capsys.readouterr().err
    assert (f"its last checkpoint is {folder / 'out' / 'checkpoint-1'}" in error) == (after == 1)
    assert ("before its first checkpoint" in error) == (after == 0)
    (line,) = [line for line in error.splitlines() if line.startswith("  learnpruner train")]
    monkeypatch.undo()
    assert main(shlex.split(line)[1:]) == 0
    assert ("Going on from" in capsys.readouterr().out) == (after == 1)


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


@pytest.mark.parametrize("after", [pytest.param(1, marks=pytest.mark.slow), 3])
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


@pytest.mark.parametrize("objective", ["default", pytest.param("paper", marks=pytest.mark.slow)])
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
    kind = path.stem.partition("-")[0]
    assert model.model_name_or_path.startswith({"tiny": "examples/", "photo": "runs/"}.get(kind, "llava-hf/"))
    assert training.objective == "default"


def test_a_shipped_configuration_by_its_name(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    flags = ["--bf16", "false", "--use_cpu", "true"]
    expected = parse_arguments(next(path for path in CONFIGS if path.stem == "llava-1.5-7b"), flags)
    for name in ("llava-1.5-7b", "llava-1.5-7b.yaml"):
        assert parse_arguments(name, flags)[:2] == expected[:2]
    # A file of one's own is taken before it.
    shutil.copy(folder / "config.yaml", folder / "llava-1.5-7b")
    assert parse_arguments("llava-1.5-7b", [])[0].model_name_or_path == str(folder / "base")
    assert main(["train", "llava-2"]) == 2
    error = capsys.readouterr().err
    assert "no configuration file llava-2" in error
    assert all(path.stem in error for path in CONFIGS)


def test_json_settings(folder):
    text = (folder / "config.yaml").read_text()
    (folder / "config.json").write_bytes(codecs.BOM_UTF8 + json.dumps(yaml.safe_load(text)).encode())
    one, other = (parse_arguments(folder / f"config.{kind}", []) for kind in ("yaml", "json"))
    assert one[:2] == other[:2]
    assert one.training.budgets == other.training.budgets


def test_the_recipe_is_the_default(tmp_path):
    arguments = PrunerTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for name, each in RECIPE.items():
        assert getattr(arguments, name) == each.default
    readme = (CONFIGS[0].parents[1] / "README.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", readme, flags=re.MULTILINE))
    objective = {each.name: getattr(arguments, each.name) for each in fields(PrunerObjectiveArguments)}
    recipe = {name: each.default for name, each in RECIPE.items()} | objective
    assert table == {
        name: ", ".join(f"{one:.4g}" for one in value) if isinstance(value, list) else f"{value}"
        for name, value in recipe.items()
    }


def test_a_prefix_of_a_name_in_a_value(folder):
    """Only names are renamed as the installed transformers has them."""
    arguments = ["--run_name", "gradient_checkpointing", "--gradient-checkpointing", "true"]
    training = parse_arguments(folder / "config.yaml", arguments).training
    assert training.run_name == "gradient_checkpointing"
    assert getattr(training, installed_setting("gradient_checkpointing"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--learning_rat", "1"], "--learning_rat 1 (is it --learning_rate?)"),
        (["--load_in_8bit", "--load_in_4bit"], "load_in_8bit and load_in_4bit exclude each other"),
        (["--lora_rank", "0"], "lora_rank is at least 1"),
        (["--lora_rank", "4", "--relative_base"], "relative_base is for a pruner alone"),
        (["--dtype", "float64"], "dtype"),
        (["--budgets", "2"], "budgets are ratios"),
        (["--data_share", "2"], "share is in (0, 1]"),
    ],
)
def test_bad_flags(flags, says, folder, capsys):
    assert main(["train", str(folder / "config.yaml"), *flags]) == 2
    assert says in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_a_setting_that_is_missing(folder, capsys):
    (folder / "bad.yaml").write_text("output_dir: out")
    assert main(["train", str(folder / "bad.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model_name_or_path" in line
    assert len(line) < 400


def test_help_of_everything(capsys):
    """After a configuration: this project's settings first, each with help, then those of TrainingArguments."""
    assert main(["train", "llava-1.5-7b", "--help"]) == 0
    text = capsys.readouterr().out
    places = [text.index(f"  --{each.name}") for kind in OWN for each in fields(kind)]
    assert places == sorted(places)
    assert max(places) < text.index("  --output_dir") < text.index("  --adam_beta1")


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


def test_data_without_any_image(folder, capsys, monkeypatch):
    """Before the base is loaded."""
    monkeypatch.setattr("learnpruner.training.command.load_model", lambda *_: pytest.fail("the base was loaded"))
    (folder / "data.json").write_text(json.dumps([{"question": "is there a circle?", "answer": "no"}] * 3))
    assert main(["train", str(folder / "config.yaml")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"learnpruner: No sample of {folder / 'data.json'} has an image")
    assert not (folder / "out").exists()


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
