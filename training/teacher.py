# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The unpruned model as teacher, and what of a step need not be computed: a second run of the vision tower, logits that
no label asks for, and a teacher for texts without images, which pruning leaves alone."""

from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F

from .objectives import RecordedGate

# What of a step's call is the student's alone.
STUDENTS = ("labels", "shift_labels", "query_mask", "schedule", "budget_share")


def at_answers(inputs: dict) -> dict:
    """A call with labels whose logits are made only in the columns in which some row predicts a label: the same loss.

    Args:
        inputs: Among others `labels`, `(batch, sequence)` int64, -100 where there is none.

    Returns:
        The call with `logits_to_keep`, `(columns,)` int64, and `labels` and `shift_labels`, `(batch, columns)`, both
        of the token that each of these columns predicts.
    """
    labels = inputs["labels"]
    following = F.pad(labels[:, 1:], (0, 1), value=-100)
    columns = (following != -100).any(0).nonzero().squeeze(1)
    following = following[:, columns]
    # As the model would find it from all labels.
    question = (labels != -100).cumsum(1) == 0
    given = {"labels": following, "shift_labels": following, "logits_to_keep": columns, "query_mask": question}
    return {**inputs, **given}


class Encoded:
    """The images of a step as the tower encoded them for the student: `mm_encoder_outputs` of its call."""

    # No dataclass, no list: FSDP2 copies those that it finds among arguments.
    outputs: dict | None = None


@dataclass(unsafe_hash=True)
class SharingGate(RecordedGate):
    """A recorded gate that hands on the encoded images which it is shown."""

    encoded: Encoded

    def __call__(self, images) -> torch.Tensor:
        self.encoded.outputs = images.arguments["mm_encoder_outputs"]
        return super().__call__(images)


def trains_tower(model: nn.Module) -> bool:
    """Whether anything beside the language model and the pruner is trained, so that the teacher has a tower of its
    own. `model` is without its head."""
    towers = (module for name, module in model.named_children() if name not in ("language_model", "pruner"))
    return any(parameter.requires_grad for tower in towers for parameter in tower.parameters())


def teacher_call(call: dict, taught: torch.Tensor, encoded: dict | None, pixel_arguments: tuple[str, ...]) -> dict:
    """The student's call as the teacher gets it.

    Args:
        call: Of [`at_answers`].
        taught (`torch.Tensor` of shape `(batch,)`, bool): The rows to run; all rows with images are among them.
        encoded: Images in place of pixels.
        pixel_arguments: The names of pixels.
    """
    given = {name: value for name, value in call.items() if name not in STUDENTS}
    if encoded is not None:
        given |= {**dict.fromkeys(pixel_arguments), "mm_encoder_outputs": encoded}
    if not taught.all():
        shape = call["input_ids"].shape
        whole = {name for name, value in given.items() if torch.is_tensor(value) and value.shape[:2] == shape}
        given = {name: value[taught] if name in whole else value for name, value in given.items()}
    return {**given, "pruner_ratio": 1.0}


def divergence(student: torch.Tensor, teacher: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student), summed over `rows`.

    Args:
        student, teacher (`torch.Tensor` of shape `(batch, columns, vocabulary)`): Logits.
        rows (`torch.Tensor` of shape `(batch, columns)`, bool)

    Returns:
        `torch.Tensor` of shape `()`, float32.
    """
    student, teacher = (logits[rows].float().log_softmax(-1) for logits in (student, teacher))
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def rows_to_teach(model: nn.Module, inputs: dict, every: bool) -> torch.Tensor:
    """Rows whose answers pruning can change, `(batch,)` bool: those with images; or `every` row."""
    ids = inputs["input_ids"]
    if every or isinstance(model, PeftModel):
        # Adapters change what is answered to text, too.
        return torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    return (model.model.vision_kinds(ids, None) > 0).any(1)
