# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""LLaVA (1.5 shape) with LearnPruner (arXiv 2604.23950)."""

import math

import torch
from transformers import LlavaForConditionalGeneration, LlavaModel, PreTrainedConfig

from .configuration_learnpruner import LearnPrunerLlavaConfig
from .head_learnpruner import PrunedGenerationMixin
from .hub_learnpruner import HubMixin
from .model_learnpruner import PrunedModelMixin
from .prompt_learnpruner import Prompt


class PrunedLlavaModelMixin(PrunedModelMixin):
    """What LLaVA and LLaVA-NeXT share: pixels through a tower, one layer of which the projector reads."""

    pixel_arguments = ("pixel_values",)
    grid_arguments = ("image_sizes",)
    feature_arguments = ("vision_feature_layer", "vision_feature_select_strategy")

    @staticmethod
    def encoder_width(config: PreTrainedConfig) -> int:
        layers = config.vision_feature_layer
        return config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))

    def vision_kinds(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        return self.marks(self.config.image_token_id, input_ids, inputs_embeds).to(torch.int8)

    def encode_images(self, arguments: dict, prompt: Prompt) -> dict:
        if arguments.get("pixel_values") is None:
            return arguments
        # Sizes are given as the host read them: from a tensor, the stock model would read them for each image.
        given = {name: arguments.get(name) for name in (*self.pixel_arguments, *self.feature_arguments)}
        encoded = self.get_image_features(**given, image_sizes=prompt.grids.get("image_sizes"), return_dict=True)
        return {**arguments, "pixel_values": None, "mm_encoder_outputs": {"image": encoded}}

    def encoder_features(self, arguments: dict) -> dict[str, torch.Tensor]:
        # The hidden states that the stock model gives its projector, `(crops, patches, d)`.
        outputs, layers = arguments["mm_encoder_outputs"]["image"], arguments.get("vision_feature_layer")
        layers = self.config.vision_feature_layer if layers is None else layers
        strategy = arguments.get("vision_feature_select_strategy") or self.config.vision_feature_select_strategy
        if outputs.hidden_states is None:
            raise ValueError(
                "The pruner reads the vision encoder's hidden states, and mm_encoder_outputs has none: pass what "
                "model.get_image_features(..., return_dict=True) returned."
            )
        start = int(strategy == "default")  # which leaves out the [CLS] token
        levels = [outputs.hidden_states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        return {"image": torch.cat([level[:, start:] for level in levels], dim=-1)}

    @staticmethod
    def first_image(inputs: dict, image_processor) -> torch.Tensor:
        return inputs["pixel_values"].flatten(0, -4)[0].permute(1, 2, 0)  # of LLaVA-NeXT's crops, the whole

    @staticmethod
    def token_side(processor) -> int:
        return processor.patch_size


class LearnPrunerLlavaModel(PrunedLlavaModelMixin, LlavaModel):
    config: LearnPrunerLlavaConfig

    def lay_out(self, modality: str, values: torch.Tensor, arguments: dict, prompt: Prompt) -> list[torch.Tensor]:
        images = arguments["mm_encoder_outputs"]["image"].pooler_output
        # Towers of native resolution put all images behind one another in a batch of one.
        return list(values.flatten(0, 1).split([len(image) for image in images]))

    def grids(self, modality: str, arguments: dict, prompt: Prompt) -> list[list[tuple[int, int]]]:
        sizes = [len(image) for image in arguments["mm_encoder_outputs"]["image"].pooler_output]
        return [[(math.isqrt(size),) * 2] * (math.isqrt(size) ** 2 == size) for size in sizes]


class LearnPrunerLlavaForConditionalGeneration(HubMixin, PrunedGenerationMixin, LlavaForConditionalGeneration):
    """[`LlavaForConditionalGeneration`] on fewer vision tokens. See [`LearnPrunerLlavaConfig`]."""

    config: LearnPrunerLlavaConfig
    model_class = LearnPrunerLlavaModel
