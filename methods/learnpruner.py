# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""LearnPruner itself (arXiv 2604.23950), as a method among others, and each of its two stages alone."""

from dataclasses import dataclass

from torch import nn

from learnpruner.cuts_learnpruner import LearnedScore, TextAttention

from .base import Method, Place


@dataclass(unsafe_hash=True)
class LearnPruner(Method):
    """LearnPruner (https://arxiv.org/abs/2604.23950) with the settings of the model's configuration: the learned module
    before the decoder keeps R1, and the text's attention before layer k keeps R2 = R1 / `pruner_stage_ratio`."""

    def places(self, model: nn.Module) -> tuple[Place, ...]:
        config = model.config
        least = config.pruner_min_tokens
        first = Place(0, config.pruner_stage_ratio, LearnedScore(config.pruner_diversity), least=least)
        if config.pruner_layer == config.text_config.num_hidden_layers:
            return (first,)
        return (first, Place(config.pruner_layer, 1, TextAttention(config.pruner_query), least=least))


@dataclass(unsafe_hash=True)
class LearnedStage(LearnPruner):
    """LearnPruner's stage 1 with the whole budget."""

    def places(self, model: nn.Module) -> tuple[Place, ...]:
        return super().places(model)[:1]


@dataclass(unsafe_hash=True)
class TextStage(LearnPruner):
    """LearnPruner's stage 2 alone."""

    def check(self, model: nn.Module) -> None:
        if model.config.pruner_layer == model.config.text_config.num_hidden_layers:
            raise ValueError("pruner_layer is the number of layers: this model has no second cut. Set a smaller one.")

    def places(self, model: nn.Module) -> tuple[Place, ...]:
        return super().places(model)[1:]
