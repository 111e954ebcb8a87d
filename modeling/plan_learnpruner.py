# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""One call's way through a schedule of cuts: what was asked, what is planned before the decoder, what was decided."""

from copy import copy
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from .cuts_learnpruner import Cut, EncodedImages, LearnedScore
from .prompt_learnpruner import MODALITIES, Prompt, send


def plan_counts(
    lengths: list[int], owners: list[int], sizes: list[int], schedule: tuple[Cut, ...]
) -> tuple[list[list[int]], list[list[int]]]:
    """How many tokens each cut keeps, from the numbers of tokens alone.

    Args:
        lengths (`list[int]`): Rows of each sample that are not padding.
        owners (`list[int]`): The sample of each part.
        sizes (`list[int]`): Vision tokens of each part.
        schedule (`tuple[Cut, ...]`): The cuts, by ascending layer.

    Returns:
        `tuple`: for each cut, how many tokens of each part it may keep; and for each sample: text tokens, vision tokens
        before the first cut, and after each.
    """
    kept = [sizes]
    for cut in schedule:
        kept.append([min(before, max(1, cut.keep(size))) for before, size in zip(kept[-1], sizes)])
    counts = []
    for sample, length in enumerate(lengths):
        own = [sum(count for count, owner in zip(counts, owners) if owner == sample) for counts in kept]
        counts.append([length - own[0], *own])
    return kept[1:], counts


@dataclass
class Parts:
    """The parts of a prompt that have a budget of their own: images, or groups of a video's frames.

    Attributes:
        prompt ([`Prompt`]): Where they are.
        features (`list[torch.Tensor]`, each `(tokens, d)`): Of each part; rows of NaN are structure.
        kinds (`list[int]`): The kind of each part's placeholders, as in [`Prompt`].
        owners (`list[int]`): The sample of each part.
    """

    prompt: Prompt
    features: list[torch.Tensor]
    kinds: list[int]
    owners: list[int]

    @classmethod
    def of(cls, features: dict[str, list[torch.Tensor]], prompt: Prompt) -> "Parts":
        """
        Args:
            features (`dict[str, list[torch.Tensor]]`): For each modality, its parts in the order of the prompt.

        Raises:
            `ValueError`: where the placeholders of a sample are not those of a whole number of parts.
        """
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

    def padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Features `(parts, tokens, d)`, smaller parts filled up, and which rows are there, `(parts, tokens)` bool."""
        features = pad_sequence(self.features, batch_first=True)
        length = send(self.sizes, self.device).unsqueeze(1)
        return features, torch.arange(features.shape[1], device=self.device) < length

    def to_prompt(self, values: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """`(parts, tokens)` -> `(batch, sequence)`: `rest`, with the values of each part at its placeholders."""
        for kind in set(self.kinds):
            flat = torch.cat([row[:size] for row, size, own in zip(values, self.sizes, self.kinds) if own == kind])
            rest = rest.masked_scatter(self.prompt.kinds == kind, flat.to(rest.device))
        return rest

    def ending(self, last: torch.Tensor) -> torch.Tensor:
        """The token that is its sample's `last` row, where that is a vision token: `(parts, tokens)`, bool."""
        # It belongs to the last of the sample's images, or of its videos.
        places = list(zip(self.owners, self.kinds))
        is_last = [place != after for place, after in zip(places, [*places[1:], None])]
        length, owner, kind, is_last = send([self.sizes, self.owners, self.kinds, is_last], self.device)
        ends = self.prompt.kinds.gather(1, last.unsqueeze(1)).to(self.device)[owner, 0] == kind
        marks = torch.zeros(len(self.sizes), max(self.sizes), dtype=torch.bool, device=self.device)
        return marks.scatter(1, length.unsqueeze(1) - 1, (is_last.bool() & ends).unsqueeze(1))


@dataclass
class Plan:
    """What is fixed before the decoder runs. `generate` carries it from its prompt to each forward that runs the prompt.

    Tensors of shape `(batch, sequence)` are in the caller's coordinates.

    Attributes:
        schedule (`tuple[Cut, ...]`): The cuts, by ascending layer.
        vision (`torch.Tensor` of shape `(batch, sequence)`, bool): Vision tokens of this call.
        counts (`list[list[int]]`): Of each sample: text tokens, vision tokens before the first cut, and after each.
        last (`torch.Tensor` of shape `(batch,)`, int64): Each sample's last row. It predicts the next token, so no
            cut drops it, even where it is a vision token.
        kept (`torch.Tensor` of shape `(batch, sequence)`, bool): Vision tokens that survive a cut before the decoder.
        scores (`torch.Tensor` of shape `(batch, sequence)`, float32): Its scores, NaN elsewhere.
        query_mask (`torch.Tensor` of shape `(batch, sequence)`, bool, *optional*): Text rows that may rank tokens.
        answer_length (`int`): Tokens of this call behind the prompt: candidates, or an answer run without a cache.
        gates (`torch.Tensor` of shape `(batch, sequence)`, float32, *optional*): In training, keep probabilities in
            place of a cut; 1 for text.
        probabilities (`list[torch.Tensor]`), shares (`list[float]`): Each part's, for the budget term of the loss.
    """

    schedule: tuple[Cut, ...]
    vision: torch.Tensor
    counts: list[list[int]]
    last: torch.Tensor
    kept: torch.Tensor
    scores: torch.Tensor
    query_mask: torch.Tensor | None = None
    answer_length: int = 0
    gates: torch.Tensor | None = None
    probabilities: list[torch.Tensor] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    @property
    def will_cut(self) -> bool:
        """Whether any token will leave."""
        return any(min(row[1:]) < row[1] for row in self.counts)

    @property
    def num_text(self) -> int:
        """Text rows of the sample that has most."""
        return max(text for text, *_ in self.counts)

    def lengths(self, cuts: int) -> list[int]:
        """Rows of each sample that are left behind so many cuts."""
        return [row[0] + row[1 + cuts] for row in self.counts]

    def resume(self, batch: int, sequence: int, device: torch.device) -> "Plan":
        """The plan for a forward of `generate` on `batch` rows of `sequence` columns. Behind the planned columns stands an
        answer: text that ranks nothing. The beams of a sample stand behind one another."""
        answer, beams = sequence - self.vision.shape[1], batch // len(self.vision)

        def spread(values: torch.Tensor, fill: float = 0) -> torch.Tensor:
            values = values.to(device).repeat_interleave(beams, dim=0) if beams > 1 else values.to(device)
            return F.pad(values, (0, answer), value=fill) if answer else values

        return Plan(
            schedule=self.schedule,
            vision=spread(self.vision),
            counts=[[text + answer, *rest] for text, *rest in self.counts for _ in range(beams)],
            last=self.last.to(device).repeat_interleave(beams, dim=0),
            kept=spread(self.kept),
            scores=spread(self.scores, torch.nan),
            query_mask=spread(torch.ones_like(self.vision) if self.query_mask is None else self.query_mask),
            answer_length=answer,
        )


@dataclass
class Record:
    """What the cuts of a call decided.

    Attributes:
        decisions (`list[tuple[torch.Tensor, torch.Tensor]]`): Kept mask and scores of each cut made, each
            `(batch, sequence)`.
        gated (`torch.Tensor` of shape `(batch, sequence)`, float32, *optional*): In training, the first cut's scores.
    """

    decisions: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    gated: torch.Tensor | None = None

    @property
    def kept_mask(self) -> tuple[torch.Tensor, ...] | None:
        return tuple(kept for kept, _ in self.decisions) or None

    @property
    def vision_scores(self) -> tuple[torch.Tensor, ...] | None:
        return (self.gated,) if self.gated is not None else tuple(scores for _, scores in self.decisions) or None

    def fields(self) -> dict:
        """As an output has them."""
        return {"kept_mask": self.kept_mask, "vision_scores": self.vision_scores}


class PruningCall:
    """What the classes with and without a head, and the hooks of the text model, share of one call.

    Attributes:
        schedule (`tuple[Cut, ...]`): The cuts, by ascending layer.
        query_mask (`torch.Tensor` of shape `(batch, sequence)`, bool, *optional*): Text rows that may rank tokens.
        soft (`bool`): Gate at full length instead of cutting.
        plan ([`Plan`], *optional*): Once the prompt was read and its images encoded.
        record ([`Record`]): What was decided.
    """

    # No dataclass: FSDP2 and DataParallel copy those that they find among arguments.
    def __init__(self, schedule: tuple[Cut, ...] = (), query_mask: torch.Tensor | None = None):
        self.schedule, self.query_mask, self.soft = schedule, query_mask, False
        self.plan: Plan | None = None
        self.record = Record()

    @property
    def acts(self) -> bool:
        """Whether the text model has anything to do but what the stock one does."""
        # In training, a schedule without a learned cut has nothing to gate.
        return self.plan is not None and self.plan.will_cut and not (self.soft and self.plan.gates is None)


def make_plan(call: PruningCall, model: nn.Module, arguments: dict, prompt: Prompt) -> dict:
    """Plans `call`: fixes every count on the host, and makes the cut before the decoder, if there is one.

    Args:
        model (`nn.Module`): The vision-language model without its head.
        arguments (`dict`): The stock forward's, with encoded images beside their pixels.
        prompt ([`Prompt`]): The call's.

    Returns:
        The encoded images (`mm_encoder_outputs`) that the decoder is given.

    Raises:
        `ValueError`: where the placeholders of a sample are not those of a whole number of images, or the query
            mask has another shape than the prompt.
    """
    vision, outputs = prompt.kinds > 0, arguments["mm_encoder_outputs"]
    if call.query_mask is not None and call.query_mask.shape != vision.shape:
        raise ValueError(
            f"query_mask has the shape {tuple(call.query_mask.shape)}, and input_ids {tuple(vision.shape)}: it "
            "marks rows of the prompt, (batch, sequence)."
        )
    parts = Parts.of(model.pruner_features(arguments, prompt), prompt)
    kept, counts = plan_counts(prompt.lengths, parts.owners, parts.sizes, call.schedule)
    columns = torch.arange(vision.shape[1], device=vision.device).expand_as(vision)
    call.plan = plan = Plan(
        schedule=call.schedule,
        vision=vision,
        counts=counts,
        last=columns.amax(1) if prompt.valid is None else (columns * prompt.valid).amax(1),
        kept=vision,
        scores=vision.new_full(vision.shape, torch.nan, dtype=torch.float32),
        query_mask=call.query_mask,
    )
    cut = call.schedule[0]
    if not plan.will_cut or cut.layer > 0 or (call.soft and not isinstance(cut.score, LearnedScore)):
        return outputs
    features, present = parts.padded()
    images = EncodedImages(model, features, present, parts.sizes, parts.owners, arguments, prompt, call.query_mask)
    scores = cut.score(images).to(parts.device)
    plan.scores = parts.to_prompt(scores, plan.scores)
    if call.soft:
        _gate(plan, cut.score, parts, scores, present, kept[0])
        call.record.gated = plan.scores.detach()
        return outputs
    must = parts.ending(plan.last)
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


def _gate(
    plan: Plan, score: LearnedScore, parts: Parts, scores: torch.Tensor, present: torch.Tensor, counts: list[int]
) -> None:
    patches = [row[:size][~row[:size].isnan()] for row, size in zip(scores, parts.sizes)]
    if not all(len(patch) for patch in patches):
        raise FloatingPointError("An image has no score that is a number: its pixels, or the pruner, hold NaN.")
    # Structure is kept last, so the budget is one of patches.
    plan.shares = [min(1.0, count / len(patch)) for count, patch in zip(counts, patches)]
    plan.probabilities = score.gate(patches, plan.shares)
    gates = torch.ones_like(scores).masked_scatter(present & ~scores.isnan(), torch.cat(plan.probabilities))
    plan.gates = parts.to_prompt(gates, torch.ones_like(plan.scores))
