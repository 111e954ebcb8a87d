# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""A schedule of cuts as data, and the object that carries one call through it.

A cut says where (before which decoder layer), how many (per image, from its token count alone), by what score, and by
which selection. LearnPruner is two cuts; other methods are other lists.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig

from .attention_learnpruner import attention_received
from .budget_learnpruner import keep_counts
from .configuration_learnpruner import check_pruner_field
from .layout_learnpruner import MODALITIES, PromptLayout
from .scorer_learnpruner import rank, top_k, top_k_with_diversity


@dataclass
class EncodedImages:
    """What a cut before the decoder can look at, one row per image.

    Attributes:
        model (`nn.Module`): The vision-language model without its head; holds `pruner`.
        features (`torch.Tensor` of shape `(images, tokens, d)`): Vision encoder features before the projector; rows
            of NaN are structure (LLaVA-NeXT's newlines).
        present (`torch.Tensor` of shape `(images, tokens)`, bool): False where a smaller image is filled up.
    """

    model: nn.Module
    features: torch.Tensor
    present: torch.Tensor


@dataclass
class DecoderState:
    """What a cut before decoder layer k can look at: layer k-1, as it was run, in physical coordinates.

    Attributes:
        layer (`nn.Module`): Decoder layer k-1.
        hidden_states (`torch.Tensor` of shape `(batch, length, hidden)`): Its input.
        position_embeddings: cos and sin, each `(batch or 1, length, head_dim)`.
        keys (`torch.Tensor` of shape `(batch, kv_heads, past + length, head_dim)`, or `None`): Its rotated keys.
        key_valid (`torch.Tensor` of shape `(batch, past + length)`, bool, or `None`): Keys that are not padding.
        vision (`torch.Tensor` of shape `(batch, length)`, bool): Vision tokens still there.
        queries (`torch.Tensor` of shape `(batch, length)`, bool): Text rows that may rank them.
        num_text (`int`): Text rows of the sample that has most.
        vision_scores (`torch.Tensor` of shape `(batch, length)`, float32): Scores of the cut before the decoder.
    """

    layer: nn.Module
    hidden_states: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    keys: torch.Tensor | None
    key_valid: torch.Tensor | None
    vision: torch.Tensor
    queries: torch.Tensor
    num_text: int
    vision_scores: torch.Tensor


class EncoderScore(Protocol):
    """Scores and selects before the decoder."""

    def __call__(self, images: EncodedImages) -> torch.Tensor:
        """Returns `(images, tokens)` float32, NaN for structure."""

    def select(self, scores: torch.Tensor, images: EncodedImages, counts: list[int]) -> torch.Tensor:
        """Returns `(images, tokens)` bool, `counts[i]` of image i; an infinite score must be chosen."""


class DecoderScore(Protocol):
    """Scores and selects inside the decoder."""

    def __call__(self, state: DecoderState) -> torch.Tensor:
        """Returns `(batch, length)` float32, NaN where not scored."""

    def select(self, scores: torch.Tensor, state: DecoderState, counts: torch.Tensor) -> torch.Tensor:
        """Returns `(batch, length)` bool, `counts[i]` vision tokens of sample i; an infinite score must be chosen."""


@dataclass(frozen=True)
class Cut:
    """One place where vision tokens leave the sequence.

    Attributes:
        layer (`int`): The cut falls before this 0-based decoder layer; 0 is before the decoder.
        keep (`Callable[[int], int]`): Tokens of one image before any cut -> tokens that survive this cut. A cut
            before the decoder grants them per image, a later one per sample.
        score ([`EncoderScore`] for layer 0, else [`DecoderScore`]): What ranks the tokens, and how they are chosen.
    """

    layer: int
    keep: Callable[[int], int]
    score: EncoderScore | DecoderScore


@dataclass(frozen=True)
class LearnedScore:
    """Stage 1 of LearnPruner: the LPM's keep-minus-drop logit, top-k with diversity, per image."""

    diversity: float

    def __call__(self, images: EncodedImages) -> torch.Tensor:
        return images.model.pruner(images.features)

    def gate(self, scores: list[torch.Tensor], shares: list[float]) -> list[torch.Tensor]:
        """Keep probabilities of each image's patches in training, each `(patches,)` float32.

        Args:
            scores (`list[torch.Tensor]` of shape `(patches,)`, float32): Keep minus drop logits of each image.
            shares (`list[float]`): What the budget keeps of each image's patches, in (0, 1].
        """
        return [score.sigmoid() for score in scores]

    def select(self, scores: torch.Tensor, images: EncodedImages, counts: list[int]) -> torch.Tensor:
        with torch.autocast(scores.device.type, enabled=False):
            return top_k_with_diversity(scores, images.present, counts, images.features, self.diversity)


@dataclass(frozen=True)
class TextAttention:
    """Stage 2 of LearnPruner: the attention text rows pay in the layer before the cut, top-k, per sample.

    Args:
        query (`"all"` or `"last"`): All text rows of the query, or its last alone.
    """

    query: str

    def __call__(self, state: DecoderState) -> torch.Tensor:
        if self.query == "last":
            # The last marked row; argmax finds the first of equals, so count from the right.
            last = state.queries.shape[1] - 1 - state.queries.flip(1).int().argmax(1)
            rows = last.unsqueeze(1)
        else:
            rows = state.queries.long().argsort(dim=1, stable=True)[:, state.queries.shape[1] - state.num_text :]
        received, seen = attention_received(
            state.layer.self_attn,
            state.layer.input_layernorm(state.hidden_states),
            state.position_embeddings,
            rows,
            state.queries.gather(1, rows),
            state.keys,
            state.key_valid,
        )
        return received.masked_fill(~(seen & state.vision), torch.nan)

    def select(self, scores: torch.Tensor, state: DecoderState, counts: torch.Tensor) -> torch.Tensor:
        # Columns that no text row sees rank by their stage 1 score. The two kinds are not on one scale, so each
        # column competes with its quantile among its own kind: no image starves for standing after the question.
        # A row that must be chosen ends its sample, so no text row sees it either.
        must = scores == torch.inf
        unseen = state.vision & (scores.isnan() | must)
        seen = state.vision & ~unseen
        quantile = torch.where(
            unseen,
            (rank(state.vision_scores.masked_fill(must, torch.inf), unseen) + 0.5) / unseen.sum(1, keepdim=True),
            (rank(scores, seen) + 0.5) / seen.sum(1, keepdim=True),
        )
        return top_k((-quantile).masked_fill(must, torch.inf), state.vision, counts)


def learnpruner_schedule(config: PreTrainedConfig, ratio: float | None = None) -> tuple[Cut, ...]:
    """The paper's two cuts for a configuration (arXiv 2604.23950); no cut at a ratio of 1.

    Args:
        config ([`PreTrainedConfig`]): A configuration with the fields of `PrunerConfig`.
        ratio (`float`, *optional*): In place of `config.pruner_ratio`.
    """
    ratio = config.pruner_ratio if ratio is None else ratio
    check_pruner_field("pruner_ratio", ratio)
    if ratio == 1:
        return ()
    depth, layer, stage_ratio = config.text_config.num_hidden_layers, config.pruner_layer, config.pruner_stage_ratio
    check_pruner_field("pruner_layer", layer, depth)

    def counts(num_tokens: int) -> tuple[int, int]:
        floor = min(num_tokens, config.pruner_min_tokens)
        first, second = keep_counts(num_tokens, ratio, num_layers=depth, pruner_layer=layer, stage_ratio=stage_ratio)
        return max(first, floor), max(second, floor)

    first = Cut(0, lambda tokens: counts(tokens)[0], LearnedScore(config.pruner_diversity))
    second = Cut(layer, lambda tokens: counts(tokens)[1], TextAttention(config.pruner_query))
    return (first, second) if layer < depth else (first,)


@dataclass
class PruningCall:
    """One call's way through a schedule: what was asked, what was planned, what was decided.

    Tensors of shape `(batch, sequence)` are in the caller's coordinates.

    Attributes:
        schedule (`tuple[Cut, ...]`): The cuts, by ascending layer.
        query_mask (`torch.Tensor` of shape `(batch, sequence)`, bool, *optional*): Text rows that may rank tokens.
        soft (`bool`): Gate at full length instead of cutting.
        vision (`torch.Tensor` of shape `(batch, sequence)`, bool): Vision tokens of this call.
        counts (`list[list[int]]`): For each sample, its vision tokens before the first cut and after each.
        count_table (`torch.Tensor` of shape `(batch, 1 + cuts)`, int64): The same on the device.
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
    count_table: torch.Tensor | None = None
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
        return self.counts is not None and any(min(row) < row[0] for row in self.counts)

    @property
    def kept_mask(self) -> tuple[torch.Tensor, ...] | None:
        return tuple(kept for kept, _ in self.decisions) or None

    @property
    def decided_scores(self) -> tuple[torch.Tensor, ...] | None:
        if self.gates is not None:
            return (self.vision_scores.detach(),)
        return tuple(scores for _, scores in self.decisions) or None

    def plan(self, model: nn.Module, parts: dict[str, list[torch.Tensor]], layout: PromptLayout) -> None:
        """Fixes every count on the host, and makes the cut before the decoder, if there is one.

        Args:
            model (`nn.Module`): The vision-language model without its head.
            parts (`dict[str, list[torch.Tensor]]`, each `(tokens, d)`):
                For each modality, the features of its images, in the order of the prompt.
            layout ([`PromptLayout`]): Of the prompt.

        Raises:
            `ValueError`: where the placeholders of a sample are not those of a whole number of images, or the query
                mask has another shape than the prompt.
        """
        vision, valid = layout.kinds > 0, layout.valid
        if self.query_mask is not None and self.query_mask.shape != vision.shape:
            raise ValueError(
                f"query_mask has the shape {tuple(self.query_mask.shape)}, and input_ids {tuple(vision.shape)}: it "
                "marks rows of the prompt, (batch, sequence)."
            )
        owners, kinds, features = [], [], []
        for kind, modality in enumerate(MODALITIES, 1):
            own = parts.get(modality, [])
            owners += layout.owners(modality, [len(part) for part in own])
            kinds += [kind] * len(own)
            features += own
        sizes = [len(feature) for feature in features]
        kept = [sizes]
        for cut in self.schedule:
            kept.append([min(before, max(1, cut.keep(size))) for before, size in zip(kept[-1], sizes)])
        self.vision = vision
        self.counts = [
            [sum(count for count, owner in zip(counts, owners) if owner == row) for counts in kept]
            for row in range(len(vision))
        ]
        columns = torch.arange(vision.shape[1], device=vision.device).expand_as(vision)
        self.last = columns.amax(1) if valid is None else (columns * valid).amax(1)
        self.vision_kept = vision
        self.vision_scores = vision.new_full(vision.shape, torch.nan, dtype=torch.float32)
        self.count_table = torch.tensor(self.counts, device=vision.device)
        if not self.will_cut or self.schedule[0].layer > 0:
            return
        if self.soft and not isinstance(self.schedule[0].score, LearnedScore):
            return

        # On the images' device: with a device map, or inputs left on the host, the prompt may be elsewhere.
        device = features[0].device
        length = torch.tensor(sizes, device=device)
        padded = pad_sequence(features, batch_first=True)
        present = torch.arange(padded.shape[1], device=device) < length.unsqueeze(1)
        images = EncodedImages(model, padded, present)
        cut = self.schedule[0]
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
            return
        # A sample that ends in a vision token: in the last of its images, or of its videos.
        places = list(zip(owners, kinds))
        last_part = [place != after for place, after in zip(places, [*places[1:], None])]
        ends = layout.kinds.gather(1, self.last.unsqueeze(1)).squeeze(1).to(device)
        ends = ends[torch.tensor(owners, device=device)] == torch.tensor(kinds, device=device)
        must = torch.tensor(last_part, device=device) & ends
        must = torch.zeros_like(present).scatter(1, length.unsqueeze(1) - 1, must.unsqueeze(1))
        chosen = cut.score.select(scores.masked_fill(must, torch.inf), images, kept[1])
        self.vision_kept = to_prompt(chosen, torch.zeros_like(vision))

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
        self.counts = [row for row in counts for _ in range(len(vision) // len(counts))]
        self.count_table = torch.tensor(self.counts, device=vision.device)


def check_schedule(schedule: tuple[Cut, ...], num_layers: int) -> tuple[Cut, ...]:
    """Raises `ValueError` unless the cuts ascend strictly and fall inside the decoder."""
    layers = [cut.layer for cut in schedule]
    if layers != sorted(set(layers)) or not all(0 <= layer < num_layers for layer in layers):
        raise ValueError(
            f"A schedule's cuts must fall before ascending, different layers from 0 to {num_layers - 1}, got {layers}."
        )
    return tuple(schedule)
