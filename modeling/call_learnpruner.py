# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The object that carries one call through a schedule of cuts."""

from copy import copy
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from .cuts_learnpruner import Cut, EncodedImages, LearnedScore
from .layout_learnpruner import MODALITIES, PromptLayout, send


@dataclass
class PruningCall:
    """One call's way through a schedule: what was asked, what was planned, what was decided.

    Tensors of shape `(batch, sequence)` are in the caller's coordinates.

    Attributes:
        schedule (`tuple[Cut, ...]`): The cuts, by ascending layer.
        query_mask (`torch.Tensor` of shape `(batch, sequence)`, bool, *optional*): Text rows that may rank tokens.
        soft (`bool`): Gate at full length instead of cutting.
        vision (`torch.Tensor` of shape `(batch, sequence)`, bool): Vision tokens of this call.
        counts (`list[list[int]]`): Of each sample: text tokens, vision tokens before the first cut, and after each.
        vision_kept (`torch.Tensor` of shape `(batch, sequence)`, bool): Survivors of a cut before the decoder.
        vision_scores (`torch.Tensor` of shape `(batch, sequence)`, float32): Its scores, NaN elsewhere.
        last (`torch.Tensor` of shape `(batch,)`, int64): Each sample's last row. It predicts the next token, so no
            cut drops it, even where it is a vision token.
        answer_length (`int`): Tokens of this call behind the prompt: candidates, or an answer run without a cache.
        gates (`torch.Tensor` of shape `(batch, sequence)`, float32): Keep probabilities, 1 for text; `soft` only.
        probabilities (`list[torch.Tensor]`), shares (`list[float]`): Each image's, for the budget term; `soft` only.
        decisions (`list[tuple[torch.Tensor, torch.Tensor]]`): Kept mask and scores of each cut made.
    """

    schedule: tuple[Cut, ...]
    query_mask: torch.Tensor | None = None
    soft: bool = False
    vision: torch.Tensor | None = None
    counts: list[list[int]] | None = None
    vision_kept: torch.Tensor | None = None
    vision_scores: torch.Tensor | None = None
    last: torch.Tensor | None = None
    answer_length: int = 0
    gates: torch.Tensor | None = None
    probabilities: list[torch.Tensor] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    decisions: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def will_cut(self) -> bool:
        """Whether any token will leave; known only after [`plan`]."""
        return self.counts is not None and any(min(row[1:]) < row[1] for row in self.counts)

    @property
    def kept_mask(self) -> tuple[torch.Tensor, ...] | None:
        return tuple(kept for kept, _ in self.decisions) or None

    @property
    def decided_scores(self) -> tuple[torch.Tensor, ...] | None:
        if self.gates is not None:
            return (self.vision_scores.detach(),)
        return tuple(scores for _, scores in self.decisions) or None

    def plan(self, model: nn.Module, arguments: dict, layout: PromptLayout) -> dict:
        """Fixes every count on the host, and makes the cut before the decoder, if there is one.

        Args:
            model (`nn.Module`): The vision-language model without its head.
            arguments (`dict`): The stock forward's, with encoded images.
            layout ([`PromptLayout`]): Of the prompt.

        Returns:
            The encoded images (`mm_encoder_outputs`) that the decoder is given.

        Raises:
            `ValueError`: where the placeholders of a sample are not those of a whole number of images, or the query
                mask has another shape than the prompt.
        """
        vision, valid, outputs = layout.kinds > 0, layout.valid, arguments["mm_encoder_outputs"]
        if self.query_mask is not None and self.query_mask.shape != vision.shape:
            raise ValueError(
                f"query_mask has the shape {tuple(self.query_mask.shape)}, and input_ids {tuple(vision.shape)}: it "
                "marks rows of the prompt, (batch, sequence)."
            )
        owners, kinds, features, parts = [], [], [], model.pruner_features(arguments, layout)
        for kind, modality in enumerate(MODALITIES, 1):
            own = parts.get(modality, [])
            owners += layout.owners(modality, [len(part) for part in own])
            kinds += [kind] * len(own)
            features += own
        sizes = [len(feature) for feature in features]
        kept = [sizes]
        for cut in self.schedule:
            kept.append([min(before, max(1, cut.keep(size))) for before, size in zip(kept[-1], sizes)])
        self.vision = self.vision_kept = vision
        self.counts = []
        for row, length in enumerate(layout.lengths):
            counts = [sum(count for count, owner in zip(counts, owners) if owner == row) for counts in kept]
            self.counts.append([length - counts[0], *counts])
        columns = torch.arange(vision.shape[1], device=vision.device).expand_as(vision)
        self.last = columns.amax(1) if valid is None else (columns * valid).amax(1)
        self.vision_scores = vision.new_full(vision.shape, torch.nan, dtype=torch.float32)
        cut = self.schedule[0]
        if not self.will_cut or cut.layer > 0 or (self.soft and not isinstance(cut.score, LearnedScore)):
            return outputs

        # On the images' device: with a device map, or inputs left on the host, the prompt may be elsewhere.
        device = features[0].device
        # A sample that ends in a vision token: in the last of its images, or of its videos.
        places = list(zip(owners, kinds))
        last_part = [place != after for place, after in zip(places, [*places[1:], None])]
        length, owner, kind_of, is_last = send([sizes, owners, kinds, last_part], device)
        padded = pad_sequence(features, batch_first=True)
        present = torch.arange(padded.shape[1], device=device) < length.unsqueeze(1)
        images = EncodedImages(model, padded, present, sizes, owners, arguments, layout, self.query_mask)
        scores = cut.score(images).to(device)

        def to_prompt(values: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
            for kind in set(kinds):
                flat = torch.cat([row[:size] for row, size, own in zip(values, sizes, kinds) if own == kind])
                rest = rest.masked_scatter(layout.kinds == kind, flat.to(rest.device))
            return rest

        self.vision_scores = to_prompt(scores, self.vision_scores)
        if self.soft:
            patches = [row[:size][~row[:size].isnan()] for row, size in zip(scores, sizes)]
            if not all(len(patch) for patch in patches):
                raise FloatingPointError("An image has no score that is a number: its pixels, or the pruner, hold NaN.")
            # Structure is kept last, so the budget is one of patches.
            self.shares = [min(1.0, count / len(patch)) for count, patch in zip(kept[1], patches)]
            self.probabilities = cut.score.gate(patches, self.shares)
            scored = present & ~scores.isnan()
            gates = torch.ones_like(scores).masked_scatter(scored, torch.cat(self.probabilities))
            self.gates = to_prompt(gates, torch.ones_like(self.vision_scores))
            return outputs
        ends = layout.kinds.gather(1, self.last.unsqueeze(1)).to(device)[owner, 0] == kind_of
        must = torch.zeros_like(present).scatter(1, length.unsqueeze(1) - 1, (is_last.bool() & ends).unsqueeze(1))
        chosen = cut.score.select(scores.masked_fill(must, torch.inf), images, kept[1])
        self.vision_kept = to_prompt(chosen, torch.zeros_like(vision))
        if cut.merge is None:
            return outputs
        merged = [row[:size] for row, size in zip(cut.merge(images, chosen), sizes)]
        outputs = {modality: copy(output) for modality, output in outputs.items()}
        for kind, modality in enumerate(MODALITIES, 1):
            if modality in parts:
                outputs[modality].pooler_output = [row for row, own in zip(merged, kinds) if own == kind]
        return outputs

    def to_arguments(self, start: int) -> dict[str, torch.Tensor | list]:
        """The plan, its tensors for beams to expand; `start` columns stand before those that were planned."""
        return {
            "vision_kept": F.pad(self.vision_kept, (start, 0)),
            "vision_scores": F.pad(self.vision_scores, (start, 0), value=torch.nan),
            "vision_last": self.last,
            "vision_counts": self.counts,
        }

    def resume(self, vision: torch.Tensor, plan: dict[str, torch.Tensor | list]) -> None:
        """Takes over a plan from [`to_arguments`]. Behind its columns stands an answer: text that ranks nothing."""
        kept, self.last, counts = plan["vision_kept"], plan["vision_last"], plan["vision_counts"]
        self.answer_length = vision.shape[1] - kept.shape[1]
        behind = (0, self.answer_length)
        self.vision = F.pad(vision[:, : kept.shape[1]], behind)
        self.vision_kept = F.pad(kept, behind)
        self.vision_scores = F.pad(plan["vision_scores"], behind, value=torch.nan)
        self.query_mask = F.pad(self.query_mask, behind)
        # The beams of a sample stand behind one another.
        counts = [[text + self.answer_length, *rest] for text, *rest in counts]
        self.counts = [row for row in counts for _ in range(len(vision) // len(counts))]
