# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The `learnpruner train` command: a configuration file, flags that override it, and a pruner at the end."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
import yaml
from transformers import HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint

from learnpruner.auto import LearnPrunerForConditionalGeneration
from learnpruner.compare import load_processor

from .data import PrunerCollator, load_samples
from .trainer import PrunerTrainer, PrunerTrainingArguments


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
        pruner_ratio (`float`, *optional*): In place of the checkpoint's: the budget of evaluation and, for the
            paper's objective, of training.
        relative_base (`bool`, defaults to `False`): Names a base that is a folder by its path from the output, so
            that both open wherever they are moved together.
    """

    model_name_or_path: str = field(metadata={"help": "Hub id or folder"})
    train_data: str = field(metadata={"help": "JSON or JSON Lines file"})
    eval_data: str | None = None
    image_folder: str | None = None
    data_share: float = 1.0
    strict: bool = False
    max_length: int | None = None
    pruner_ratio: float | None = None
    relative_base: bool = False


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
        arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    parser = HfArgumentParser((PrunerDataArguments, PrunerTrainingArguments), allow_abbrev=False)
    data, training, unknown = parser.parse_args_into_dataclasses(
        [*arguments, *flags], look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise ValueError(f"Unknown settings: {' '.join(unknown)}")
    return data, training


def train(data: PrunerDataArguments, training: PrunerTrainingArguments) -> PrunerTrainer:
    """Trains a pruner, from the last checkpoint in `training.output_dir` if there is one, and saves it there, with
    the processor and `training.json`: settings, cost and log.

    Raises:
        `ValueError`: where the output is the base's folder, or settings or data do not allow a training.
    """
    output = Path(training.output_dir)
    if output.resolve() == Path(data.model_name_or_path).resolve():
        raise ValueError(f"output_dir {output} holds the base, which the pruner would replace.")
    if data.relative_base and not Path(data.model_name_or_path).is_dir():
        raise ValueError(f"relative_base is for a base in a folder, and there is none at {data.model_name_or_path}.")
    processor = load_processor(data.model_name_or_path)
    samples = load_samples(data.train_data, data.image_folder, data.data_share, training.seed, data.strict)
    evaluation = None
    if data.eval_data is not None:
        evaluation = load_samples(data.eval_data, data.image_folder, strict=data.strict)
    fields = {} if data.pruner_ratio is None else {"pruner_ratio": data.pruner_ratio}
    torch.manual_seed(training.seed)  # of a fresh pruner's weights
    model = LearnPrunerForConditionalGeneration.from_pretrained(data.model_name_or_path, **fields)
    collator = PrunerCollator(processor, data.max_length, foreground="boxes" in samples.column_names)
    trainer = PrunerTrainer(model, training, collator, samples, evaluation)
    model.print_trainable_parameters()
    last = get_last_checkpoint(training.output_dir) if output.is_dir() else None
    metrics = trainer.train(resume_from_checkpoint=last).metrics
    if trainer.is_world_process_zero():
        config = model.config
        base = config.base_model_name_or_path
        if data.relative_base:
            config.base_model_name_or_path = f"./{Path(os.path.relpath(base, output)).as_posix()}"
        # Not trainer.save_model: it would add a pickle of the arguments.
        model.eval().save_pretrained(output)
        processor.save_pretrained(output)
        record = {
            "objective": training.objective,
            "budgets": training.budgets if training.objective == "default" else [config.pruner_ratio],
            "samples": len(samples),
            "steps": trainer.state.max_steps,
            "samples_a_step": training.train_batch_size * training.gradient_accumulation_steps * training.world_size,
            "learning_rate": training.learning_rate,
            "seed": training.seed,
            "device": str(training.device),
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "metrics": metrics,
            "log": trainer.state.log_history,
        }
        (output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        config.base_model_name_or_path = base
    return trainer
