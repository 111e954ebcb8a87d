# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""A smaller image: the baseline that needs no pruning."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.clip.modeling_clip import CLIPEncoder

from learnpruner.cuts_learnpruner import EncodedImages

from .base import Method, Place
from .baselines import UniformScore
from .images import embeddings


@dataclass(unsafe_hash=True)
class Downsample(Method):
    """Shows the model a smaller image: what the processor made, `(3, height, width)`, is resized (bicubic, with
    antialiasing) to as many patches as the budget has, rows x columns of them, and goes through the tower with its
    positions interpolated and through the projector. The tokens stand, in their order, where [`Uniform`] would keep
    patches.

    Rows and columns are those of the largest product that is not above the budget, with neither more than twice the
    other; of equals the squarest, wider than high. So a budget may be missed by some tokens, never exceeded. The image
    is squeezed where they differ.

    For LLaVA with a CLIP tower. The large image is encoded, too, since counts are planned from it: accuracy is that of
    a smaller image, the tower's time is not.
    """

    def check(self, model: nn.Module) -> None:
        if not any(isinstance(module, CLIPEncoder) for module in model.modules()):
            raise ValueError(
                f"downsample interpolates the positions of a CLIP tower, and {type(model).__name__} has another: give "
                "the processor a smaller image."
            )
        if model.image_layout is not None:
            raise ValueError(
                f"downsample is for models of one crop an image, and {type(model).__name__} cuts a larger image into "
                "more: give the processor a smaller image, or other image_grid_pinpoints."
            )
        if model.config.vision_feature_select_strategy != "default":
            raise ValueError("downsample is for patches alone, and this model's tokens include [CLS].")

    def places(self, model: nn.Module) -> tuple[Place, ...]:
        return (Place(0, 1, UniformScore(), merge=smaller_images, fits=lambda count: math.prod(grid_of(count))),)


def grid_of(budget: int) -> tuple[int, int]:
    """Rows and columns of the smaller image, in patches."""
    return max(
        (
            (rows, columns)
            for rows in range(1, math.isqrt(budget) + 1)
            for columns in range(rows, 2 * rows + 1)
            if rows * columns <= budget
        ),
        key=lambda grid: (grid[0] * grid[1], grid[0]),
    )


def smaller_images(images: EncodedImages, chosen: torch.Tensor) -> torch.Tensor:
    """Embeddings `(images, tokens, hidden)`, those chosen of a smaller image. Images of a call are of one size, so as
    many are chosen of each."""
    states, model = embeddings(images), images.model
    pixels = images.arguments["pixel_values"]
    if pixels is None:
        raise ValueError("downsample resizes pixels: pass pixel_values, not mm_encoder_outputs alone.")
    patch = model.config.vision_config.patch_size
    rows, columns = grid_of(int(chosen[0].sum()))
    small = F.interpolate(
        pixels.float(), (rows * patch, columns * patch), mode="bicubic", align_corners=False, antialias=True
    )
    features = {name: images.arguments[name] for name in model.feature_arguments}
    encoded = model.get_image_features(
        pixel_values=small.to(pixels.dtype), **features, interpolate_pos_encoding=True, return_dict=True
    )
    small = torch.cat(encoded.pooler_output).to(states.dtype)
    return states.masked_scatter(chosen.unsqueeze(-1), small)
