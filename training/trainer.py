# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""A `Trainer` for the pruner alone: every budget at once, taught by the unpruned model, judged by real cuts."""

import random
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from learnpruner.cuts_learnpruner import LearnedScore

from .objectives import ArgmaxGate, RecordedGate, TopKGate, with_gate


@dataclass
class PrunerTrainingArguments(TrainingArguments):
    """[`TrainingArguments`] and what a pruner learns from.

    > Objective

    Args:
        objective (`"default"` or `"paper"`, defaults to `"default"`):
            `"default"`: an exact-budget differentiable top-k, annealed towards the hard one, with a budget drawn for
            each step and the unpruned model as teacher. `"paper"`: straight-through argmax, cross-entropy and the
            budget term, at the configuration's ratio (LearnPruner, arXiv 2604.23950; what it leaves open is in
            `objectives.py`).
        budgets (`list[float]`, defaults to 1/3, 2/9, 1/9 and 1/18):
            Ratios of which each step draws one, so that one checkpoint serves them all. `"default"` only.
        distillation (`float`, defaults to 1.0):
            Weight of the Kullback-Leibler divergence from the unpruned model on answer tokens. `"default"` only.
        temperature, final_temperature (`float`, default to 1.0 and 0.1):
            Of the soft top-k, falling geometrically over the training. `"default"` only.
    """

    objective: str = field(default="default", metadata={"help": "default or paper"})
    budgets: list[float] = field(default_factory=lambda: [1 / 3, 2 / 9, 1 / 9, 1 / 18])
    distillation: float = 1.0
    temperature: float = 1.0
    final_temperature: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if self.objective not in ("default", "paper"):
            raise ValueError(f"objective is 'default' or 'paper', got {self.objective!r}.")
        if not self.budgets or not all(0 < budget < 1 for budget in self.budgets):
            raise ValueError(f"budgets are ratios in (0, 1), at least one, got {self.budgets}.")
        if self.distillation < 0:
            raise ValueError(f"distillation is a weight of at least 0, got {self.distillation}.")
        if not 0 < self.final_temperature <= self.temperature:
            raise ValueError(
                f"0 < final_temperature <= temperature must hold, got {self.final_temperature} and {self.temperature}."
            )


class PrunerTrainer(Trainer):
    """Trains the pruner of a LearnPruner model and nothing else; the base is frozen when the trainer is made.

    Takes what `Trainer` takes. Checkpoints hold the pruner alone. Evaluation cuts for real, at the configuration's
    ratio. Logs carry the mean keep probability (`keep_rate`) and how undecided the gates are (`gate_entropy`, in
    bits).
    """

    def __init__(self, model, args: PrunerTrainingArguments, *rest, **kwargs):
        super().__init__(model.train_pruner_only(), args, *rest, **kwargs)
        self._recorded: list[torch.Tensor] = []

    def make_gate(self) -> LearnedScore:
        """The gate of the current step."""
        diversity = self.model.config.pruner_diversity
        if self.args.objective == "paper":
            return ArgmaxGate(diversity)
        start, end = self.args.temperature, self.args.final_temperature
        progress = self.state.global_step / max(1, self.state.max_steps)
        return TopKGate(diversity, temperature=start * (end / start) ** progress)

    def step_ratio(self) -> float:
        """The budget of the current step: from the seed and the step alone, so that all processes draw the same."""
        if self.args.objective == "paper":
            return self.model.config.pruner_ratio
        return random.Random(f"{self.args.seed} {self.state.global_step}").choice(self.args.budgets)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        gate = RecordedGate(self.model.config.pruner_diversity, self.make_gate(), self._recorded)
        gated = {**inputs, "schedule": with_gate(self.model.config, gate, self.step_ratio())}
        loss, outputs = super().compute_loss(model, gated, True, num_items_in_batch)
        if self.args.objective == "default" and self.args.distillation:
            loss = loss + self.args.distillation * self._distillation(model, inputs, outputs.logits, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _distillation(self, model, inputs, logits, num_items_in_batch) -> torch.Tensor:
        """KL(unpruned || gated) over the rows that predict an answer token, weighted as the cross-entropy is."""
        prompt = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad():
            teacher = self.accelerator.unwrap_model(model)(**prompt, pruner_ratio=1.0).logits
        rows = inputs["labels"][:, 1:] != -100
        student, teacher = (values[:, :-1][rows].float().log_softmax(-1) for values in (logits, teacher))
        divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
        return divergence / (rows.sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self._recorded and "loss" in logs:
            logs["keep_rate"], logs["gate_entropy"] = torch.stack(self._recorded).mean(0).tolist()
            self._recorded.clear()
        super().log(logs, *args, **kwargs)
