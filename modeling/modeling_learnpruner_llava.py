# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""LLaVA (1.5 shape) with LearnPruner (arXiv 2604.23950)."""

import torch
from transformers import Cache, LlavaForConditionalGeneration, LlavaModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .configuration_learnpruner import LearnPrunerLlavaConfig
from .cuts_learnpruner import Cut
from .generation_learnpruner import LearnPrunerCausalLMOutputWithPast, PrunedGenerationMixin, PrunedModelMixin
from .hub_learnpruner import HubMixin, register_key_conversion


class LearnPrunerLlavaModel(PrunedModelMixin, LlavaModel):
    config: LearnPrunerLlavaConfig

    def pruner_features(
        self,
        outputs: BaseModelOutputWithPooling,
        image_sizes: torch.Tensor | None,
        vision_feature_layer: int | list[int] | None,
        vision_feature_select_strategy: str | None,
    ) -> list[torch.Tensor]:
        """The vision encoder's features before the projector: `(tokens, d)` for each image.

        Args:
            outputs: What `get_image_features` returned.
            The other arguments are those it was called with.
        """
        features = self.selected_features(outputs, vision_feature_layer, vision_feature_select_strategy)
        # Towers of native resolution put all images behind one another in a batch of one.
        return list(features.flatten(0, 1).split([len(image) for image in outputs.pooler_output]))


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
        schedule: tuple[Cut, ...] | None = None,
        query_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> LearnPrunerCausalLMOutputWithPast:
        """The stock forward on fewer vision tokens; at a ratio of 1, or without images, the stock forward itself.

        Args:
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                As in the stock class; the label that a dropped row would predict is ignored. In training mode the
                prompt stays whole, gates weigh its vision tokens in the attention, and the loss adds a budget term.
            pruner_ratio (`float`, *optional*): In place of the configuration's, for this call.
            schedule (`tuple[Cut, ...]`, *optional*): Cuts in place of LearnPruner's two, for this call.
            query_mask (`torch.Tensor` of shape `(batch, sequence)`, bool, *optional*):
                Text rows whose attention ranks at the second cut. Defaults to all; with labels, to those before the
                first supervised one. Where all are supervised none ranks, and the first cut's scores decide.
            budget_share (`float`, *optional*, among the keyword arguments): In training with accumulated or parallel
                batches, what share of the step's images this call has, which weighs the budget term.

        Raises:
            `ValueError`: where images and placeholders do not match, or where a cut cannot be made
                (`guards_learnpruner.py` lists the cases).
        """
        stock = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
            "logits_to_keep": logits_to_keep,
            "image_sizes": image_sizes,
            "mm_encoder_outputs": mm_encoder_outputs,
        }
        return self._forward(stock, kwargs, labels, pruner_ratio, schedule, query_mask)


register_key_conversion(LearnPrunerLlavaForConditionalGeneration, "llava")
register_key_conversion(LearnPrunerLlavaModel, "LlavaModel")

__all__ = ["LearnPrunerLlavaForConditionalGeneration", "LearnPrunerLlavaModel"]
