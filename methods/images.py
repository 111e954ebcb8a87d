# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What methods before the decoder read of encoded images, of every family. `images` is the number of images of a call,
`tokens` the most that one of them has; rows of NaN are structure or fill up a smaller image."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from threading import get_ident

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.image_processing_utils import select_best_resolution
from transformers.models.clip.modeling_clip import CLIPEncoder

from learnpruner.cuts_learnpruner import EncodedImages
from learnpruner.prompt_learnpruner import MODALITIES


def padded(parts: list[torch.Tensor]) -> torch.Tensor:
    """Parts `(tokens, d)` of different sizes as `(images, tokens, d)`, filled up with NaN."""
    return pad_sequence(parts, batch_first=True, padding_value=torch.nan)


def embeddings(images: EncodedImages) -> torch.Tensor:
    """What the decoder is given for each token, after the projector: `(images, tokens, hidden)`."""
    outputs = images.arguments["mm_encoder_outputs"]
    every = [row for modality in MODALITIES if modality in outputs for row in outputs[modality].pooler_output]
    return padded(list(torch.cat(every).split(images.sizes)))


def text(images: EncodedImages) -> list[torch.Tensor]:
    """Of each sample of the batch, the embeddings of its prompt's text, `(rows, hidden)`. Padding, and rows that must
    not rank, are left out."""
    embeds, prompt = images.arguments.get("inputs_embeds"), images.prompt
    if embeds is None:
        embeds = images.model.get_input_embeddings()(images.arguments["input_ids"])
    rows = (prompt.kinds == 0).to(embeds.device)
    for mask in (prompt.valid, images.query_mask):
        rows = rows if mask is None else rows & mask.to(embeds.device)
    return list(embeds[rows].split(rows.sum(1).tolist()))


def clip_encoder(
    model: nn.Module, method: str, layer: int | list[int] | None = None, strategy: str | None = None
) -> CLIPEncoder:
    """The encoder of a LLaVA's CLIP tower.

    Args:
        layer, strategy: A call's `vision_feature_layer` and `vision_feature_select_strategy`; the model's, by default.

    Raises:
        `ValueError`: where the tower is another, without the [CLS] token that `method` reads, the projector does not
            read one layer of it, counted from the end, or reads [CLS], too.
    """
    towers = [module for module in model.modules() if isinstance(module, CLIPEncoder)]
    if not towers:
        raise ValueError(
            f"{method} reads CLIP's [CLS] token, and the tower of {type(model).__name__} has none: take a method that "
            "reads the decoder or the projected tokens."
        )
    layer = model.config.vision_feature_layer if layer is None else layer
    depth = len(towers[0].layers)
    if not (isinstance(layer, int) and -depth <= layer < 0):
        raise ValueError(
            f"{method} reads one layer of the tower counted from the end, -1 to -{depth}, and vision_feature_layer is "
            f"{layer}: count it so, or take a method that does not read the tower."
        )
    strategy = strategy or model.config.vision_feature_select_strategy
    if strategy != "default":
        raise ValueError(
            f"{method} ranks patches alone, and with vision_feature_select_strategy={strategy!r} tokens include [CLS]: "
            "take 'default', or a method that does not read the tower."
        )
    return towers[0]


class ReadsEncoder:
    """Of the score of a cut that watches the encoder: all of the tower's hidden states are kept, not only those that
    the projector reads (which transformers drops from 5.23 on)."""

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        thread = get_ident()

        def keep_all(module, arguments, keywords=None):
            # Other threads may run the same model; torch calls a hook that was just removed without keywords.
            if get_ident() == thread:
                return arguments, {**keywords, "output_hidden_states": True}
            return None

        with model.vision_tower.register_forward_pre_hook(keep_all, with_kwargs=True):
            yield


def cls_attention(images: EncodedImages) -> tuple[torch.Tensor, torch.Tensor]:
    """What [CLS] pays each patch in the layer whose output the projector reads, summed over the heads to 1, and the
    layer's keys.

    Returns:
        `tuple`: `(images, tokens)` float32, mean over the heads, and `(images, tokens, head_dim)`, mean over the heads.
        NaN at structure.
    """
    number, strategy = (images.arguments.get(f"vision_feature_{name}") for name in ("layer", "select_strategy"))
    encoder = clip_encoder(images.model, "This method", number, strategy)
    number = images.model.config.vision_feature_layer if number is None else number
    states = images.arguments["mm_encoder_outputs"]["image"].hidden_states
    if states[number - 1] is None:
        raise ValueError(
            "[CLS] attention is computed from the hidden states before the layer that the projector reads, which "
            "mm_encoder_outputs lacks: pass pixel_values, or encode with output_hidden_states=True."
        )
    # The states of a negative number are that layer's output, those before them its input.
    block = encoder.layers[number]
    inputs, attention = block.layer_norm1(states[number - 1]), block.self_attn
    heads = (len(inputs), -1, attention.num_heads, attention.head_dim)
    query = attention.q_proj(inputs[:, :1]).float().view(heads).transpose(1, 2)
    keys = attention.k_proj(inputs).float().view(heads).transpose(1, 2)
    with torch.autocast(query.device.type, enabled=False):
        paid = (query @ keys.mT * attention.scale).softmax(-1).mean(1).mT
    values = lay_out(images, torch.cat([paid, keys.mean(1)], dim=-1))
    return values[..., 0], values[..., 1:]


def lay_out(images: EncodedImages, values: torch.Tensor) -> torch.Tensor:
    """Values of the tower's rows, `(crops, rows, d)` with [CLS] where the tower has one, where the prompt has their
    tokens: `(images, tokens, d)`. For LLaVA and LLaVA-NeXT."""
    outputs = copy(images.arguments["mm_encoder_outputs"]["image"])
    outputs.hidden_states = _EveryLevel(values)
    arguments = {**images.arguments, "mm_encoder_outputs": {"image": outputs}}
    return padded(images.model.pruner_features(arguments, images.prompt)["image"])


class _EveryLevel:
    """Stands for a tuple of hidden states, each of which is the same."""

    def __init__(self, values: torch.Tensor):
        self.values = values

    def __getitem__(self, level: int) -> torch.Tensor:
        return self.values


def grids(images: EncodedImages) -> list[list[tuple[int, int]]]:
    """Rows and columns of each image's grids of patches, in the order of its tokens: LLaVA has one, LLaVA-NeXT a second
    of its crops, Qwen one for each group of frames of a part.

    Raises:
        `ValueError`: where the tokens of a LLaVA's image are no square.
    """
    config, prompt = images.model.config, images.prompt
    if prompt.grids.keys() & {"image_grid_thw", "video_grid_thw"}:
        return _qwen_grids(images)
    if "image_sizes" in prompt.grids:
        side = config.vision_config.image_size // config.vision_config.patch_size
        return [
            [(side, side), *_unpadded_grid(config, side, size, tokens - side * side)]
            for size, tokens in zip(prompt.grids["image_sizes"], images.sizes)
        ]
    for tokens in images.sizes:
        if math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(
                f"An image's {tokens} tokens are no square of patches, so that their places are unknown: give the "
                "model square images and vision_feature_select_strategy='default', or take a method that reads no "
                "places."
            )
    return [[(math.isqrt(tokens), math.isqrt(tokens))] for tokens in images.sizes]


def _qwen_grids(images: EncodedImages) -> list[list[tuple[int, int]]]:
    config, parts = images.model.config, []
    for modality in MODALITIES:
        outputs = images.arguments["mm_encoder_outputs"].get(modality)
        if outputs is None:
            continue
        # A continued conversation may give the grids of all its images; the encoded ones are the last.
        for frames, height, width in images.prompt.grids[f"{modality}_grid_thw"][-len(outputs.pooler_output) :]:
            grid = tuple(side // config.vision_config.spatial_merge_size for side in (height, width))
            # Parts are whole images and videos, or groups of a video's frames.
            split = modality == "video" and config.pruner_per_frame
            parts += [[grid]] * frames if split else [[grid] * frames]
    return parts


def _unpadded_grid(config, side: int, size: list[int], tokens: int) -> list[tuple[int, int]]:
    """Rows and columns of the crops of an image `size` (height, width) high, whose padding is gone and each of whose
    rows ends in a newline: so many tokens."""
    if not tokens:
        return []
    height, width = (
        pixels // config.vision_config.image_size * side
        for pixels in select_best_resolution(size, config.image_grid_pinpoints)
    )
    # Padding is above and below, or at the sides.
    if size[1] / size[0] > width / height:
        return [(tokens // (width + 1), width)]
    return [(height, tokens // height - 1)]


def places(images: EncodedImages) -> torch.Tensor:
    """Where each patch stands: the number of its grid in its image, and the middle of it, x and y in its picture as
    shares of its width and height: `(images, tokens, 3)`."""
    parts = []
    for every, size in zip(grids(images), images.sizes):
        structured = len(every) == 2 and sum(rows * columns for rows, columns in every) != size
        found = []
        for number, (rows, columns) in enumerate(every):
            y, x = torch.meshgrid(
                (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij"
            )
            grid = torch.stack([torch.full_like(x, number), x, y], dim=-1)
            if structured and number:
                grid = torch.cat([grid, grid.new_full((rows, 1, 3), torch.nan)], dim=1)  # its newlines
            found.append(grid.flatten(0, 1))
        parts.append(torch.cat(found))
    return padded(parts).to(images.features.device)


def coordinates(images: EncodedImages) -> torch.Tensor:
    """The middle of each patch, x and y in its picture as shares of its width and height: `(images, tokens, 2)`."""
    return places(images)[..., 1:]
