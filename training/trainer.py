# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""A `Trainer` for the pruner alone: every budget at once, taught by the unpruned model, judged by real cuts."""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from learnpruner.hub_learnpruner import HubMixin

from .objectives import ArgmaxGate, RecordedGate, TopKGate, with_gate

RUN_FILE = "pruner_run.json"


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

    Takes a model of this project, and what else `Trainer` takes. Checkpoints hold the pruner alone. Evaluation cuts
    for real, at the configuration's ratio. Logs carry the mean gate (`keep_rate`) and how undecided the keep
    probabilities are (`gate_entropy`, in bits).

    Raises:
        `ValueError`: for another model, a loss of one's own or label smoothing (the shipped forward has the loss), and
            several GPUs in one process (start one for each: `accelerate launch`).
    """

    def __init__(self, model, args: PrunerTrainingArguments, *rest, **kwargs):
        if not isinstance(model, HubMixin):
            raise ValueError(
                f"PrunerTrainer trains the pruner of a LearnPruner model, got {type(model).__name__}: load one with "
                "LearnPrunerForConditionalGeneration.from_pretrained."
            )
        if args.label_smoothing_factor or kwargs.get("compute_loss_func") is not None:
            raise ValueError("The shipped forward has the loss: no label_smoothing_factor and no compute_loss_func.")
        if args.n_gpu > 1:
            raise ValueError(f"One process with {args.n_gpu} GPUs: start one for each, with `accelerate launch`.")
        super().__init__(model.train_pruner_only(), args, *rest, **kwargs)
        self._recorded: list[torch.Tensor] = []

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As `Trainer.train`.

        Raises:
            `ValueError`: where a run to go on from was of another base, seed, objective or length.
        """
        config, args = self.model.config, self.args
        run = {
            "base": config.base_model_name_or_path,
            "revision": config.base_model_revision,
            "seed": args.seed,
            "objective": args.objective,
            "max_steps": args.max_steps,
            "num_train_epochs": args.num_train_epochs,
        }
        record = Path(args.output_dir) / RUN_FILE
        if resume_from_checkpoint and record.exists():
            before = json.loads(record.read_text())
            differ = [
                f"{name} {before.get(name)!r}, not {run[name]!r}" for name in run if before.get(name) != run[name]
            ]
            if differ:
                raise ValueError(
                    f"{args.output_dir} holds another run ({'; '.join(differ)}): choose another output_dir."
                )
        if self.is_world_process_zero():
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(run, indent=1) + "\n")
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def make_gate(self) -> ArgmaxGate | TopKGate:
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
        if num_items_in_batch is None:
            return divergence / rows.sum().clamp_min(1)
        # The items are those of all processes, whose gradients are averaged: as the stock trainer does with its loss.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return divergence / num_items_in_batch * processes

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self._recorded and "loss" in logs:
            logs["keep_rate"], logs["gate_entropy"] = torch.stack(self._recorded).mean(0).tolist()
            self._recorded.clear()
        super().log(logs, *args, **kwargs)
