# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Where the projector starts: as a lookup of words.

A patch of an object becomes the embedding of the object's name, shifted by where the patch is; ground becomes that of a
newline. From random weights, answers stayed at chance for long.
"""

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlamaForCausalLM, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from features import Features
from photo_scenes import Scene
from prompts import Packer
from stamps import KINDS

NAMES = tuple(KINDS)
GROUND = len(NAMES)
# How far a patch at the border is shifted, in halves of the way from " left" to " right".
PLACE = 0.8
GROUND_PATCHES = 80  # of each scene
COVERED, BARE = 0.5, 0.1
BATCH, LEARNING_RATE = 2048, 2e-3


def patch_names(scene: Scene) -> torch.Tensor:
    """For each patch the number of the object's name that covers half of it, [`GROUND`] where less than a tenth is
    covered, else -1. `(patches,)` int64."""
    coverage = torch.from_numpy(scene.coverage.astype(np.float32)).flatten(1)
    most, which = coverage.max(0)
    names = torch.full(most.shape, -1)
    names[coverage.sum(0) < BARE] = GROUND
    of_objects = torch.tensor([NAMES.index(thing.name) for thing in scene.objects])
    names[most >= COVERED] = of_objects[which[most >= COVERED]]
    return names


class Lookup:
    """The words that patches should become, in a text model's embeddings."""

    def __init__(self, text: LlamaForCausalLM, packer: Packer):
        table = text.get_input_embeddings().weight.detach().float()

        def vector(word: str) -> torch.Tensor:
            return table[packer.word(word)]

        self.words = torch.stack([vector(f" {name}") for name in NAMES] + [vector("\n")])
        self.across = (vector(" right") - vector(" left")) / 2
        self.down = (vector(" bottom") - vector(" top")) / 2

    def shift(self, patch: torch.Tensor, side: int) -> torch.Tensor:
        """What the place of a patch adds, `(patches, width)`.

        Args:
            patch (`torch.LongTensor` of shape `(patches,)`): Numbers in an image of `side` x `side` patches.
        """
        across, down = ((part / (side - 1) * 2 - 1).unsqueeze(1) for part in (patch % side, patch // side))
        return PLACE * (across * self.across + down * self.down)

    def distances(self, output: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Squared distances `(patches, names + 1)` to names at that place and to ground."""
        names = torch.cdist(output - shift, self.words[:-1])
        return torch.cat([names, torch.cdist(output, self.words[-1:])], 1) ** 2


def gather(layer, features: Features, scenes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Patches of objects and some of ground of the first scenes: features (float16), names, numbers of the patches.

    Args:
        layer: Gives hidden state 9 `(1, 1 + patches, width)` for hidden state 8.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in tqdm(range(min(scenes, len(features))), desc="patches", mininterval=10):
        names = patch_names(features.scene(number))
        ground = torch.nonzero(names == GROUND)[:, 0]
        ground = ground[torch.randperm(len(ground), generator=generator)[:GROUND_PATCHES]]
        chosen = torch.cat([ground, torch.nonzero((names >= 0) & (names < GROUND))[:, 0]])
        with torch.no_grad():
            patches = layer(features.layer(number).float()[None])[0, 1:]
        found.append((patches[chosen].half(), names[chosen], chosen))
    return tuple(torch.cat(part) for part in zip(*found))


def fit(
    config: LlavaConfig,
    lookup: Lookup,
    patches: torch.Tensor,
    names: torch.Tensor,
    numbers: torch.Tensor,
    epochs: int,
    seed: int,
) -> tuple[LlavaMultiModalProjector, float]:
    """Fits a projector of stock LLaVA's shape on patches of [`gather`]. The last tenth of them only measures.

    Returns:
        `tuple`: The projector, float32; and the share of measured object patches that are nearest to their own name.
    """
    torch.manual_seed(seed)
    projector = LlavaMultiModalProjector(config).float()
    side = round(config.image_seq_length**0.5)
    measured = len(patches) // 10
    training = len(patches) - measured
    mean, deviation = patches[:training].float().mean(0), patches[:training].float().std(0)
    size = min(BATCH, training)
    optimizer = torch.optim.AdamW(projector.parameters(), LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=epochs * (training // size), pct_start=0.1
    )

    def read(chosen):
        output = projector((patches[chosen].float() - mean) / deviation)
        shift = lookup.shift(numbers[chosen], side)
        return output, shift, names[chosen]

    for _ in tqdm(range(epochs), desc="projector", mininterval=10):
        for chosen in torch.randperm(training)[: training // size * size].split(size):
            output, shift, name = read(chosen)
            ground = name == GROUND
            target = lookup.words[name] + shift * ~ground[:, None]
            near = (torch.where(ground, 0.7, 1.0) * ((output - target) ** 2).sum(1)).mean()
            loss = near + 0.5 * F.cross_entropy(-lookup.distances(output, shift), name)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        output, shift, name = read(torch.arange(training, len(patches)))
        right = (lookup.distances(output, shift).argmin(1) == name)[name != GROUND]
        # The standardisation becomes part of the first layer.
        projector.linear_1.bias -= projector.linear_1.weight @ (mean / deviation)
        projector.linear_1.weight /= deviation
    return projector, right.float().mean().item()
