# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The `learnpruner train` command: a configuration file, flags that override it, and a pruner at the end."""

import argparse
import difflib
import json
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from transformers import HfArgumentParser, ProcessorMixin

from learnpruner.compare import load_processor
from learnpruner_commands.train_settings import PrunerDataArguments, PrunerModelArguments

from .arguments import PrunerTrainingArguments
from .data import PrunerCollator, load_samples
from .fsdp import plain_class
from .loading import load_model
from .report import accuracy_lines, next_lines, where_lines
from .rows import image_values
from .runs import RECORD, count_parameters, is_finished, last_checkpoint
from .trainer import PrunerTrainer

CONFIGS = Path(__file__).parent / "configs"


class Settings(NamedTuple):
    """All settings of a training."""

    model: PrunerModelArguments
    data: PrunerDataArguments
    training: PrunerTrainingArguments


class _Parser(HfArgumentParser):
    """Reports what is wrong as `ValueError`, without the usage of two hundred settings."""

    def __init__(self):
        kinds = (PrunerModelArguments, PrunerDataArguments, PrunerTrainingArguments)
        usage = "learnpruner train CONFIG [--name value ...]"
        super().__init__(kinds, prog="learnpruner train", usage=usage, allow_abbrev=False, exit_on_error=False)

    def error(self, message: str):
        raise ValueError(message)


def full_help() -> str:
    """Every setting: this project's own first, then those of `TrainingArguments`."""
    return _Parser().format_help()


def find_config(name: str | Path) -> Path:
    """A configuration file by its path, or a shipped one by its name.

    Raises:
        `OSError`: where there is none.
    """
    path, shipped = Path(name), sorted(each.stem for each in CONFIGS.glob("*.yaml"))
    if path.is_file():
        return path
    if str(name).removesuffix(".yaml") in shipped:
        return CONFIGS / f"{str(name).removesuffix('.yaml')}.yaml"
    raise OSError(f"There is no configuration file {name}. Shipped with learnpruner: {', '.join(shipped)}.")


def installed_setting(name: str) -> str:
    """A setting under the name that the installed transformers gives it: 5.24 renamed `gradient_checkpointing`."""
    names = {each.name for each in fields(PrunerTrainingArguments)}
    installed = "activation" if "activation_checkpointing" in names else "gradient"
    return re.sub(r"(gradient|activation)(?=[_-]checkpointing)", installed, name)


def parse_arguments(config: str | Path, flags: list[str]) -> Settings:
    """Reads a YAML or JSON file of settings, and flags (`--learning_rate 1e-3`), which win.

    Raises:
        `OSError`: where there is no such file.
        `ValueError`: where the file is not such a mapping, or a name or a value is not known.
    """
    config = find_config(config)
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{config} is not UTF-8 text: save it as UTF-8.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{config} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{config} is not a list of settings, one `name: value` a line.")
    arguments = []
    for name, value in settings.items():
        name = installed_setting(str(name))
        if isinstance(value, dict):
            arguments += [f"--{name}", json.dumps(value)]
        elif value is not None:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    arguments += [installed_setting(flag) if flag.startswith("--") else flag for flag in flags]
    parser = _Parser()
    try:
        model, data, training, unknown = parser.parse_args_into_dataclasses(
            arguments, look_for_args_file=False, return_remaining_strings=True
        )
    except (argparse.ArgumentError, ValueError) as error:
        raise ValueError(f"{config}: {error}") from error
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        close = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
        raise ValueError(f"Unknown settings: {' '.join(unknown)}" + (f" (is it {close[0]}?)" if close else ""))
    return Settings(model, data, training)


def train(model: PrunerModelArguments, data: PrunerDataArguments, training: PrunerTrainingArguments) -> PrunerTrainer:
    """Trains a pruner, from the last checkpoint in `training.output_dir` if there is one, and saves it there, with
    the processor and `training.json`: settings, cost, log, and accuracy at each budget where there are evaluation data.
    With `push_to_hub` they go to the Hub, too. A finished run is not trained further, and its record is left alone.

    Raises:
        `ValueError`: where the output is the base's folder, or settings or data do not allow a training.
    """
    output = Path(training.output_dir)
    if output.resolve() == Path(model.model_name_or_path).resolve():
        raise ValueError(f"output_dir {output} holds the base, which the pruner would replace.")
    _say(training, f"Reading {data.train_data}.")
    options = {"strict": data.strict, "skip_bad_rows": data.skip_bad_rows}
    samples = load_samples(data.train_data, data.image_folder, data.data_share, training.seed, **options)
    if not any(map(image_values, samples)):
        raise ValueError(
            f'No sample of {data.train_data} has an image, so there is nothing to learn: give each its "image" or '
            '"images".'
        )
    evaluation = None if data.eval_data is None else load_samples(data.eval_data, data.image_folder, **options)
    processor = load_processor(model.model_name_or_path, model.trust_remote_code)
    share = f" (data_share: {data.data_share:g})" if data.data_share < 1 else ""
    _say(training, f"{len(samples):,} samples to train on{share}. Loading {model.model_name_or_path}.")
    foreground = data.foreground and "boxes" in samples.column_names
    collator = PrunerCollator(processor, data.max_length, foreground, data.strict)
    trainer = PrunerTrainer(load_model(model, training), training, collator, samples, evaluation)
    base = trainer.run_settings()["base"]
    if model.relative_base and not (base and Path(base).is_dir()):
        raise ValueError(f"relative_base is for a base in a folder, and this one is {base or 'not named'}.")
    finished, last = is_finished(output), last_checkpoint(output)
    if finished:
        record = trainer.load_run(output)
        _say(
            training,
            f"The run in {output} is finished, after {record['steps']} steps: nothing is trained, and its record stays "
            "as it is. For another run choose another output_dir.",
        )
    else:
        if trainer.is_world_process_zero():
            every, trained = count_parameters(trainer.model)
            print(f"trainable params: {trained:,} || all params: {every:,} || trainable%: {100 * trained / every:.4f}")
        _say(training, f"Going on from {last}." if last else "The training begins.")
        trainer.train(resume_from_checkpoint=last)
        record = trainer.record()
    accuracy = record.get("accuracy", {})
    if evaluation is not None and not accuracy:
        _say(training, f"Evaluating on {data.eval_data}, unpruned and at each budget.")
        accuracy = trainer.accuracy_at_budgets()
    sharded = trainer.trained_state() if trainer.is_fsdp_enabled and not finished else None
    if trainer.is_world_process_zero():
        if not finished:
            _save(trainer, processor, model, data, sharded, {"accuracy": accuracy} if accuracy else {})
        if training.push_to_hub:
            trainer.push_to_hub(processor=processor, training=json.loads((output / RECORD).read_text()))
        lines = [*where_lines(trainer), *accuracy_lines(accuracy, data.eval_data)]
        rows = samples if evaluation is None else evaluation
        _say(training, "\n".join(["", *lines, *next_lines(trainer, rows, model.trust_remote_code)]))
    # Processes that left would take their part of the group with them.
    trainer.accelerator.wait_for_everyone()
    return trainer


def how_to_go_on(training: PrunerTrainingArguments, command: str) -> str:
    """What to tell who stopped a training."""
    last = last_checkpoint(training.output_dir)
    if last is None:
        where = f"before its first checkpoint (save_steps: {training.save_steps:g}), so the same command begins anew"
    else:
        where = f"its last checkpoint is {last}, and the same command goes on from there"
    return f"The training was stopped; {where}:\n  {command}"


def _say(training: PrunerTrainingArguments, text: str) -> None:
    """Progress, from one of several processes."""
    if training.process_index == 0:
        print(text, flush=True)


def _save(
    trainer: PrunerTrainer,
    processor: ProcessorMixin,
    settings: PrunerModelArguments,
    data: PrunerDataArguments,
    sharded: dict[str, torch.Tensor] | None,
    found: dict,
) -> None:
    """Writes the pruner, or the adapters and it, the processor and the record."""
    model, output, base = trainer.model, Path(trainer.args.output_dir), trainer.run_settings()["base"]
    named = base
    if settings.relative_base:
        model.config.base_model_name_or_path = named = f"./{Path(os.path.relpath(base, output)).as_posix()}"
    # Not trainer.save_model: it would add a pickle of the arguments.
    with plain_class(model):
        model.eval().save_pretrained(output, state_dict=sharded)
    if settings.relative_base:
        model.config.base_model_name_or_path = base
    processor.save_pretrained(output)
    named = {"base": named, "train_data": Path(data.train_data).name}
    (output / RECORD).write_text(json.dumps({**trainer.record(), **named, **found}, indent=1) + "\n")
