# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""LLaVA-NeXT with LearnPruner (arXiv 2604.23950)."""

import torch
from torch.nn import functional as F
from transformers import LlavaNextForConditionalGeneration, LlavaNextModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from .configuration_learnpruner import LearnPrunerLlavaNextConfig
from .head_learnpruner import PrunedGenerationMixin
from .hub_learnpruner import HubMixin, register_key_conversion
from .modeling_learnpruner_llava import PrunedLlavaModelMixin
from .prompt_learnpruner import Prompt, send


class LearnPrunerLlavaNextModel(PrunedLlavaModelMixin, LlavaNextModel):
    config: LearnPrunerLlavaNextConfig

    def pruner_features(self, arguments: dict, prompt: Prompt) -> dict[str, list[torch.Tensor]]:
        """As the stock model packs its tokens. The learned `image_newline` rows are structure, not patches: they are
        rows of NaN here, so they carry no score and are kept only when every patch is."""
        if "image_sizes" not in prompt.grids:
            raise ValueError("LLaVA-NeXT lays out its tokens by image_sizes: pass it with the images.")
        strategy = arguments.get("vision_feature_select_strategy") or self.config.vision_feature_select_strategy
        features = self.selected_features(arguments)
        image_sizes = prompt.grids["image_sizes"]
        crops = [
            image_size_to_num_patches(size, self.config.image_grid_pinpoints, self.config.vision_config.image_size)
            for size in image_sizes
        ]
        # The stock model packs the numbers of the rows, on the host: on a GPU it would make the host wait.
        numbers = torch.arange(features.shape[:2].numel(), device="cpu").view(*features.shape[:2], 1)
        newline = numbers.new_full((1,), -1)
        packed, _ = self.pack_image_features(numbers.split(crops), image_sizes, strategy, image_newline=newline)
        rows = F.pad(features.flatten(0, 1), (0, 0, 0, 1), value=torch.nan)
        chosen = rows[send(torch.cat(packed).flatten(), rows.device)]
        return {"image": list(chosen.split([len(image) for image in packed]))}


class LearnPrunerLlavaNextForConditionalGeneration(HubMixin, PrunedGenerationMixin, LlavaNextForConditionalGeneration):
    """[`LlavaNextForConditionalGeneration`] that answers from fewer vision tokens.

    See [`LearnPrunerLlavaNextConfig`].
    """

    config: LearnPrunerLlavaNextConfig
    config_class = LearnPrunerLlavaNextConfig
    model_class = LearnPrunerLlavaNextModel


register_key_conversion(LearnPrunerLlavaNextForConditionalGeneration, "llava_next")
register_key_conversion(LearnPrunerLlavaNextModel, "LlavaNextModel")

__all__ = ["LearnPrunerLlavaNextForConditionalGeneration", "LearnPrunerLlavaNextModel"]
