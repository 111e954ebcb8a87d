# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What methods before the decoder read of encoded images, of every family. `images` is the number of images of a call,
`tokens` the most that one of them has; rows of NaN are structure or fill up a smaller image."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from threading import get_ident

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from learnpruner.cuts_learnpruner import EncodedImages
from learnpruner.prompt_learnpruner import MODALITIES

# What towers call the parameter of their class token, the norm before attention, and what makes queries and keys.
CLASS_TOKENS = ("embeddings.class_embedding", "embeddings.cls_token")
NORMS = ("layer_norm1", "norm1", "layernorm_before")
QUERY_AND_KEY = (("q_proj", "k_proj"), ("query", "key"))


def padded(parts: list[torch.Tensor]) -> torch.Tensor:
    """Parts `(tokens, d)` of different sizes as `(images, tokens, d)`, filled up with NaN."""
    return pad_sequence(parts, batch_first=True, padding_value=torch.nan)


def embeddings(images: EncodedImages) -> torch.Tensor:
    """What the decoder is given for each token, after the projector: `(images, tokens, hidden)`."""
    outputs = images.arguments["mm_encoder_outputs"]
    every = [row for modality in MODALITIES if modality in outputs for row in outputs[modality].pooler_output]
    every = torch.cat(every)
    if images.order is None:
        return padded(list(every.split(images.sizes)))
    present = images.present.to(every.device).unsqueeze(-1)
    return every[images.order.to(every.device)].masked_fill(~present, torch.nan)


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


def cls_layers(
    model: nn.Module, method: str, layer: int | list[int] | None = None, strategy: str | None = None
) -> nn.ModuleList:
    """The layers of a LLaVA's tower that has a class token: CLIP, DINOv2, ViT and their like.

    Args:
        layer, strategy: A call's `vision_feature_layer` and `vision_feature_select_strategy`; the model's, by default.

    Raises:
        `ValueError`: where the tower has no class token, the [CLS] that `method` reads, or its attention is of another
            make; where the projector does not read one layer of it, counted from the end, or reads [CLS], too.
    """
    tower, other = model.get_encoder("image"), "take a method that reads the decoder or the projected tokens"
    parameters = [name for name, _ in tower.named_parameters()]
    if not any(name.endswith(CLASS_TOKENS) for name in parameters):
        raise ValueError(
            f"{method} reads the class token of the vision tower ([CLS]), and that of {type(model).__name__} has none: "
            f"{other}."
        )
    layer = model.config.vision_feature_layer if layer is None else layer
    depth = tower.config.num_hidden_layers
    stacks = [stack for stack in tower.modules() if isinstance(stack, nn.ModuleList) and len(stack) == depth]
    biased = any("relative_position" in name for name in parameters)
    if biased or not stacks or _attention_of(stacks[0][0]) is None:
        raise ValueError(
            f"{method} computes the attention of [CLS] from a norm, queries and keys, and a layer of "
            f"{type(tower).__name__} has others, or turns or biases what they give: {other}."
        )
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
    return stacks[0]


def _attention_of(layer: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module] | None:
    """A tower layer's norm before attention, and what makes queries and keys; `None` where it is of another make."""
    # Rotary positions turn queries and keys.
    if "position_embeddings" in signature(layer.forward).parameters:
        return None
    children = dict(layer.named_children())
    norms = [children[name] for name in NORMS if name in children]
    modules = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
    pairs = [[modules[name] for name in pair] for pair in QUERY_AND_KEY if modules.keys() >= set(pair)]
    return (norms[0], *pairs[0]) if norms and pairs else None


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

        with model.get_encoder("image").register_forward_pre_hook(keep_all, with_kwargs=True):
            yield


def cls_attention(images: EncodedImages) -> tuple[torch.Tensor, torch.Tensor]:
    """What [CLS] pays each patch in the layer whose output the projector reads, summed over the heads to 1, and the
    layer's keys.

    Returns:
        `tuple`: `(images, tokens)` float32, mean over the heads, and `(images, tokens, head_dim)`, mean over the heads.
        NaN at structure.
    """
    number, strategy = (images.arguments.get(f"vision_feature_{name}") for name in ("layer", "select_strategy"))
    layers = cls_layers(images.model, "This method", number, strategy)
    number = images.model.config.vision_feature_layer if number is None else number
    states = images.arguments["mm_encoder_outputs"]["image"].hidden_states
    if states[number - 1] is None:
        raise ValueError(
            "[CLS] attention is computed from the hidden states before the layer that the projector reads, which "
            "mm_encoder_outputs lacks: pass pixel_values, or encode with output_hidden_states=True."
        )
    # The states of a negative number are that layer's output, those before them its input.
    norm, to_query, to_key = _attention_of(layers[number])
    inputs = norm(states[number - 1])
    heads = images.model.get_encoder("image").config.num_attention_heads
    query = to_query(inputs[:, :1]).float().unflatten(-1, (heads, -1)).transpose(1, 2)
    keys = to_key(inputs).float().unflatten(-1, (heads, -1)).transpose(1, 2)
    with torch.autocast(query.device.type, enabled=False):
        paid = (query @ keys.mT * query.shape[-1] ** -0.5).softmax(-1).mean(1).mT
    of_patches = torch.cat([paid, keys.mean(1)], dim=-1)[:, 1:]
    values = padded(images.model.lay_out("image", of_patches, images.arguments, images.prompt))
    return values[..., 0], values[..., 1:]


def grids(images: EncodedImages) -> list[list[tuple[int, int]]]:
    """Rows and columns of each image's grids of patches, in the order of its tokens: LLaVA has one, LLaVA-NeXT a second
    of its crops, Qwen one for each group of frames of a part.

    Raises:
        `ValueError`: where the tokens of a LLaVA's image are no square.
    """
    model, outputs = images.model, images.arguments["mm_encoder_outputs"]
    encoded = [modality for modality in MODALITIES if outputs.get(modality) is not None]
    parts = [part for modality in encoded for part in model.grids(modality, images.arguments, images.prompt)]
    for part, tokens in zip(parts, images.sizes):
        if not part:
            raise ValueError(
                f"An image's {tokens} tokens are no square of patches, so that their places are unknown: give the "
                "model square images and vision_feature_select_strategy='default', or take a method that reads no "
                "places."
            )
    return parts


def places(images: EncodedImages) -> torch.Tensor:
    """Where each patch stands: the number of its grid in its image, and the middle of it, x and y in its picture as
    shares of its width and height: `(images, tokens, 3)`."""
    parts = []
    for every, size in zip(grids(images), images.sizes):
        newlines = size > sum(rows * columns for rows, columns in every)
        found = []
        for number, (rows, columns) in enumerate(every):
            y, x = torch.meshgrid(
                (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij"
            )
            grid = torch.stack([torch.full_like(x, number), x, y], dim=-1)
            if newlines and number == len(every) - 1:
                grid = torch.cat([grid, grid.new_full((rows, 1, 3), torch.nan)], dim=1)
            found.append(grid.flatten(0, 1))
        parts.append(torch.cat(found))
    return padded(parts).to(images.features.device)


def coordinates(images: EncodedImages) -> torch.Tensor:
    """The middle of each patch, x and y in its picture as shares of its width and height: `(images, tokens, 2)`."""
    return places(images)[..., 1:]
