# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""LLaVA (1.5 shape) with LearnPruner (arXiv 2604.23950)."""

import torch
from transformers import Cache, LlavaForConditionalGeneration, LlavaModel, PreTrainedConfig
from transformers.utils import can_return_tuple

from .configuration_learnpruner import LearnPrunerLlavaConfig
from .cuts_learnpruner import Cut, Schedule
from .generation_learnpruner import (
    LearnPrunerCausalLMOutputWithPast,
    PrunedGenerationMixin,
    PrunedModelMixin,
)
from .hub_learnpruner import HubMixin, register_key_conversion
from .layout_learnpruner import PromptLayout


class PrunedLlavaModelMixin(PrunedModelMixin):
    """What LLaVA and LLaVA-NeXT share: pixels through a tower, one layer of which the projector reads."""

    stock_arguments = (
        *("pixel_values", "position_ids", "past_key_values", "inputs_embeds", "vision_feature_layer"),
        *("vision_feature_select_strategy", "image_sizes", "use_cache", "mm_encoder_outputs"),
    )
    pixel_arguments = ("pixel_values",)
    grid_arguments = ("image_sizes",)
    feature_arguments = ("vision_feature_layer", "vision_feature_select_strategy")

    @staticmethod
    def encoder_width(config: PreTrainedConfig) -> int:
        layers = config.vision_feature_layer
        return config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))

    def vision_kinds(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        return self.marks(self.config.image_token_id, input_ids, inputs_embeds).to(torch.int8)

    def encode_images(self, arguments: dict, layout: PromptLayout) -> dict:
        if arguments["pixel_values"] is None:
            return arguments
        # As the host read the sizes: from a tensor, the stock model would read them for each image.
        features = {name: arguments[name] for name in (*self.pixel_arguments, *self.feature_arguments)}
        encoded = self.get_image_features(**features, image_sizes=layout.grids.get("image_sizes"), return_dict=True)
        return {**arguments, "pixel_values": None, "mm_encoder_outputs": {"image": encoded}}

    def selected_features(self, arguments: dict) -> torch.Tensor:
        """The hidden states that the stock model gives its projector, `(crops, patches, d)`."""
        outputs, layer = arguments["mm_encoder_outputs"]["image"], arguments["vision_feature_layer"]
        layer = self.config.vision_feature_layer if layer is None else layer
        strategy = arguments["vision_feature_select_strategy"] or self.config.vision_feature_select_strategy
        if outputs.hidden_states is None:
            raise ValueError(
                "The pruner reads the vision encoder's hidden states, and mm_encoder_outputs has none: pass what "
                "model.get_image_features(..., return_dict=True) returned."
            )
        levels = [outputs.hidden_states[level] for level in ([layer] if isinstance(layer, int) else layer)]
        # "default" leaves out the [CLS] token.
        return torch.cat([level[:, 1:] if strategy == "default" else level for level in levels], dim=-1)


class LearnPrunerLlavaModel(PrunedLlavaModelMixin, LlavaModel):
    config: LearnPrunerLlavaConfig

    def pruner_features(self, arguments: dict, layout: PromptLayout) -> dict[str, list[torch.Tensor]]:
        images = arguments["mm_encoder_outputs"]["image"].pooler_output
        # Towers of native resolution put all images behind one another in a batch of one.
        features = self.selected_features(arguments).flatten(0, 1)
        return {"image": list(features.split([len(image) for image in images]))}


class LearnPrunerLlavaForConditionalGeneration(HubMixin, PrunedGenerationMixin, LlavaForConditionalGeneration):
    """[`LlavaForConditionalGeneration`] that answers from fewer vision tokens. See [`LearnPrunerLlavaConfig`]."""

    config: LearnPrunerLlavaConfig
    config_class = LearnPrunerLlavaConfig
    model_class = LearnPrunerLlavaModel

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        pruner_ratio: float | None = None,
        schedule: tuple[Cut, ...] | Schedule | None = None,
        query_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> LearnPrunerCausalLMOutputWithPast:
        """The stock forward on fewer vision tokens; at a ratio of 1, or without images, the stock forward itself.

        Args:
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                As in the stock class; the label that a dropped row would predict is ignored. In training mode the
                prompt stays whole, gates weigh its vision tokens in the attention, and the loss adds a budget term.
            pruner_ratio (`float`, *optional*): In place of the configuration's, for this call.
            schedule (`tuple[Cut, ...]` or [`Schedule`], *optional*): Cuts in place of LearnPruner's two, for this call.
            query_mask (`torch.Tensor` of shape `(batch, sequence)`, bool, *optional*):
                Text rows whose attention ranks at the second cut. Defaults to all; with labels, to those before the
                first supervised one. Where all are supervised none ranks, and the first cut's scores decide.
            budget_share (`float`, *optional*, among the keyword arguments): In training with accumulated or parallel
                batches, what share of the step's images this call has, which weighs the budget term.

        Raises:
            `ValueError`: where images and placeholders do not match, or where a cut cannot be made
                (`guards_learnpruner.py` lists the cases).
        """
        return self._forward(locals())


register_key_conversion(LearnPrunerLlavaForConditionalGeneration, "llava")
register_key_conversion(LearnPrunerLlavaModel, "LlavaModel")

__all__ = ["LearnPrunerLlavaForConditionalGeneration", "LearnPrunerLlavaModel"]
