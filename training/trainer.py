# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""A `Trainer` for the pruner alone: every budget at once, taught by the unpruned model, judged by real cuts."""

import json
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil
import torch
import transformers
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from transformers import EvalPrediction, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, has_length

from learnpruner.cuts_learnpruner import learnpruner_schedule
from learnpruner.guards_learnpruner import refuse_training
from learnpruner.hub_cards.checks import hub_reached
from learnpruner.hub_cards.push import pin_base
from learnpruner.hub_cards.records import tensors_digest, weights_digest
from learnpruner.hub_cards.repository import find, writable
from learnpruner.hub_learnpruner import HubMixin
from learnpruner.scores_learnpruner import top_k

from .arguments import PrunerTrainingArguments
from .checks import NO_DEEPSPEED, GradientCheck, check_arguments, check_learned, check_precision
from .fsdp import ShardedCheckpoints
from .objectives import ArgmaxGate, HardTopKGate, TopKGate, budget_loss, with_gate
from .runs import RunRecord, last_checkpoint, leave_base, read_run
from .teacher import Encoded, SharingGate, at_answers, divergence, rows_to_teach, teacher_call, trains_tower

# Of `Trainer.create_model_card`, which is not what makes the card here.
CARD_FIELDS = {"language", "model_name", "finetuned_from", "tasks", "dataset_tags", "dataset", "dataset_args"}


def predicted_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row, `(batch, sequence)` int64, so that evaluation holds no logits."""
    return logits.argmax(-1)


def answer_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of samples whose answer tokens were all the likeliest, each after the true ones before it: `accuracy`."""
    said, true = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    rows = (true != -100).any(1)
    right = ((said == true) | (true == -100)).all(1)[rows]
    return {"accuracy": float(right.mean())} if rows.any() else {}


class PrunerTrainer(ShardedCheckpoints):
    """Trains the pruner of a LearnPruner model and nothing else; the base is frozen when the trainer is made.

    Takes a model of this project, and what else `Trainer` takes. Checkpoints hold the pruner alone. Evaluation cuts
    for real, at the configuration's ratio, and unless another `compute_metrics` is given reports `accuracy`: the share
    of answers that are right token by token. Logs carry the mean gate (`keep_rate`) and how undecided the keep
    probabilities are (`gate_entropy`, in bits), of the main process. Where batches have `foreground`,
    `(batch, sequence)` bool ([`PrunerCollator`] makes it of boxes), logs and evaluation carry `foreground_recall`: the
    share of those tokens that the first cut keeps (in training that it would keep, by score).

    A [`PeftModel`] over a model of this project trains its adapters and, named in `modules_to_save`, the pruner with
    them; its checkpoints are adapters, and its teacher is the base without them. Merged, the model no longer is its
    base with a pruner, and is saved in full.

    Raises:
        `ValueError`: for another model, adapters that leave the pruner out, a loss of one's own or label smoothing
            (the shipped forward has the loss), a budget at which nothing leaves, an attention backend that cannot gate
            (any but sdpa and eager), a hard forward (the objectives `"hard"` and `"paper"`) in float16, several GPUs in
            one process (start one for each: `accelerate launch`), DeepSpeed, FSDP in its first version, with adapters,
            `push_to_hub` or no base to name, no samples, and with `push_to_hub` adapters, a base in a folder, or a
            public repository where `hub_private_repo` is set.
        `OSError`: with `push_to_hub`, without a token that may write.
        `FloatingPointError`: while training, where a loss is not finite. The batch is saved beside the checkpoints.
        `RuntimeError`: before an optimizer step for which the pruner got no gradient, and at the end of a run of which
            no step had anything to cut.
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
        check_arguments(args, kwargs)
        if args.push_to_hub and model is not pruned:
            raise ValueError(
                "Adapters are not pushed as a pruner: train with push_to_hub=False, then merge_and_unload() and "
                "push_to_hub(repo_id, merged=True)."
            )
        budgets = [pruned.config.pruner_ratio] if args.objective == "paper" else args.budgets
        for budget in budgets:
            # Counted on many tokens, so that rounding decides nothing.
            if not (cuts := learnpruner_schedule(pruned.config, budget)) or cuts[0].keep(10**6) == 10**6:
                raise ValueError(
                    f"At a ratio of {budget:.4g} the first cut drops nothing, so there is nothing to learn."
                )
            refuse_training(cuts, pruned.config.text_config, cache=None)
        check_precision(pruned.model.language_model, args)
        for name, data in (("train", train_dataset), ("evaluation", eval_dataset)):
            if data is not None and has_length(data) and len(data) == 0:
                raise ValueError(f"The {name} data set has no samples.")
        if model is pruned:
            model.train_pruner_only()
            self._base = pruned.config.base_model_name_or_path, pruned.config.base_model_revision
            if args.push_to_hub:
                pin_base(pruned, merged=False, token=args.hub_token)  # rather now than after the training
        elif not any(parameter.requires_grad for parameter in pruned.model.pruner.parameters()):
            raise ValueError("The adapters leave the pruner out: LoraConfig(..., modules_to_save=['pruner']).")
        else:
            self._base = leave_base(pruned)
        if kwargs.get("compute_metrics") is None:
            kwargs |= {"compute_metrics": answer_accuracy, "preprocess_logits_for_metrics": predicted_tokens}
        with _as_adapter(pruned):
            super().__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)
        if self.is_deepspeed_enabled:  # by an Accelerator that was made before
            raise ValueError(NO_DEEPSPEED)
        self.check_sharding()
        self._pruned = pruned
        self._seconds = 0.0
        self.add_callback(RunRecord(self))
        self._gradients = GradientCheck(pruned.model.pruner)
        self._learned = False  # in an earlier start of the run
        self.add_callback(self._gradients)
        self._recorded: list[torch.Tensor] = []
        self._images_in_step: torch.Tensor | None = None
        # Foreground tokens kept by the first cut, and all of them, of each batch.
        self._foreground: dict[bool, list[torch.Tensor]] = {True: [], False: []}

    def run_settings(self) -> dict:
        """What makes a run this one: it is not continued where any of this differs."""
        names = ("seed", "objective", "budgets", "distillation", "temperature", "final_temperature", "learning_rate")
        names += ("lr_scheduler_type", "warmup_steps", "weight_decay", "max_steps", "num_train_epochs")
        names += ("per_device_train_batch_size", "gradient_accumulation_steps")
        names += ("hard_from",) if self.args.objective == "hard" else ()
        config, data = self.model.config, self.train_dataset
        settings = {name: getattr(self.args, name) for name in names}
        settings |= {name: getattr(config, name) for name in ("pruner_ratio", "pruner_layer", "pruner_stage_ratio")}
        settings["samples"] = len(data) if data is not None and has_length(data) else None
        if isinstance(self.model, PeftModel):
            adapter = self.model.active_peft_config
            settings |= {name: getattr(adapter, name, None) for name in ("r", "lora_alpha", "lora_dropout")}
        return {"base": self._base[0], "revision": self._base[1], **settings}

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As `Trainer.train`. The metrics that it returns have, besides, `seconds` (of all starts of the run),
        `trained_parameters` and `peak_memory_bytes` (of the GPU's tensors, or else of the process). A checkpoint of the
        last step is loaded, and nothing is trained.

        Raises:
            `ValueError`: where a run to go on from was of another base, seed, objective, budgets, length and so on.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no checkpoint in {self.args.output_dir} to go on from.")
        self._seconds, self._learned = 0.0, False
        self._start = time.perf_counter()
        state = None
        if resume_from_checkpoint:
            before = read_run(Path(resume_from_checkpoint), self.run_settings())
            # Checkpoints of earlier versions do not say whether it learned.
            self._seconds, self._learned = before["seconds"], before.get("learned", True)
            state = TrainerState.load_from_json(Path(resume_from_checkpoint) / TRAINER_STATE_NAME)
        if self.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.args.device)
        if state is not None and state.global_step >= state.max_steps:
            check_learned(self._learned)
            output = self._load_finished(resume_from_checkpoint, state)
        else:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            check_learned(self.learned())
        output.metrics["seconds"] = round(self.seconds(), 1)
        output.metrics["trained_parameters"] = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        output.metrics["peak_memory_bytes"] = peak_memory(self.args.device)
        self._pruned.training_record = self._record(output.metrics)
        return output

    def _load_finished(self, checkpoint: str | Path, state: TrainerState) -> TrainOutput:
        """What was trained, and how: stock `Trainer` would begin a further step where `max_steps` lies in an epoch."""
        self.state = state
        self.share_model()
        self._load_from_checkpoint(str(checkpoint))
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        self._pruned.config.pruner_trained = True
        return TrainOutput(state.global_step, 0.0, {})

    def load_run(self, folder: str | Path) -> dict:
        """Loads what a finished run left in its output folder, and returns its record (`training.json`).

        Raises:
            `ValueError`: where it was another run.
        """
        record = read_run(Path(folder), self.run_settings())
        state = TrainerState(global_step=record["steps"], max_steps=record["steps"], log_history=record["log"])
        state.is_world_process_zero = self.is_world_process_zero()
        self._load_finished(folder, state)
        self._pruned.training_record = record
        return record

    def accuracy_at_budgets(self) -> dict[str, float]:
        """`accuracy` on the evaluation data, unpruned ("1"), at each of the budgets, and at the configuration's ratio;
        by the ratio as text. Empty where the data have no answers."""
        config, found = self._pruned.config, {}
        own, budgets = config.pruner_ratio, [] if self.args.objective == "paper" else self.args.budgets
        # A ratio written 0.1111 is the budget 1/9.
        ratios = {f"{ratio:.4g}": ratio for ratio in sorted({1.0, own, *budgets}, reverse=True)}
        try:
            for name, ratio in ratios.items():
                config.pruner_ratio = ratio
                metrics = self.predict(self.eval_dataset).metrics
                if "test_accuracy" in metrics:
                    found[name] = metrics["test_accuracy"]
        finally:
            config.pruner_ratio = own
        return found

    def record(self) -> dict | None:
        """What `training.json` says of the last training: settings, cost, log, and the sha256 of its pruner."""
        return self._pruned.training_record

    def _record(self, metrics: dict[str, float]) -> dict:
        if self.is_fsdp_enabled:
            digest = tensors_digest(self.trained_state())
        else:
            digest = weights_digest(self._pruned, pruner=True)
        record = {
            **self.run_settings(),
            "steps": self.state.max_steps,
            "processes": self.args.world_size,
            "device": str(self.args.device),
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "pruner_sha256": digest,
            "metrics": metrics,
            "log": self.state.log_history,
        }
        # As it will be read again: enumerations as strings, and no list that grows in a further training.
        return json.loads(json.dumps(record))

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Finds out whether the pruner could be pushed. The repository is made by the push, not before the training."""
        if not self.is_world_process_zero():
            return
        api, args = HfApi(token=token or self.args.hub_token), self.args
        repo_id = args.hub_model_id or Path(args.output_dir).absolute().name
        validate_repo_id(repo_id)
        with hub_reached():
            self.hub_model_id = writable(api, repo_id)
            private = args.hub_private_repo if private is None else private
            find(api, self.hub_model_id, args.hub_revision, private, create_pr=False)
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **options,
    ) -> CommitInfo | None:
        """Pushes the pruner as the model's own `push_to_hub` does, whose options these are, with the record of the
        training, to `args.hub_model_id`. Returns the commit, on the main process.

        Raises:
            `ValueError`: for `blocking=False`, and for what `Trainer` would put on a card of its own making
                (`language`, `dataset` and so on).
        """
        if not blocking:
            raise ValueError("The push reads the model, which must not change meanwhile: leave out blocking=False.")
        if others := sorted(CARD_FIELDS & set(options)):
            raise ValueError(
                f"The card is made of what was recorded, and has no {', '.join(others)}: give license and tags."
            )
        if isinstance(options.get("tags"), str):
            options["tags"] = [options["tags"]]
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        return self._pruned.push_to_hub(
            self.hub_model_id,
            commit_message=commit_message,
            token=token,
            revision=revision or self.args.hub_revision,
            private=self.args.hub_private_repo if private is None else private,
            **{"processor": self.processing_class, **options},
        )

    def seconds(self) -> float:
        """Of training, in all starts of the run."""
        return self._seconds + time.perf_counter() - self._start

    def learned(self) -> bool:
        """Whether the pruner got a gradient in the run so far; all processes must call it."""
        came = torch.zeros((), device=self.args.device)
        if self._gradients.came is not None:
            came += self._gradients.came
        return self._learned or bool(self.accelerator.reduce(came, reduction="sum"))

    def get_batch_samples(self, *args, **kwargs):
        samples, items = super().get_batch_samples(*args, **kwargs)
        own = torch.tensor(sum(map(self._pruned.model.count_parts, samples)), device=self.args.device)
        self._images_in_step = self.accelerator.gather(own).sum()
        return samples, items

    def make_gate(self) -> ArgmaxGate | TopKGate:
        """The gate of the current step."""
        diversity = self.model.config.pruner_diversity
        if self.args.objective == "paper":
            return ArgmaxGate(diversity)
        start, end = self.args.temperature, self.args.final_temperature
        progress = self.state.global_step / max(1, self.state.max_steps)
        temperature = start * (end / start) ** progress
        if self.args.objective == "hard":
            return HardTopKGate(diversity, temperature, hard=progress >= self.args.hard_from)
        return TopKGate(diversity, temperature)

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
        if inputs.get("labels") is None:
            raise ValueError("A batch has no labels, so there is nothing to learn: make it with PrunerCollator.")
        recorded: list[torch.Tensor] = []
        encoded = Encoded()
        gate = SharingGate(self.model.config.pruner_diversity, self.make_gate(), recorded, encoded)
        call = at_answers(inputs)
        gated = {**call, "schedule": with_gate(self.model.config, gate, self.step_ratio())}
        try:
            loss, outputs = super().compute_loss(model, gated, True, num_items_in_batch)
        except FloatingPointError as error:
            raise self._stop(inputs, str(error)) from error
        if self.args.objective == "paper" and recorded:
            # Accumulated batches are summed, each over the items of all: this one counts by its share of the images.
            summed = num_items_in_batch is not None and self._images_in_step is not None
            share = len(recorded) / self._images_in_step * self._processes() if summed else 1
            loss = loss + budget_loss(recorded) * share
        if self.args.objective != "paper" and self.args.distillation:
            taught = self._distillation(model, call, outputs.logits, encoded.outputs, num_items_in_batch)
            loss = loss + self.args.distillation * taught
        if not loss.isfinite():
            raise self._stop(inputs, f"The loss is {loss.item()}.")
        if recorded:
            # One row for each image: what it was to keep, what it keeps, and how undecided it is.
            self._recorded.append(torch.stack(recorded).detach())
        if foreground is not None and recorded:
            (scores,) = outputs.vision_scores
            scored = ~scores.isnan()
            wanted = (self._recorded[-1][:, 0].mean() * scored.sum(1)).round()
            kept = top_k(scores, scored, wanted) & foreground
            self._foreground[True].append(torch.stack([kept.sum(), foreground.sum()]))
        return (loss, outputs) if return_outputs else loss

    def _distillation(self, model, call, logits, encoded, num_items_in_batch) -> torch.Tensor:
        """KL(unpruned || gated) over the rows that predict an answer token, weighted as the cross-entropy is.

        `call` is of [`at_answers`], `logits` are the student's, `encoded` the images that it encoded, if any."""
        model = self.accelerator.unwrap_model(model)
        # Layers that are shared by processes (FSDP) run in all of them, or the others would wait. What `torch_compile`
        # has wrapped is no PeftModel, but self.model is.
        taught = rows_to_teach(self.model, call, every=self.is_fsdp_enabled)
        if not taught.any():
            return logits.new_zeros((), dtype=torch.float32)
        encoded = None if trains_tower(self._pruned.model) else encoded
        with torch.no_grad(), self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext():
            teacher = model(**teacher_call(call, taught, encoded, self._pruned.model.pixel_arguments)).logits
        rows = call["labels"] != -100
        summed = divergence(logits[taught], teacher, rows[taught])
        if num_items_in_batch is None:
            return summed / rows.sum().clamp_min(1)
        return summed / num_items_in_batch * self._processes()

    def _processes(self) -> int:
        """What a loss over the items of all processes is multiplied by, for their gradients are averaged."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

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
                _, logs["keep_rate"], logs["gate_entropy"] = torch.cat(self._recorded).mean(0).tolist()
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
