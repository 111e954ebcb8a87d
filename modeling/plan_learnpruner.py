# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""One call's way through a schedule of cuts: what was asked, what is planned before the decoder, what was decided."""

from copy import copy
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from .cuts_learnpruner import Cut, EncodedImages, LearnedScore
from .prompt_learnpruner import MODALITIES, Prompt, send


@dataclass
class Parts:
    """The parts of a prompt that have a budget of their own: images, or groups of a video's frames."""

    prompt: Prompt
    features: list[torch.Tensor]  # (tokens, d) of each part; rows of NaN are structure
    kinds: list[int]  # the kind of each part's placeholders, as in `Prompt`
    owners: list[int]  # the sample of each part

    @classmethod
    def of(cls, features: dict[str, list[torch.Tensor]], prompt: Prompt) -> "Parts":
        """Of each modality's features, in the order of the prompt. Raises `ValueError` where the placeholders of a
        sample are not those of a whole number of parts."""
        parts = cls(prompt, [], [], [])
        for kind, modality in enumerate(MODALITIES, 1):
            own = features.get(modality, [])
            parts.owners += prompt.owners(modality, [len(part) for part in own])
            parts.kinds += [kind] * len(own)
            parts.features += own
        return parts

    @property
    def sizes(self) -> list[int]:
        return [len(feature) for feature in self.features]

    @property
    def device(self) -> torch.device:
        # With a device map, or inputs left on the host, the prompt may be elsewhere.
        return self.features[0].device

    def counts(self, schedule: tuple[Cut, ...]) -> tuple[list[list[int]], list[list[int]]]:
        """How many tokens of each part each cut may keep, and `counts` as in [`Plan`]: from sizes alone."""
        kept = [self.sizes]
        for cut in schedule:
            kept.append([min(before, max(1, cut.keep(size))) for before, size in zip(kept[-1], self.sizes)])
        rows = []
        for sample, length in enumerate(self.prompt.lengths):
            own = [sum(count for count, owner in zip(counts, self.owners) if owner == sample) for counts in kept]
            rows.append([length - own[0], *own])
        return kept[1:], rows

    def to_prompt(self, values: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """`(parts, tokens)` -> `(batch, sequence)`: `rest`, with the values of each part at its placeholders."""
        for kind in set(self.kinds):
            flat = torch.cat([row[:size] for row, size, own in zip(values, self.sizes, self.kinds) if own == kind])
            rest = rest.masked_scatter(self.prompt.kinds == kind, flat.to(rest.device))
        return rest

    def ending(self, last: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Where a sample's `last` row is a vision token, that token: `(parts, tokens)` bool, as `present`."""
        # It belongs to the last of the sample's images, or of its videos.
        is_last = [place != after for place, after in pairwise([*zip(self.owners, self.kinds), None])]
        length, owner, kind, is_last = send([self.sizes, self.owners, self.kinds, is_last], self.device)
        ends = self.prompt.kinds.gather(1, last.unsqueeze(1)).to(self.device)[owner, 0] == kind
        return torch.zeros_like(present).scatter(1, length.unsqueeze(1) - 1, (is_last.bool() & ends).unsqueeze(1))


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
    probabilities: list[torch.Tensor] = field(default_factory=list)  # each part's, for the budget term of the loss
    shares: list[float] = field(default_factory=list)  # each part's budget, for the same

    @property
    def will_cut(self) -> bool:
        return any(min(row[1:]) < row[1] for row in self.counts)

    def lengths(self, cuts: int) -> list[int]:
        """Rows of each sample that are left behind so many cuts."""
        return [row[0] + row[1 + cuts] for row in self.counts]

    def resume(self, batch: int, sequence: int, device: torch.device) -> "Plan":
        """The plan for a forward of `generate` on `batch` rows, a sample's beams behind one another, of `sequence`
        columns: the planned ones and an answer, which is text that ranks nothing."""
        answer, beams = sequence - self.vision.shape[1], batch // len(self.vision)

        def spread(values: torch.Tensor, fill: float = 0) -> torch.Tensor:
            values = values.to(device).repeat_interleave(beams, dim=0) if beams > 1 else values.to(device)
            return F.pad(values, (0, answer), value=fill) if answer else values

        return replace(
            self,
            counts=[[text + answer, *rest] for text, *rest in self.counts for _ in range(beams)],
            vision=spread(self.vision),
            last=self.last.to(device).repeat_interleave(beams, dim=0),
            kept=spread(self.kept),
            scores=spread(self.scores, torch.nan),
            query_mask=spread(self.query_mask),
            answer_length=answer,
        )


class PruningCall:
    """What the classes with and without a head, and the hooks of the text model, share of one call."""

    # No dataclass: FSDP2 and DataParallel copy those that they find among arguments. `soft` gates instead of cutting.
    def __init__(self, schedule: tuple[Cut, ...] = (), query_mask: torch.Tensor | None = None, soft: bool = False):
        self.schedule, self.query_mask, self.soft = schedule, query_mask, soft
        self.plan: Plan | None = None  # once the prompt was read and its images encoded
        self.taken, self.cache = False, None  # by the text model's hooks, and the cache that they fill
        self.decisions: list[tuple[torch.Tensor, torch.Tensor]] = []  # kept mask and scores of each cut made

    @property
    def acts(self) -> bool:
        """Whether the text model does anything but the stock one's work: in training, only a learned cut gates."""
        return self.plan is not None and self.plan.will_cut and not (self.soft and self.plan.gates is None)

    def records(self) -> dict[str, tuple[torch.Tensor, ...] | None]:
        """`kept_mask` and `vision_scores`, as outputs have them."""
        scores = tuple(scores for _, scores in self.decisions)
        if self.plan is not None and self.plan.gates is not None:
            scores = (self.plan.scores.detach(),)
        return {"kept_mask": tuple(kept for kept, _ in self.decisions) or None, "vision_scores": scores or None}


def make_plan(call: PruningCall, model: nn.Module, arguments: dict, prompt: Prompt) -> dict:
    """Plans `call`: fixes every count on the host, and makes the cut before the decoder, if there is one.

    `model` is the vision-language model without its head; `arguments` are the stock forward's, with encoded images
    beside their pixels. Returns the encoded images (`mm_encoder_outputs`) that the decoder is given. Raises
    `ValueError` where images and placeholders do not match, or `call.query_mask` has another shape than the prompt.
    """
    vision, outputs = prompt.kinds > 0, arguments["mm_encoder_outputs"]
    call.query_mask = None if call.query_mask is None else call.query_mask.bool()
    if call.query_mask is not None and call.query_mask.shape != vision.shape:
        raise ValueError(
            f"query_mask has the shape {tuple(call.query_mask.shape)}, and input_ids {tuple(vision.shape)}: it marks "
            "rows of the prompt, (batch, sequence)."
        )
    parts = Parts.of(model.pruner_features(arguments, prompt), prompt)
    kept, counts = parts.counts(call.schedule)
    columns = torch.arange(vision.shape[1], device=vision.device).expand_as(vision)
    last = columns.amax(1) if prompt.valid is None else (columns * prompt.valid).amax(1)
    scores = vision.new_full(vision.shape, torch.nan, dtype=torch.float32)
    call.plan = plan = Plan(call.schedule, counts, vision, last, vision, scores, call.query_mask)
    cut = call.schedule[0]
    if not plan.will_cut or cut.layer > 0 or (call.soft and not isinstance(cut.score, LearnedScore)):
        return outputs
    features = pad_sequence(parts.features, batch_first=True)
    present = torch.arange(features.shape[1], device=parts.device) < send(parts.sizes, parts.device).unsqueeze(1)
    images = EncodedImages(model, features, present, parts.sizes, parts.owners, arguments, prompt, call.query_mask)
    scores = cut.score(images).to(parts.device)
    plan.scores = parts.to_prompt(scores, plan.scores)
    if call.soft:
        _gate(plan, parts, scores, present, kept[0])
        return outputs
    must = parts.ending(last, present)
    chosen = cut.score.select(scores.masked_fill(must, torch.inf), images, kept[0])
    plan.kept = parts.to_prompt(chosen, torch.zeros_like(vision))
    if cut.merge is None:
        return outputs
    merged = [row[:size] for row, size in zip(cut.merge(images, chosen), parts.sizes)]
    outputs = {modality: copy(output) for modality, output in outputs.items()}
    for kind, modality in enumerate(MODALITIES, 1):
        if kind in parts.kinds:
            outputs[modality].pooler_output = [row for row, own in zip(merged, parts.kinds) if own == kind]
    return outputs


def _gate(plan: Plan, parts: Parts, scores: torch.Tensor, present: torch.Tensor, counts: list[int]) -> None:
    """In training, in place of the first cut: gates, and what the budget term of the loss needs."""
    patches = [row[:size][~row[:size].isnan()] for row, size in zip(scores, parts.sizes)]
    if not all(len(patch) for patch in patches):
        raise FloatingPointError("An image has no score that is a number: its pixels, or the pruner, hold NaN.")
    # Structure is kept last, so the budget is one of patches.
    plan.shares = [min(1.0, count / len(patch)) for count, patch in zip(counts, patches)]
    plan.probabilities = plan.schedule[0].score.gate(patches, plan.shares)
    gates = torch.ones_like(scores).masked_scatter(present & ~scores.isnan(), torch.cat(plan.probabilities))
    plan.gates = parts.to_prompt(gates, torch.ones_like(plan.scores))
