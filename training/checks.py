# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Settings that `PrunerTrainer` refuses, and what would train no pruner in silence: precisions that lose its gradient,
steps that bring it none, and runs without any."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainingArguments

NO_DEEPSPEED = (
    "PrunerTrainer has not been made for DeepSpeed, which would save the whole base: use data parallelism "
    "(`accelerate launch`), or FSDP2 where the base does not fit."
)


def check_arguments(args: TrainingArguments, options: dict) -> None:
    """Raises `ValueError` for arguments of a [`Trainer`], and its further `options`, that a pruner is not trained
    with."""
    if args.label_smoothing_factor or options.get("compute_loss_func") is not None:
        raise ValueError("The shipped forward has the loss: no label_smoothing_factor and no compute_loss_func.")
    if args.n_gpu > 1:
        raise ValueError(f"One process with {args.n_gpu} GPUs: start one for each, with `accelerate launch`.")
    # The first is the user's argument; `accelerate launch` makes the plugin alone.
    if args.deepspeed or args.deepspeed_plugin is not None:
        raise ValueError(NO_DEEPSPEED)


def check_precision(text_model: nn.Module, args: TrainingArguments) -> None:
    """Raises `ValueError` where dropped tokens get no gradient: a hard forward, computed in float16."""
    autocast = torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else None
    if args.objective != "default" and (autocast or text_model.dtype) == torch.float16:
        raise ValueError(
            f"In float16 a dropped token has no gradient, from which the objective {args.objective!r} learns: set "
            "bf16=True, load the base in bfloat16 or float32, or take objective='default'."
        )


class GradientCheck(TrainerCallback):
    """Stops a training whose optimizer step would find no gradient of the pruner: raises `RuntimeError`, which names
    the cause. `came` says whether any step's was more than zeros, in this process: `()` bool, or None before a step."""

    def __init__(self, pruner: nn.Module):
        self.pruner = pruner
        self.came: torch.Tensor | None = None

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.pruner.parameters() if parameter.requires_grad]

    def on_train_begin(self, args, state, control, **kwargs):
        self.came = None

    def on_step_begin(self, args, state, control, **kwargs):
        if not self._trained():
            raise RuntimeError("The pruner would get no gradient: it was frozen after the trainer was made.")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        gradients = [parameter.grad for parameter in self._trained()]
        # A batch that gates nothing gives zeros.
        if any(gradient is None for gradient in gradients):
            raise RuntimeError(
                "The pruner, or a part of it, got no gradient: the loss does not come from what the model returned "
                "with gradients enabled. Look at the compute_loss of the trainer's class."
            )
        # No wait for the device: it is read when a checkpoint is saved. Of a shared gradient this process has a part.
        own = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        came = torch.stack([gradient.any() for gradient in own]).any()
        self.came = came if self.came is None else self.came | came


def check_learned(learned: bool) -> None:
    """Raises `RuntimeError` where no step of a whole run brought the pruner a gradient."""
    if not learned:
        raise RuntimeError(
            "The run is over, and nothing was trained: in no step did the pruner get a gradient, since no sample had "
            "an image of which a cut would drop tokens. Look at how many images train_dataset has, and how large."
        )
