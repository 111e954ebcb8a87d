# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""One call's way through a schedule of cuts: what was asked, what is planned before the decoder, what was decided."""

from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import logging

from .cuts_learnpruner import Cut, EncodedImages, LearnedScore, TrainingFreeScore
from .prompt_learnpruner import MODALITIES, Prompt, send

UNTRAINED_DIVERSITY = 0.5  # the share of the first cut that goes to diversity while the pruner is not trained


@dataclass
class Plan:
    """What is fixed before the decoder runs. `generate` carries it from its prompt to the forwards that run the prompt.

    Tensors of shape `(batch, sequence)` are in the caller's coordinates.
    """

    schedule: tuple[Cut, ...]  # by ascending layer
    counts: list[list[int]]  # of each sample: text tokens, vision tokens before the first cut, and after each
    vision: torch.Tensor  # (batch, sequence), bool: vision tokens of this call
    last: torch.Tensor  # (batch,), int64: last row of each sample; it predicts the next token, so no cut drops it
    kept: torch.Tensor  # (batch, sequence), bool: vision tokens that survive a cut before the decoder
    scores: torch.Tensor  # (batch, sequence), float32: scores of that cut, NaN elsewhere
    query_mask: torch.Tensor | None = None  # (batch, sequence), bool: text rows that may rank tokens
    answer_length: int = 0  # tokens of this call behind the prompt: candidates, or an answer run without a cache
    gates: torch.Tensor | None = None  # (batch, sequence), float32: in training, keep probabilities; 1 for text
    hard: torch.Tensor | None = None  # (batch, sequence), bool: what they stand for, if the forward runs on that

    @property
    def will_cut(self) -> bool:
        return any(min(row[1:]) < row[1] for row in self.counts)

    def lengths(self, cuts: int) -> list[int]:
        """Rows of each sample that are left behind so many cuts."""
        return [row[0] + row[1 + cuts] for row in self.counts]

    def resume(self, batch: int, sequence: int, device: torch.device) -> "Plan":
        """The plan for a forward of `generate` on `batch` rows, a sample's beams behind one another, of `sequence`
        columns: the planned ones, virtual tokens in front (PEFT's), an answer: text that ranks nothing."""
        answer, beams = self.answer_length, batch // len(self.vision)
        front = sequence - self.vision.shape[1] - answer

        def spread(values: torch.Tensor, fill: float = 0) -> torch.Tensor:
            values = values.to(device).repeat_interleave(beams, dim=0) if beams > 1 else values.to(device)
            return F.pad(values, (front, answer), value=fill) if front or answer else values

        return replace(
            self,
            counts=[[front + text + answer, *rest] for text, *rest in self.counts for _ in range(beams)],
            vision=spread(self.vision),
            last=self.last.to(device).repeat_interleave(beams, dim=0) + front,
            kept=spread(self.kept),
            scores=spread(self.scores, torch.nan),
            query_mask=spread(self.query_mask),
        )


class PruningCall:
    """What the classes with and without a head, and the hooks of the text model, share of one call."""

    # No dataclass: FSDP2 and DataParallel copy those. `soft` gates in place of cutting; `zero` depends on the pruner.
    def __init__(self, schedule: tuple[Cut, ...] = (), query_mask: torch.Tensor | None = None):
        self.schedule, self.query_mask, self.soft, self.zero = schedule, query_mask, False, None
        self.plan: Plan | None = None  # once the prompt was read and its images encoded
        self.taken, self.cache = False, None  # by the text model's hooks, and the cache that they fill
        self.gated = 0  # attention modules that weighed keys
        self.decisions: list[tuple[torch.Tensor, torch.Tensor]] = []  # kept mask and scores of each cut made

    @property
    def acts(self) -> bool:
        """Whether the text model does anything but the stock one's work."""
        return self.plan is not None and self.plan.will_cut

    def records(self) -> dict[str, tuple[torch.Tensor, ...] | None]:
        """`kept_mask` and `vision_scores`, as outputs have them."""
        scores = tuple(scores for _, scores in self.decisions)
        if self.plan is not None and self.plan.gates is not None:
            scores = (self.plan.scores.detach(),)
        return {"kept_mask": tuple(kept for kept, _ in self.decisions) or None, "vision_scores": scores or None}


def count_rows(schedule: tuple[Cut, ...], images: EncodedImages) -> tuple[list[list[int]], list[list[int]]]:
    """How many tokens of each part are there before the first cut and behind each, and `counts` as in [`Plan`]."""
    kept = [images.sizes]
    for cut in schedule:
        kept.append([min(before, max(1, cut.keep(size))) for before, size in zip(kept[-1], images.sizes)])
    rows = []
    for sample, length in enumerate(images.prompt.lengths):
        own = [sum(count for count, owner in zip(counts, images.owners) if owner == sample) for counts in kept]
        rows.append([length - own[0], *own])
    return kept, rows


@torch.compiler.disable  # its sizes are the host's: inductor did not come to an end with symbols for them
def make_plan(call: PruningCall, model: nn.Module, arguments: dict, prompt: Prompt) -> dict:
    """Plans `call`: fixes every count on the host, and makes the cut before the decoder, if there is one.

    `model` is the vision-language model without its head; `arguments` are the stock forward's, with encoded images
    beside their pixels. Returns the encoded images (`mm_encoder_outputs`) that the decoder is given. Raises
    `ValueError` where images and placeholders do not match, or `call.query_mask` has another shape than the prompt.
    """
    vision, outputs = prompt.kinds > 0, arguments["mm_encoder_outputs"]
    call.query_mask = None if call.query_mask is None else call.query_mask.bool()
    if call.query_mask is not None and call.query_mask.shape != vision.shape:
        raise ValueError(f"query_mask has the shape {[*call.query_mask.shape]}, not the prompt's, {[*vision.shape]}.")
    images = EncodedImages.of(model, arguments, prompt, call.query_mask)
    kept, counts = count_rows(call.schedule, images)
    columns = torch.arange(vision.shape[1], device=vision.device).expand_as(vision)
    last = columns.amax(1) if prompt.valid is None else (columns * prompt.valid).amax(1)
    scores = vision.new_full(vision.shape, torch.nan, dtype=torch.float32)
    call.plan = plan = Plan(call.schedule, counts, vision, last, vision, scores, call.query_mask)
    cut = call.schedule[0]
    if not plan.will_cut or cut.layer > 0:
        return outputs
    wanted = kept[1]
    if cut.unit == "sample":
        images = images.by_sample()
        wanted = [counts[owner][2] for owner in images.owners]
    score = cut.score
    if isinstance(score, LearnedScore) and not (model.config.pruner_trained or call.soft):
        logging.get_logger(__name__).warning_once(
            "The pruner is not trained yet: until it is, the first cut is training-free, by the vision encoder's "
            "features alone. To train it, call model.train_pruner_only() and run a Trainer."
        )
        score = TrainingFreeScore(UNTRAINED_DIVERSITY)
    scores = score(images).to(images.features.device)
    plan.scores = images.to_prompt(scores, plan.scores)
    if call.soft:
        _gate(plan, images, scores, wanted)
        return outputs
    chosen = score.select(scores.masked_fill(images.ending(last), torch.inf), images, wanted)
    plan.kept = images.to_prompt(chosen, torch.zeros_like(vision))
    return outputs if cut.merge is None else _merge(cut, images, chosen)


def _merge(cut: Cut, images: EncodedImages, chosen: torch.Tensor) -> dict:
    """The encoded images, their embeddings merged as the cut does."""
    merged = [row[:size] for row, size in zip(cut.merge(images, chosen), images.sizes)]
    outputs = {name: copy(output) for name, output in images.arguments["mm_encoder_outputs"].items()}
    for kind in set(images.kinds):
        own = [row for row, other in zip(merged, images.kinds) if other == kind]
        outputs[MODALITIES[kind - 1]].pooler_output = own
    return outputs


def _gate(plan: Plan, images: EncodedImages, scores: torch.Tensor, counts: list[int]) -> None:
    """In training, in place of the first cut: gates."""
    patches = [row[:size][~row[:size].isnan()] for row, size in zip(scores, images.sizes)]
    if not all(len(patch) for patch in patches):
        raise FloatingPointError("An image has no score that is a number: its pixels, or the pruner, hold NaN.")
    # Structure is kept last, so the budget is one of patches.
    shares = [min(1.0, count / len(patch)) for count, patch in zip(counts, patches)]
    score, patch = plan.schedule[0].score, images.present & ~scores.isnan()
    gates = score.gate(patches, shares)
    rows = torch.ones_like(scores).masked_scatter(patch, torch.cat(gates))
    plan.gates = images.to_prompt(rows, torch.ones_like(plan.scores))
    if (hard := score.harden(gates, shares)) is not None:
        whole = send([share == 1 for share in shares], patch.device).unsqueeze(1)
        rows = (images.present & whole).masked_scatter(patch, torch.cat(hard))  # structure leaves first, as at the cut
        plan.hard = images.to_prompt(rows, torch.ones_like(plan.vision))
