# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The `learnpruner train` command: a configuration file, flags that override it, and a pruner at the end."""

import argparse
import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser, ProcessorMixin

from learnpruner.auto import LearnPrunerForConditionalGeneration
from learnpruner.compare import load_processor

from .data import PrunerCollator, load_samples
from .fsdp import plain_class
from .trainer import PrunerTrainer, PrunerTrainingArguments, last_checkpoint

RECORD = "training.json"


@dataclass
class PrunerDataArguments:
    """What a pruner is trained on.

    Args:
        model_name_or_path (`str`): The base, or a pruner's checkpoint to train on.
        train_data, eval_data (`str`): JSON or JSON Lines in LLaVA's layout, or one of those that `data.py` names.
        image_folder (`str`, *optional*): Where relative image paths start. Defaults to the file's folder.
        data_share (`float`, defaults to 1.0): How many of the training samples, drawn by `seed`.
        strict (`bool`): An image that cannot be read is an error; otherwise its sample is left out, and counted.
        max_length (`int`, *optional*): Tokens of the longest row; never cuts an image.
        foreground (`bool`, defaults to `True`): Where samples have boxes, logs how much of them the first cut keeps.
        pruner_ratio (`float`, *optional*): In place of the checkpoint's: the budget of evaluation and, for the
            paper's objective, of training.
        relative_base (`bool`, defaults to `False`): Names a base that is a folder by its path from the output, so
            that both open wherever they are moved together.
        trust_remote_code (`bool`, defaults to `False`): Runs the code that a base brings for its processor, if any.
    """

    model_name_or_path: str = field(metadata={"help": "Hub id or folder"})
    train_data: str = field(metadata={"help": "JSON or JSON Lines file"})
    eval_data: str | None = None
    image_folder: str | None = None
    data_share: float = 1.0
    strict: bool = False
    max_length: int | None = None
    foreground: bool = True
    pruner_ratio: float | None = None
    relative_base: bool = False
    trust_remote_code: bool = False


def installed_setting(name: str) -> str:
    """A setting under the name that the installed transformers gives it: 5.24 renamed `gradient_checkpointing`."""
    new = name.replace("gradient_checkpointing", "activation_checkpointing")
    names = {each.name for each in fields(PrunerTrainingArguments)}
    return new if "activation_checkpointing" in names else new.replace("activation_", "gradient_")


def parse_arguments(config: Path, flags: list[str]) -> tuple[PrunerDataArguments, PrunerTrainingArguments]:
    """Reads a YAML file of the fields of both classes, and flags (`--learning_rate 1e-3`), which win.

    Raises:
        `ValueError`: where the file is not such a mapping, or a name is not known.
    """
    try:
        settings = yaml.safe_load(config.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{config} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{config} is not a list of settings, one `name: value` a line.")
    arguments = []
    for name, value in settings.items():
        name = installed_setting(name)
        if isinstance(value, dict):
            arguments += [f"--{name}", json.dumps(value)]
        elif value is not None:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    parser = HfArgumentParser((PrunerDataArguments, PrunerTrainingArguments), allow_abbrev=False, exit_on_error=False)
    try:
        data, training, unknown = parser.parse_args_into_dataclasses(
            [*arguments, *map(installed_setting, flags)], look_for_args_file=False, return_remaining_strings=True
        )
    except argparse.ArgumentError as error:
        raise ValueError(f"{config}: {error}") from error
    if unknown:
        raise ValueError(f"Unknown settings: {' '.join(unknown)}")
    return data, training


def train(data: PrunerDataArguments, training: PrunerTrainingArguments) -> PrunerTrainer:
    """Trains a pruner, from the last checkpoint in `training.output_dir` if there is one, and saves it there, with
    the processor and `training.json`: settings, cost and log. With `push_to_hub` they go to the Hub, too.

    Raises:
        `ValueError`: where the output is the base's folder, or settings or data do not allow a training.
    """
    output = Path(training.output_dir)
    if output.resolve() == Path(data.model_name_or_path).resolve():
        raise ValueError(f"output_dir {output} holds the base, which the pruner would replace.")
    processor = load_processor(data.model_name_or_path, data.trust_remote_code)
    samples = load_samples(data.train_data, data.image_folder, data.data_share, training.seed, data.strict)
    evaluation = None
    if data.eval_data is not None:
        evaluation = load_samples(data.eval_data, data.image_folder, strict=data.strict)
    fields = {} if data.pruner_ratio is None else {"pruner_ratio": data.pruner_ratio}
    torch.manual_seed(training.seed)  # of a fresh pruner's weights
    model = LearnPrunerForConditionalGeneration.from_pretrained(data.model_name_or_path, **fields)
    foreground = data.foreground and "boxes" in samples.column_names
    collator = PrunerCollator(processor, data.max_length, foreground, data.strict)
    trainer = PrunerTrainer(model, training, collator, samples, evaluation)
    base = model.config.base_model_name_or_path
    if data.relative_base and not (base and Path(base).is_dir()):
        raise ValueError(f"relative_base is for a base in a folder, and this one is {base or 'not named'}.")
    if trainer.is_world_process_zero():
        model.print_trainable_parameters()
    last = last_checkpoint(output)
    trainer.train(resume_from_checkpoint=last)
    sharded = trainer.trained_state() if trainer.is_fsdp_enabled else None
    if trainer.is_world_process_zero():
        _save(trainer, processor, data, sharded, finished=last)
    # Processes that left would take their part of the group with them.
    trainer.accelerator.wait_for_everyone()
    return trainer


def _save(
    trainer: PrunerTrainer,
    processor: ProcessorMixin,
    data: PrunerDataArguments,
    sharded: dict[str, torch.Tensor] | None,
    finished: str | None,
) -> None:
    """Writes pruner, processor and record, unless the run had been `finished` before; and pushes them."""
    model, training = trainer.model, trainer.args
    output, base = Path(training.output_dir), model.config.base_model_name_or_path
    finished_before = finished is not None and finished.endswith(f"checkpoint-{trainer.state.global_step}")
    if not (finished_before and (output / RECORD).exists()):
        if data.relative_base:
            model.config.base_model_name_or_path = f"./{Path(os.path.relpath(base, output)).as_posix()}"
        # Not trainer.save_model: it would add a pickle of the arguments.
        with plain_class(model):
            model.eval().save_pretrained(output, state_dict=sharded)
        processor.save_pretrained(output)
        named = {"base": model.config.base_model_name_or_path, "train_data": Path(data.train_data).name}
        (output / RECORD).write_text(json.dumps({**trainer.record(), **named}, indent=1) + "\n")
        model.config.base_model_name_or_path = base
    if training.push_to_hub:
        trainer.push_to_hub(processor=processor, training=json.loads((output / RECORD).read_text()))
