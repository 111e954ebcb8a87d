# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""LLaVA-NeXT with LearnPruner (arXiv 2604.23950)."""

import torch
from torch.nn import functional as F
from transformers import LlavaNextForConditionalGeneration, LlavaNextModel
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from .configuration_learnpruner import LearnPrunerLlavaNextConfig
from .head_learnpruner import PrunedGenerationMixin
from .hub_learnpruner import HubMixin
from .modeling_learnpruner_llava import PrunedLlavaModelMixin
from .prompt_learnpruner import Prompt, send


class LearnPrunerLlavaNextModel(PrunedLlavaModelMixin, LlavaNextModel):
    config: LearnPrunerLlavaNextConfig
    image_layout = "image_sizes"

    def _crops(self, prompt: Prompt) -> list[tuple[int, int]]:
        """Rows and columns of each image's crops, beside the one of the whole."""
        if "image_sizes" not in prompt.grids:
            raise ValueError("LLaVA-NeXT lays out its tokens by image_sizes: pass it with the images.")
        pinpoints, side = self.config.image_grid_pinpoints, self.config.vision_config.image_size
        return [get_anyres_image_grid_shape(size, pinpoints, side) for size in prompt.grids["image_sizes"]]

    def lay_out(self, modality: str, values: torch.Tensor, arguments: dict, prompt: Prompt) -> list[torch.Tensor]:
        strategy = arguments.get("vision_feature_select_strategy") or self.config.vision_feature_select_strategy
        crops = [1 + rows * columns for rows, columns in self._crops(prompt)]
        # The stock model packs the numbers of the rows, on the host: on a GPU it would make the host wait.
        numbers = torch.arange(values.shape[:2].numel(), device="cpu").view(*values.shape[:2], 1).split(crops)
        newline = torch.full((1,), -1, device="cpu")
        packed, _ = self.pack_image_features(numbers, prompt.grids["image_sizes"], strategy, image_newline=newline)
        # The learned `image_newline` rows are structure: they carry no score and are kept only when every patch is.
        rows = F.pad(values.flatten(0, 1), (0, 0, 0, 1), value=torch.nan)
        return list(rows[send(torch.cat(packed).flatten(), rows.device)].split([len(image) for image in packed]))

    def grids(self, modality: str, arguments: dict, prompt: Prompt) -> list[list[tuple[int, int]]]:
        side, found = self.config.vision_config.image_size // self.config.vision_config.patch_size, []
        for size, (rows, columns) in zip(prompt.grids["image_sizes"], self._crops(prompt)):
            crops = torch.empty(1, rows * side, columns * side, device="meta")
            found.append([(side, side), tuple(unpad_image(crops, size).shape[1:])])
        return found


class LearnPrunerLlavaNextForConditionalGeneration(HubMixin, PrunedGenerationMixin, LlavaNextForConditionalGeneration):
    """[`LlavaNextForConditionalGeneration`] on fewer vision tokens. See [`LearnPrunerLlavaNextConfig`]."""

    config: LearnPrunerLlavaNextConfig
    model_class = LearnPrunerLlavaNextModel
