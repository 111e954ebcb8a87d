# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Cuts as data: where tokens leave, how many stay, and what scores and selects them. LearnPruner is two cuts."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig

from .attention_learnpruner import Attended
from .budget_learnpruner import keep_counts
from .configuration_learnpruner import check_pruner_field
from .prompt_learnpruner import MODALITIES, Prompt, send
from .scores_learnpruner import attention_received, rank, soft_top_k, top_k, top_k_with_diversity


@dataclass
class EncodedImages:
    """What a cut before the decoder can look at: the parts of a prompt that have a budget of their own, images or
    groups of a video's frames, or samples (`by_sample`)."""

    model: nn.Module  # the vision-language model without its head; holds `pruner`
    arguments: dict  # the stock forward's, with encoded images (`mm_encoder_outputs`) beside their pixels
    prompt: Prompt
    query_mask: torch.Tensor | None  # (batch, sequence), bool: text rows that may rank tokens
    sizes: list[int]  # tokens of each part
    owners: list[int]  # the sample that each part belongs to
    kinds: list[int]  # the kind of each part's placeholders, as in `Prompt`
    features: torch.Tensor  # (parts, tokens, d): the encoder's, before the projector; rows of NaN are structure
    present: torch.Tensor  # (parts, tokens), bool: False where a smaller part is filled up
    # (parts, tokens), int64, where parts are samples: each token's number among all, part by part as they were encoded.
    order: torch.Tensor | None = None

    @classmethod
    def of(cls, model: nn.Module, arguments: dict, prompt: Prompt, query_mask: torch.Tensor | None) -> "EncodedImages":
        """Raises `ValueError` where the placeholders of a sample are not those of a whole number of parts."""
        found, parts, owners, kinds = model.pruner_features(arguments, prompt), [], [], []
        for kind, modality in enumerate(MODALITIES, 1):
            own = found.get(modality, ())
            owners += prompt.owners(modality, [len(part) for part in own])
            kinds += [kind] * len(own)
            parts += own
        features, sizes = pad_sequence(parts, batch_first=True), [len(part) for part in parts]
        present = torch.arange(features.shape[1], device=features.device) < send(sizes, features.device).unsqueeze(1)
        return cls(model, arguments, prompt, query_mask, sizes, owners, kinds, features, present)

    def by_sample(self) -> "EncodedImages":
        """The same with one part for each sample that has any: its vision tokens in the order of the prompt, all of one
        kind. What the tower lays out (grids, crops) is still of the smaller parts."""
        prompt, device = replace(self.prompt, kinds=(self.prompt.kinds > 0).to(torch.int8)), self.features.device
        owners, kinds = sorted(set(self.owners)), [1] * len(set(self.owners))
        sizes = [sum(size for size, own in zip(self.sizes, self.owners) if own == owner) for owner in owners]
        numbers = pad_sequence(torch.arange(sum(sizes), device=device).split(self.sizes), batch_first=True)
        columns = prompt.kinds.argsort(dim=1, descending=True, stable=True)[:, : max(sizes)]
        order = self.to_prompt(numbers, torch.zeros_like(prompt.kinds, dtype=torch.int64)).gather(1, columns)
        order = order.to(device)[send(owners, device)]
        present = torch.arange(max(sizes), device=device) < send(sizes, device).unsqueeze(1)
        features = torch.cat([row[:size] for row, size in zip(self.features, self.sizes)])[order]
        own = self.model, self.arguments, prompt, self.query_mask
        return EncodedImages(*own, sizes, owners, kinds, features, present, order)

    def to_prompt(self, values: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """`(parts, tokens)` -> `(batch, sequence)`: `rest`, with the values of each part at its placeholders."""
        for kind in set(self.kinds):
            flat = torch.cat([row[:size] for row, size, own in zip(values, self.sizes, self.kinds) if own == kind])
            rest = rest.masked_scatter(self.prompt.kinds == kind, flat.to(rest.device))
        return rest

    def ending(self, last: torch.Tensor) -> torch.Tensor:
        """Where a sample's `last` row is a vision token, that token: `(parts, tokens)` bool."""
        # It belongs to the last of the sample's images, or of its videos.
        is_last = [place != after for place, after in pairwise([*zip(self.owners, self.kinds), None])]
        length, owner, kind, is_last = send([self.sizes, self.owners, self.kinds, is_last], self.features.device)
        ends = self.prompt.kinds.gather(1, last.unsqueeze(1)).to(kind.device)[owner, 0] == kind
        none = torch.zeros_like(self.present)
        return none.scatter(1, length.unsqueeze(1) - 1, (is_last.bool() & ends).unsqueeze(1))


@dataclass
class DecoderState:
    """What a cut before decoder layer k can look at: layer k-1, as it was run, on the tokens still there."""

    decoder: nn.Module  # the text model
    number: int  # k-1, 0-based
    hidden_states: torch.Tensor  # (batch, length, hidden): the layer's input
    output: torch.Tensor  # (batch, length, hidden): the layer's output; its input while it is watched
    position_embeddings: tuple[torch.Tensor, torch.Tensor]  # cos and sin, each (batch or 1, length, head_dim)
    attended: Attended | None  # the layer's queries and keys; None while it has yet to run
    key_valid: torch.Tensor | None  # (batch, past + length), bool: keys that are not padding
    index: torch.Tensor  # (batch, length), int64: the row of the prompt that each is
    vision: torch.Tensor  # (batch, length), bool: vision tokens still there
    queries: torch.Tensor  # (batch, length), bool: text rows that may rank them
    num_text: int  # text rows of the sample that has most
    vision_scores: torch.Tensor  # (batch, length), float32: scores of the cut before the decoder


@dataclass(unsafe_hash=True)
class Cut:
    """One place where vision tokens leave the sequence."""

    layer: int  # the cut falls before this 0-based decoder layer; 0 is before the decoder
    # Tokens of one part before any cut -> tokens that survive this one. Where the unit is a sample, they are summed.
    keep: Callable[[int], int]
    # What ranks the tokens and chooses among them: called with the state of its place, then `select(scores, state,
    # counts)`, as `LearnedScore` before the decoder and `TextAttention` inside. An infinite score must be chosen.
    score: Any
    # For layer 0: the chosen, (images, tokens) bool -> what replaces the embeddings, (images, tokens, hidden).
    merge: Callable[[EncodedImages, torch.Tensor], torch.Tensor] | None = None
    watched: tuple[int, ...] = ()  # what the score watches run: decoder layers before `layer`, or the encoder, -1
    # What a budget is for: an image or group of frames ("part"), a whole video ("clip"), or a "sample".
    unit: str | None = None
    counts_from_content: bool = False  # whether the score decides how many tokens stay, at the cost of one wait

    def __post_init__(self):
        supported = ("sample",) if self.layer else ("part", "sample") if self.merge is None else ("part",)
        self.unit = supported[0] if self.unit is None else self.unit
        if self.unit not in supported or self.counts_from_content:
            raise ValueError(
                f"A cut before layer {self.layer} counts tokens per {' or '.join(supported)}, before it scores them; "
                f"got unit={self.unit!r}, counts_from_content={self.counts_from_content}, which is not supported yet."
            )


def watching(schedule: tuple[Cut, ...], number: int, seen: Callable[[], DecoderState | nn.Module]) -> ExitStack:
    """The block in which layer `number`, or the encoder, -1, runs. Cuts that watch it are given what `seen` makes."""
    stack = ExitStack()
    for cut in schedule:
        if number in cut.watched:
            stack.enter_context(cut.score.watch(seen()))
    return stack


class Schedule(Protocol):
    """What makes the cuts of each call: a method with its settings."""

    def cuts(self, model: nn.Module) -> tuple[Cut, ...]:
        """By ascending layer, for the headless `model`. Scores keep what they gather for one call only."""


@dataclass(unsafe_hash=True)
class TrainingFreeScore:
    """While the pruner is not trained: 1 - cosine similarity to the image's mean (or sum), top-k with diversity."""

    diversity: float

    def __call__(self, images: EncodedImages) -> torch.Tensor:
        features = images.features.float().masked_fill(~images.present.unsqueeze(-1), 0)
        return 1 - F.cosine_similarity(features, features.nansum(1, keepdim=True), dim=-1)

    def select(self, scores: torch.Tensor, images: EncodedImages, counts: list[int]) -> torch.Tensor:
        with torch.autocast(scores.device.type, enabled=False):
            return top_k_with_diversity(scores, images.present, counts, images.features, self.diversity)


@dataclass(unsafe_hash=True)
class LearnedScore(TrainingFreeScore):
    """Stage 1 of LearnPruner: the LPM's keep-minus-drop logit, top-k with diversity, per image."""

    def __call__(self, images: EncodedImages) -> torch.Tensor:
        return images.model.pruner(images.features)

    def gate(self, scores: list[torch.Tensor], shares: list[float]) -> list[torch.Tensor]:
        """Gates in training, in [0, 1], from each image's `scores` (`(patches,)`, float32) and its budget's share.
        These sum to the budget; those of a subclass may not, and then its trainer has to see to the budget."""
        return [soft_top_k(score, share * len(score)) for score, share in zip(scores, shares)]

    def harden(self, gates: list[torch.Tensor], shares: list[float]) -> list[torch.Tensor] | None:
        """What `gates` stand for, `(patches,)` bool each, if the forward is to run on that and the gradient to go
        through the gates (straight-through)."""
        return None


@dataclass(unsafe_hash=True)
class TextAttention:
    """Stage 2 of LearnPruner: the attention that all text rows, or the last, pay before the cut, top-k, per sample."""

    query: str

    def __call__(self, state: DecoderState) -> torch.Tensor:
        if self.query == "last":
            # The last marked row; argmax finds the first of equals, so count from the right.
            rows = state.queries.shape[1] - 1 - state.queries.flip(1).int().argmax(1, keepdim=True)
        else:
            rows = state.queries.long().argsort(dim=1, stable=True)[:, state.queries.shape[1] - state.num_text :]
        received, seen = attention_received(state.attended, rows, state.queries.gather(1, rows), state.key_valid)
        return received.masked_fill(~(seen & state.vision), torch.nan)

    def select(self, scores: torch.Tensor, state: DecoderState, counts: torch.Tensor) -> torch.Tensor:
        # Columns that no text row sees rank by their stage 1 score. The two kinds are not on one scale, so each
        # column competes with its quantile among its own kind: no image starves for standing after the question.
        # A row that must be chosen ends its sample, so no text row sees it either.
        must = scores == torch.inf
        unseen = state.vision & (scores.isnan() | must)
        kinds = torch.cat([unseen, state.vision & ~unseen])
        places = rank(torch.cat([state.vision_scores.masked_fill(must, torch.inf), scores]), kinds)
        quantile = torch.where(unseen, *((places + 0.5) / kinds.sum(1, keepdim=True)).chunk(2))
        return top_k((-quantile).masked_fill(must, torch.inf), state.vision, counts)


def learnpruner_schedule(config: PreTrainedConfig, ratio: float | None = None) -> tuple[Cut, ...]:
    """The paper's cuts (arXiv 2604.23950) for a `PrunerConfig`, or for another `ratio`; none at a ratio of 1."""
    ratio = config.pruner_ratio if ratio is None else ratio
    check_pruner_field("pruner_ratio", ratio)
    if ratio == 1:
        return ()
    depth, layer, stage_ratio = config.text_config.num_hidden_layers, config.pruner_layer, config.pruner_stage_ratio
    check_pruner_field("pruner_layer", layer, depth)
    counts = partial(keep_counts, ratio=ratio, num_layers=depth, pruner_layer=layer, stage_ratio=stage_ratio)
    first, second = (partial(_keep, counts, step, config.pruner_min_tokens) for step in (0, 1))
    cuts = Cut(0, first, LearnedScore(config.pruner_diversity)), Cut(layer, second, TextAttention(config.pruner_query))
    return cuts if layer < depth else cuts[:1]


def _keep(counts: Callable[[int], tuple[int, int]], step: int, floor: int, num_tokens: int) -> int:
    return max(counts(num_tokens)[step], min(num_tokens, floor))


def check_schedule(schedule: tuple[Cut, ...], num_layers: int) -> tuple[Cut, ...]:
    """Raises `ValueError` unless the cuts ascend strictly and fall inside the decoder."""
    layers = [cut.layer for cut in schedule]
    if layers != sorted(set(layers)) or not all(0 <= layer < num_layers for layer in layers):
        raise ValueError(f"A schedule's cuts must fall before ascending layers from 0 to {num_layers - 1}: {layers}.")
    return tuple(schedule)
