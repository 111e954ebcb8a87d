# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Qwen2.5-VL with LearnPruner (arXiv 2604.23950): as Qwen2-VL, behind an encoder with window attention."""

from itertools import chain

import torch
from transformers import PreTrainedConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel

from .configuration_learnpruner import LearnPrunerQwen2_5_VLConfig
from .hub_learnpruner import HubMixin
from .modeling_learnpruner_qwen2_vl import PrunedQwenVLGenerationMixin, PrunedQwenVLModelMixin
from .prompt_learnpruner import Prompt


class LearnPrunerQwen2_5_VLModel(PrunedQwenVLModelMixin, Qwen2_5_VLModel):
    config: LearnPrunerQwen2_5_VLConfig

    @staticmethod
    def encoder_width(config: PreTrainedConfig) -> int:
        return config.vision_config.hidden_size * config.vision_config.spatial_merge_size**2

    def lay_out(self, modality: str, values: torch.Tensor, arguments: dict, prompt: Prompt) -> list[torch.Tensor]:
        # The encoder leaves its features in the order of its windows; only the merged tokens are put back.
        vision = self.config.vision_config
        side = vision.window_size // vision.spatial_merge_size // vision.patch_size
        windows, start = [], 0
        for rows, columns in chain.from_iterable(self.grids(modality, arguments, prompt)):
            row, column = (torch.arange(length, device=values.device) // side for length in (rows, columns))
            windows.append(start + (row.unsqueeze(1) * columns + column).flatten())
            start += rows * columns
        places = torch.cat(windows).argsort(stable=True).argsort()
        return super().lay_out(modality, values.view(start, -1)[places], arguments, prompt)


class LearnPrunerQwen2_5_VLForConditionalGeneration(
    HubMixin, PrunedQwenVLGenerationMixin, Qwen2_5_VLForConditionalGeneration
):
    """[`Qwen2_5_VLForConditionalGeneration`] on fewer vision tokens. See [`LearnPrunerQwen2_5_VLConfig`]."""

    config: LearnPrunerQwen2_5_VLConfig
    model_class = LearnPrunerQwen2_5_VLModel
