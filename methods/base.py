# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What every method is: settings, and the places where it cuts. Budgets are counted in one way for all."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from learnpruner.accounting import spread_budget
from learnpruner.budget_learnpruner import half_up
from learnpruner.configuration_learnpruner import check_pruner_field
from learnpruner.cuts_learnpruner import Cut, DecoderState, EncodedImages
from learnpruner.model_learnpruner import SCHEDULES
from learnpruner.prompt_learnpruner import send
from learnpruner.scores_learnpruner import top_k


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

    def watch(self, state: DecoderState) -> AbstractContextManager:
        """In which a layer of the cut's `watched` runs; the state is that before it. For the encoder, the model is."""


@dataclass(unsafe_hash=True)
class Place:
    """A cut whose budget is not counted yet.

    Attributes:
        layer (`int`): The cut falls before this 0-based decoder layer; 0 is before the decoder.
        weight (`float`): The tokens that it keeps, in proportion to the method's other cuts.
        score ([`EncoderScore`] for layer 0, else [`DecoderScore`]): What ranks the tokens, and how they are chosen.
        merge, watched, unit: As in [`Cut`].
        fits (`Callable[[int], int]`): The most tokens, up to a number, that the score can keep; any, by default.
        least (`int`): So many of each image stay, or all where it has fewer.
    """

    layer: int
    weight: float
    score: EncoderScore | DecoderScore
    merge: Callable[[EncodedImages, torch.Tensor], torch.Tensor] | None = None
    watched: tuple[int, ...] = ()
    fits: Callable[[int], int] = int
    least: int = 1
    unit: str | None = None


@dataclass(unsafe_hash=True)
class Method(ABC):
    """A pruning method with its settings: `model.generate(..., schedule=method)`.

    A subclass says in [`places`] where it cuts and by what score, and in [`check`] what a model must have for it.

    Args:
        ratio (`float`): Share of vision tokens kept, in (0, 1]; at 1 the stock model runs.
        accounting (`"mean"` or `"cap"`): Whether `ratio` is the mean over the decoder's layers, as papers count, or
            what the last cut leaves, whatever the layers before it see.

    Attributes:
        revision (`int`): Of the class: raised when what it selects changes at equal settings, so that what was measured
            before can be told apart.
    """

    revision: ClassVar[int] = 1
    ratio: float = 1 / 9
    accounting: str = field(default="mean", kw_only=True)

    def __post_init__(self):
        check_pruner_field("pruner_ratio", self.ratio)
        if self.accounting not in ("mean", "cap"):
            raise ValueError(f"accounting is 'mean' or 'cap', got {self.accounting!r}.")

    @abstractmethod
    def places(self, model: nn.Module) -> tuple[Place, ...]:
        """Where the method cuts, by ascending layer.

        Args:
            model (`nn.Module`): The vision-language model without its head.
        """

    def check(self, model: nn.Module) -> None:
        """Raises `ValueError` where `model` lacks what the method reads; before any work."""
        return

    def cuts(self, model: nn.Module) -> tuple[Cut, ...]:
        """The cuts of one call. Scores that gather something on their way do so for this call alone."""
        if self.ratio == 1:
            return ()
        self.check(model)
        places, depth = self.places(model), model.config.text_config.num_hidden_layers
        layers = [place.layer for place in places]
        if not layers or layers != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < depth:
            raise ValueError(
                f"{type(self).__name__} would cut before the layers {layers} of a decoder of {depth}: there must be "
                f"one at least, and they must ascend, from 0 to {depth - 1}."
            )
        return tuple(
            Cut(
                place.layer,
                partial(self._keep, places, depth, step),
                place.score,
                place.merge,
                place.watched,
                place.unit,
            )
            for step, place in enumerate(places)
        )

    def keep_counts(self, places: tuple[Place, ...], depth: int, num_tokens: int) -> tuple[int, ...]:
        """Tokens of one image that survive each of the places.

        Args:
            places (`tuple[Place, ...]`): By ascending layer.
            depth (`int`): Decoder layers.
            num_tokens (`int`): Vision tokens of the image.

        Raises:
            `ValueError`: where the layers before the first cut leave too little of the ratio.
        """
        weights, budget = [place.weight for place in places], self.ratio * num_tokens
        if self.accounting == "cap":
            counts = [half_up(budget * weight / weights[-1]) for weight in weights]
        else:
            try:
                counts = spread_budget(num_tokens, budget, [place.layer for place in places], weights, depth)
            except ValueError as error:
                raise ValueError(
                    f"{type(self).__name__}: {error} Raise its ratio, cut in an earlier layer, or count what the last "
                    "cut leaves: accounting='cap'."
                ) from error
        return tuple(place.fits(min(num_tokens, max(place.least, count))) for place, count in zip(places, counts))

    def _keep(self, places: tuple[Place, ...], depth: int, step: int, num_tokens: int) -> int:
        return self.keep_counts(places, depth, num_tokens)[step]

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """Every call of `model` in this block, made by the thread that entered it, is pruned by the method, unless the
        call says otherwise.

        Args:
            model ([`PreTrainedModel`]): A model of this project, with its head.
        """
        self.cuts(model.model)
        token = SCHEDULES.set((*SCHEDULES.get(), (model.model, self)))
        try:
            yield model
        finally:
            SCHEDULES.reset(token)


class TopKImages:
    """The selection of an [`EncoderScore`] that keeps the highest of each image; structure comes last, in order."""

    def select(self, scores: torch.Tensor, images: EncodedImages, counts: list[int]) -> torch.Tensor:
        return top_k(scores, images.present, send(counts, scores.device))


class TopKSamples:
    """The selection of a [`DecoderScore`] that keeps the highest of each sample."""

    def select(self, scores: torch.Tensor, state: DecoderState, counts: torch.Tensor) -> torch.Tensor:
        return top_k(scores, state.vision, counts)


def scaled_layer(layer: int, model: nn.Module, of: int = 32) -> int:
    """A layer that a paper names for a decoder of 32, at the same depth of this one: at least 1."""
    depth = model.config.text_config.num_hidden_layers
    return min(depth - 1, max(1, int(layer * depth / of + 0.5)))
