# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What would train no pruner in silence: precisions that lose its gradient, and steps that bring it none."""

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments


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
    the cause."""

    def __init__(self, pruner: nn.Module):
        self.pruner = pruner

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.pruner.parameters() if parameter.requires_grad]

    def on_step_begin(self, args, state, control, **kwargs):
        if not self._trained():
            raise RuntimeError("The pruner would get no gradient: it was frozen after the trainer was made.")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        # A batch that gates nothing gives zeros.
        if any(parameter.grad is None for parameter in self._trained()):
            raise RuntimeError(
                "The pruner, or a part of it, got no gradient: the loss does not come from what the model returned "
                "with gradients enabled. Look at the compute_loss of the trainer's class."
            )
