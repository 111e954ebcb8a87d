# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Qwen2.5-VL with LearnPruner (arXiv 2604.23950): as Qwen2-VL, behind an encoder with window attention."""

import torch
from transformers import PreTrainedConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel

from .configuration_learnpruner import LearnPrunerQwen2_5_VLConfig
from .hub_learnpruner import HubMixin, register_key_conversion
from .modeling_learnpruner_qwen2_vl import PrunedQwenVLGenerationMixin, PrunedQwenVLModelMixin


class LearnPrunerQwen2_5_VLModel(PrunedQwenVLModelMixin, Qwen2_5_VLModel):
    config: LearnPrunerQwen2_5_VLConfig

    @staticmethod
    def encoder_width(config: PreTrainedConfig) -> int:
        return config.vision_config.hidden_size * config.vision_config.spatial_merge_size**2

    def merged_features(self, hidden_states: torch.Tensor, grids: list[list[int]]) -> torch.Tensor:
        # The encoder leaves its features in the order of its windows; only the merged tokens are put back.
        vision = self.config.vision_config
        side = vision.window_size // vision.spatial_merge_size // vision.patch_size
        windows, start = [], 0
        for grid in grids:
            ranges = (torch.arange(length, device=hidden_states.device) for length in grid)
            frame, row, column = torch.meshgrid(*ranges, indexing="ij")
            window = (frame * grid[1] + row // side) * grid[2] + column // side
            windows.append(start + window.flatten())
            start += window.numel()
        order = torch.cat(windows).argsort(stable=True)
        return super().merged_features(hidden_states, grids)[order.argsort()]


class LearnPrunerQwen2_5_VLForConditionalGeneration(
    HubMixin, PrunedQwenVLGenerationMixin, Qwen2_5_VLForConditionalGeneration
):
    """[`Qwen2_5_VLForConditionalGeneration`] on fewer vision tokens. See [`LearnPrunerQwen2_5_VLConfig`]."""

    config: LearnPrunerQwen2_5_VLConfig
    config_class = LearnPrunerQwen2_5_VLConfig
    model_class = LearnPrunerQwen2_5_VLModel


register_key_conversion(LearnPrunerQwen2_5_VLForConditionalGeneration, "Qwen2_5_VLForConditionalGeneration")
register_key_conversion(LearnPrunerQwen2_5_VLModel, "Qwen2_5_VLModel")

__all__ = ["LearnPrunerQwen2_5_VLForConditionalGeneration", "LearnPrunerQwen2_5_VLModel"]
