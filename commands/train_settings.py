# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The settings of `learnpruner train` that are this project's own. Without torch, so that `--help` answers at once.

Every other setting is a field of transformers' `TrainingArguments`; `RECIPE` holds those with a default of ours.
"""

import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Literal


def setting(default, text: str) -> Field:
    """A field with a default and its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class PrunerModelArguments:
    """Which model gets a pruner, and how it is loaded.

    Raises:
        `ValueError`: for settings that exclude each other.
    """

    model_name_or_path: str = field(
        metadata={"help": "base model, or a pruner to train further: Hub id or folder (required)"}
    )
    pruner_ratio: float | None = setting(
        None, "share of vision tokens kept, in place of the checkpoint's: evaluation's, and training's for the paper's"
    )
    pruner_diversity: float | None = setting(
        None, "share of the first cut that goes to diversity tokens, in place of the checkpoint's"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = setting(
        None, "precision of the base's weights; without it bfloat16 with bf16: true, else the checkpoint's own"
    )
    attn_implementation: str | None = setting(None, "attention backend; training runs on sdpa and eager")
    load_in_8bit: bool = setting(False, "quantize the language model to 8 bits (bitsandbytes)")
    load_in_4bit: bool = setting(False, "quantize the language model to 4 bits, NF4 (bitsandbytes)")
    lora_rank: int | None = setting(None, "train LoRA adapters of this rank together with the pruner (peft)")
    lora_alpha: int | None = setting(None, "scale of LoRA; without it twice the rank")
    lora_dropout: float = setting(0.0, "dropout of LoRA")
    lora_target_modules: str = setting(
        r".*language_model.*\.(q_proj|v_proj)", "regular expression: the modules that get LoRA adapters"
    )
    relative_base: bool = setting(
        False, "name a base in a folder by its path from output_dir, so that both can be moved together"
    )
    trust_remote_code: bool = setting(False, "run the code that a base brings for its processor")

    def __post_init__(self):
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit and load_in_4bit exclude each other: set one of them.")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora_rank is at least 1, got {self.lora_rank}; leave it out to train the pruner alone.")
        if self.lora_rank is not None and self.relative_base:
            raise ValueError("relative_base is for a pruner alone: leave it out, or leave out lora_rank.")


@dataclass
class PrunerDataArguments:
    """What a pruner is trained on."""

    train_data: str = field(metadata={"help": "JSON or JSON Lines file of samples (required)"})
    eval_data: str | None = setting(None, "the same for evaluation, which always runs at the end")
    image_folder: str | None = setting(None, "where relative image paths start; without it the folder of the file")
    data_share: float = setting(1.0, "share of the training samples to take, drawn by seed, in (0, 1]")
    strict: bool = setting(False, "stop at an image that cannot be read, instead of leaving its row out")
    skip_bad_rows: bool = setting(False, "leave out and count rows that are no sample, instead of stopping")
    max_length: int | None = setting(None, "tokens of the longest row; text is cut off behind it, an image never")
    foreground: bool = setting(True, "where samples have boxes, log how much of them the first cut keeps")


@dataclass(kw_only=True)
class PrunerObjectiveArguments:
    """What a pruner learns from. [`PrunerTrainingArguments`] has these fields, and describes them.

    Raises:
        `ValueError`: for a value out of range.
    """

    objective: str = setting(
        "default", "default: soft top-k, all budgets, distillation; hard: hard top-k, soft gradient; paper: argmax"
    )
    budgets: list[float] = field(
        default_factory=lambda: [1 / 3, 2 / 9, 1 / 9, 1 / 18],
        metadata={"help": "ratios of which each step draws one (not of paper); twice in the list, twice as often"},
    )
    distillation: float = setting(1.0, "weight of the divergence from the unpruned model (not of paper)")
    temperature: float = setting(1.0, "temperature of the soft top-k at the start (not of paper)")
    final_temperature: float = setting(0.1, "temperature of the soft top-k at the end (not of paper)")
    hard_from: float = setting(0.0, "share of the steps after which the forward is the hard top-k (hard only)")

    def check_objective(self) -> None:
        if self.objective not in ("default", "hard", "paper"):
            raise ValueError(f"objective is 'default', 'hard' or 'paper', got {self.objective!r}.")
        if not self.budgets or not all(0 < budget < 1 for budget in self.budgets):
            raise ValueError(f"budgets are ratios in (0, 1), at least one, got {self.budgets}.")
        if self.distillation < 0:
            raise ValueError(f"distillation is a weight of at least 0, got {self.distillation}.")
        if not 0 < self.final_temperature <= self.temperature:
            raise ValueError(
                f"0 < final_temperature <= temperature must hold, got {self.final_temperature} and {self.temperature}."
            )
        if not 0 <= self.hard_from <= 1:
            raise ValueError(f"hard_from is a share of the steps, in [0, 1], got {self.hard_from}.")


# The recipe: fields of TrainingArguments whose default is another here.
RECIPE = {
    "num_train_epochs": setting(1.0, "passes over the samples"),
    "learning_rate": setting(2e-4, "peak learning rate"),
    "lr_scheduler_type": setting("cosine", "how the learning rate falls"),
    "warmup_steps": setting(0.03, "steps until the peak learning rate; below 1, a share of all steps"),
    "logging_steps": setting(10, "steps between two lines of the log"),
}


def help_lines() -> Iterator[str]:
    """The own settings with their defaults, then the recipe's, for `--help`."""
    groups = {
        "model": {each.name: each for each in fields(PrunerModelArguments)},
        "data": {each.name: each for each in fields(PrunerDataArguments)},
        "objective": {each.name: each for each in fields(PrunerObjectiveArguments)},
        "of transformers' TrainingArguments, with this project's defaults": RECIPE,
    }
    for title, settings in groups.items():
        yield f"{title}:"
        for name, each in settings.items():
            yield from _entry(name, each)
        yield ""
    yield "Every other field of TrainingArguments is a setting, too: output_dir, max_steps, save_steps, bf16, ..."
    yield "`learnpruner train CONFIG --help` lists them all."


def _entry(name: str, each: Field) -> Iterator[str]:
    default = each.default if each.default_factory is MISSING else each.default_factory()
    if isinstance(default, list):
        default = " ".join(f"{value:.4g}" for value in default)
    shown = "" if default in (None, MISSING, False) else f" (default: {default})"
    text = f"  --{name:<22} {each.metadata['help']}{shown}"
    yield from textwrap.wrap(text, 118, subsequent_indent=" " * 27, break_long_words=False, break_on_hyphens=False)
