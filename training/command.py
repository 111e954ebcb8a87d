# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The `learnpruner train` command: a configuration file, flags that override it, and a pruner at the end."""

from dataclasses import dataclass, field
from pathlib import Path

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
    """

    model_name_or_path: str = field(metadata={"help": "Hub id or folder"})
    train_data: str = field(metadata={"help": "JSON or JSON Lines file"})
    eval_data: str | None = None
    image_folder: str | None = None
    data_share: float = 1.0
    strict: bool = False
    max_length: int | None = None
    pruner_ratio: float | None = None


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
    """Trains a pruner, from the last checkpoint in `training.output_dir` if there is one, and saves it there."""
    samples = load_samples(data.train_data, data.image_folder, data.data_share, training.seed, data.strict)
    evaluation = None
    if data.eval_data is not None:
        evaluation = load_samples(data.eval_data, data.image_folder, strict=data.strict)
    fields = {} if data.pruner_ratio is None else {"pruner_ratio": data.pruner_ratio}
    processor = load_processor(data.model_name_or_path)
    model = LearnPrunerForConditionalGeneration.from_pretrained(data.model_name_or_path, **fields)
    # The collator reads the columns itself.
    training.remove_unused_columns = False
    collator = PrunerCollator(processor, data.max_length)
    trainer = PrunerTrainer(model, training, collator, samples, evaluation)
    last = get_last_checkpoint(training.output_dir) if Path(training.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    processor.save_pretrained(training.output_dir)
    return trainer
