# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The settings of a training."""

from dataclasses import dataclass

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy, SchedulerType

from learnpruner_commands.train_settings import RECIPE, PrunerObjectiveArguments


@dataclass
class PrunerTrainingArguments(TrainingArguments, PrunerObjectiveArguments):
    """[`TrainingArguments`] and what a pruner learns from. The defaults are the recipe of `training/README.md`.

    > Objective

    Args:
        objective (`"default"`, `"hard"` or `"paper"`, defaults to `"default"`):
            `"default"`: an exact-budget differentiable top-k, annealed towards the hard one, with a budget drawn for
            each step and the unpruned model as teacher. `"hard"`: the same on scores that are standardised per image,
            and from the step that `hard_from` says the forward is the hard top-k itself, with the gradient of the soft
            one (straight-through). `"paper"`: straight-through argmax, cross-entropy and the
            budget term, at the configuration's ratio (LearnPruner, arXiv 2604.23950; what it leaves open is in
            `objectives.py`).
        budgets (`list[float]`, defaults to 1/3, 2/9, 1/9 and 1/18):
            Ratios of which each step draws one, so that one checkpoint serves them all: the first cut's gates sum to
            R1 of that ratio; the second cut has no part in training. A ratio that stands twice is drawn twice as often.
            Not of `"paper"`.
        distillation (`float`, defaults to 1.0):
            Weight of the Kullback-Leibler divergence from the unpruned model on answer tokens. Not of `"paper"`.
        temperature, final_temperature (`float`, default to 1.0 and 0.1):
            Of the soft top-k, falling geometrically over the training. Not of `"paper"`.
        hard_from (`float`, defaults to 0.0):
            Share of the steps after which the forward is hard: 0 from the first step, 2/3 in the last third. `"hard"`
            only.

    > Hub

    Args:
        hub_strategy (`"end"`): With `push_to_hub`, the finished pruner is pushed, by `push_to_hub`, `save_model` or the
            `train` command. Checkpoints are not: they hold pickles (optimizer, arguments).

    With `load_best_model_at_end` the best is the one of the highest `accuracy`, unless `metric_for_best_model` says
    otherwise.
    """

    num_train_epochs: float = RECIPE["num_train_epochs"]
    learning_rate: float = RECIPE["learning_rate"]
    lr_scheduler_type: SchedulerType | str = RECIPE["lr_scheduler_type"]
    warmup_steps: float = RECIPE["warmup_steps"]
    logging_steps: float = RECIPE["logging_steps"]
    # Collators read the columns of samples themselves, and foreground is no argument of forward.
    remove_unused_columns: bool = False
    hub_strategy: HubStrategy | str = "end"

    def __post_init__(self):
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "accuracy"
        if self.accelerator_config is None:
            # Each process collates its own batches of a stream: cut out of a large one, rows would lose their images.
            self.accelerator_config = {"dispatch_batches": False}
        super().__post_init__()
        if self.push_to_hub and self.hub_strategy != HubStrategy.END:
            raise ValueError("hub_strategy is 'end': checkpoints hold pickles, which are not pushed.")
        self.check_objective()
