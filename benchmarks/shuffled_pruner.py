"""A control of what training is worth: a trained pruner with the values of each of its weights in another order."""

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import SAFE_WEIGHTS_NAME

from learnpruner.training.command import RECORD


def shuffle_pruner(trained: Path, seed: int, folder: Path) -> Path:
    """Writes, beside a folder of a trained pruner, one whose tensors hold the same values, each permuted at random.

    Sizes and distributions of the weights, biases and norms stay; what they have learned goes.

    Args:
        trained (`Path`): A folder that holds a pruner alone.
        seed (`int`): Of the permutations.
        folder (`Path`): The new one, with the same parent: a base may be named relative to it.

    Raises:
        `ValueError`: where `folder` stands elsewhere, or `trained` holds more than a pruner.
    """
    weights = load_file(trained / SAFE_WEIGHTS_NAME)
    if folder.parent != trained.parent or not all(".pruner." in name for name in weights):
        raise ValueError(f"{folder} has to be beside {trained}, and that has to hold a pruner alone.")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(weights.items()):
        weights[name] = tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view_as(tensor)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(trained, part, ignore=shutil.ignore_patterns("checkpoint-*", RECORD))
    save_file(weights, part / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    os.replace(part, folder)
    return folder
