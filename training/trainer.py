# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""A `Trainer` for the pruner alone: every budget at once, taught by the unpruned model, judged by real cuts."""

import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_utils import has_length

from learnpruner.hub_learnpruner import HubMixin
from learnpruner.scorer_learnpruner import top_k

from .metrics import ExactMatch
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

    With `load_best_model_at_end` the best is the one of the highest `accuracy`, unless `metric_for_best_model` says
    otherwise.
    """

    objective: str = field(default="default", metadata={"help": "default or paper"})
    budgets: list[float] = field(default_factory=lambda: [1 / 3, 2 / 9, 1 / 9, 1 / 18])
    distillation: float = 1.0
    temperature: float = 1.0
    final_temperature: float = 0.1
    # Collators read the columns of samples themselves, and foreground is no argument of forward.
    remove_unused_columns: bool = False

    def __post_init__(self):
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "accuracy"
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


def predicted_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row, `(batch, sequence)` int64, so that evaluation holds no logits."""
    return logits.argmax(-1)


def answer_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of samples whose answer tokens were all the likeliest, each after the true ones before it: `accuracy`."""
    pairs = [
        (tokens[:-1][row], true[1:][row])
        for tokens, true in zip(prediction.predictions, prediction.label_ids)
        if (row := true[1:] != -100).any()
    ]
    given, true = ([" ".join(map(str, tokens)) for tokens in side] for side in zip(*pairs))
    return {"accuracy": ExactMatch().compute(predictions=given, references=true)["exact_match"]}


class PrunerTrainer(Trainer):
    """Trains the pruner of a LearnPruner model and nothing else; the base is frozen when the trainer is made.

    Takes a model of this project, and what else `Trainer` takes. Checkpoints hold the pruner alone. Evaluation cuts
    for real, at the configuration's ratio, and unless another `compute_metrics` is given reports `accuracy`: the share
    of answers that are right token by token. Logs carry the mean gate (`keep_rate`) and how undecided the keep
    probabilities are (`gate_entropy`, in bits). Where batches have `foreground`, `(batch, sequence)` bool
    ([`PrunerCollator`] makes it of boxes), logs and evaluation carry `foreground_recall`: the share of those tokens
    that the first cut keeps (in training that it would keep, by score).

    A [`PeftModel`] over a model of this project trains its adapters and, named in `modules_to_save`, the pruner with
    them; its checkpoints are adapters, and its teacher is the base without them.

    Raises:
        `ValueError`: for another model, adapters that leave the pruner out, a loss of one's own or label smoothing
            (the shipped forward has the loss), several GPUs in one process (start one for each: `accelerate launch`),
            and no samples.
        `FloatingPointError`: while training, where a loss is not finite. The batch is saved beside the checkpoints.
    """

    def __init__(
        self,
        model,
        args: PrunerTrainingArguments,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        **kwargs,
    ):
        pruned = model.get_base_model() if isinstance(model, PeftModel) else model
        if not isinstance(pruned, HubMixin):
            raise ValueError(
                f"PrunerTrainer trains the pruner of a LearnPruner model, got {type(pruned).__name__}: load one with "
                "LearnPrunerForConditionalGeneration.from_pretrained."
            )
        if args.label_smoothing_factor or kwargs.get("compute_loss_func") is not None:
            raise ValueError("The shipped forward has the loss: no label_smoothing_factor and no compute_loss_func.")
        if args.n_gpu > 1:
            raise ValueError(f"One process with {args.n_gpu} GPUs: start one for each, with `accelerate launch`.")
        if model is pruned:
            model.train_pruner_only()
        elif not any(parameter.requires_grad for parameter in pruned.model.pruner.parameters()):
            raise ValueError("The adapters leave the pruner out: LoraConfig(..., modules_to_save=['pruner']).")
        if kwargs.get("compute_metrics") is None:
            kwargs |= {"compute_metrics": answer_accuracy, "preprocess_logits_for_metrics": predicted_tokens}
        for name, data in (("train", train_dataset), ("evaluation", eval_dataset)):
            if data is not None and has_length(data) and len(data) == 0:
                raise ValueError(f"The {name} data set has no samples.")
        with _as_adapter(pruned):
            super().__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)
        self._recorded: list[torch.Tensor] = []
        # Foreground tokens kept by the first cut, and all of them, of each batch.
        self._foreground: dict[bool, list[torch.Tensor]] = {True: [], False: []}

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As `Trainer.train`; its metrics, in the log and in what is returned, have `trained_parameters` and
        `peak_memory_bytes`: of the GPU, or else of the process.

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
        before = record
        if isinstance(resume_from_checkpoint, str | Path):
            before = Path(resume_from_checkpoint).parent / RUN_FILE
        if resume_from_checkpoint and before.exists():
            known = json.loads(before.read_text())
            differ = [f"{name} {known.get(name)!r}, not {run[name]!r}" for name in run if known.get(name) != run[name]]
            if differ:
                raise ValueError(f"{before.parent} holds another run ({'; '.join(differ)}): choose another output_dir.")
        if self.is_world_process_zero():
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(run, indent=1) + "\n")
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        output.metrics["trained_parameters"] = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        output.metrics["peak_memory_bytes"] = peak_memory(args.device)
        return output

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
        inputs = dict(inputs)
        foreground = inputs.pop("foreground", None)
        if not model.training:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if foreground is not None:
                kept = foreground if outputs.kept_mask is None else foreground & outputs.kept_mask[0]
                self._foreground[False].append(torch.stack([kept.sum(), foreground.sum()]))
            return (loss, outputs) if return_outputs else loss
        recorded: list[torch.Tensor] = []
        gate = RecordedGate(self.model.config.pruner_diversity, self.make_gate(), recorded)
        gated = {**inputs, "schedule": with_gate(self.model.config, gate, self.step_ratio())}
        try:
            loss, outputs = super().compute_loss(model, gated, True, num_items_in_batch)
        except FloatingPointError as error:
            raise self._stop(inputs, str(error)) from error
        if self.args.objective == "default" and self.args.distillation:
            loss = loss + self.args.distillation * self._distillation(model, inputs, outputs.logits, num_items_in_batch)
        if not loss.isfinite():
            raise self._stop(inputs, f"The loss is {loss.item()}.")
        self._recorded += recorded
        if foreground is not None and recorded:
            (scores,) = outputs.vision_scores
            scored = ~scores.isnan()
            wanted = (torch.stack(recorded)[:, 0].mean() * scored.sum(1)).round()
            kept = top_k(scores, scored, wanted) & foreground
            self._foreground[True].append(torch.stack([kept.sum(), foreground.sum()]))
        return (loss, outputs) if return_outputs else loss

    def _distillation(self, model, inputs, logits, num_items_in_batch) -> torch.Tensor:
        """KL(unpruned || gated) over the rows that predict an answer token, weighted as the cross-entropy is."""
        prompt = {name: value for name, value in inputs.items() if name != "labels"}
        model = self.accelerator.unwrap_model(model)
        with torch.no_grad(), model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
            teacher = model(**prompt, pruner_ratio=1.0).logits
        rows = inputs["labels"][:, 1:] != -100
        student, teacher = (values[:, :-1][rows].float().log_softmax(-1) for values in (logits, teacher))
        divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
        if num_items_in_batch is None:
            return divergence / rows.sum().clamp_min(1)
        # The items are those of all processes, whose gradients are averaged: as the stock trainer does with its loss.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return divergence / num_items_in_batch * processes

    def _stop(self, inputs: dict, reason: str) -> FloatingPointError:
        step = self.state.global_step
        path = Path(self.args.output_dir) / f"batch-of-step-{step}-{self.args.process_index}.pt"
        torch.save({name: value.cpu() for name, value in inputs.items() if torch.is_tensor(value)}, path)
        return FloatingPointError(
            f"Stopped in step {step}, at a ratio of {self.step_ratio():.4g}: {reason} The batch is in {path} "
            "(torch.load): look at its pixel_values and labels; if they are sound, lower learning_rate, and go on from "
            "the last checkpoint."
        )

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._foreground[False].clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        counts = torch.zeros(2, dtype=torch.int64, device=self.args.device)
        kept, known = self.accelerator.reduce(counts + sum(self._foreground[False]), reduction="sum").tolist()
        if known:
            output.metrics[f"{metric_key_prefix}_foreground_recall"] = kept / known
        return output

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            if self._recorded:
                _, logs["keep_rate"], logs["gate_entropy"] = torch.stack(self._recorded).mean(0).tolist()
            kept, known = torch.stack(self._foreground[True]).sum(0).tolist() if self._foreground[True] else (0, 0)
            if known:
                logs["foreground_recall"] = kept / known
            self._recorded.clear()
            self._foreground[True].clear()
        super().log(logs, *args, **kwargs)


@contextmanager
def _as_adapter(model) -> Iterator[None]:
    """`Trainer` refuses a quantised model without adapters, and does not know that the pruner is one."""
    quantized = vars(model).pop("is_quantized", None)
    try:
        yield
    finally:
        if quantized is not None:
            model.is_quantized = quantized


def peak_memory(device: torch.device) -> int:
    """Bytes that the process has held at most: on a GPU those of tensors, on the host all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    # Linux counts kibibytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
