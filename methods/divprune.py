# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""DivPrune (arXiv 2503.02175): the tokens that differ most from one another."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from learnpruner.cuts_learnpruner import EncodedImages
from learnpruner.prompt_learnpruner import send

from .base import Method, Place
from .images import embeddings

# Rows of similarities formed at a time: bounds the memory of a large image.
ROWS_AT_A_TIME = 1024


@dataclass(unsafe_hash=True)
class DivPrune(Method):
    """DivPrune (https://arxiv.org/abs/2503.02175): the greedy solution of the max-min diversity problem, knowing
    neither question nor attention.

    With e `(tokens, hidden)` the tokens after the projector and d(i, j) = 1 - cos(e_i, e_j), the first is the token
    whose nearest neighbour is farthest, argmax_i min_{j != i} d(i, j); each further one is farthest from those that are
    there, argmax_i min_{j chosen} d(i, j). As in the authors' code, tokens are all those of a sample, whose images and
    videos share one budget: what one frame shows as another does is hardly taken twice.

    Departures: LLaVA-NeXT's newlines take no part and are kept last. Where a sample ends in a vision token, that one
    must stay and is the first. The recorded scores are those that choose the first.
    """

    def places(self, model: nn.Module) -> tuple[Place, ...]:
        return (Place(0, 1, DivPruneScore(), unit="sample"),)


@dataclass(unsafe_hash=True)
class DivPruneScore:
    def __call__(self, images: EncodedImages) -> torch.Tensor:
        directions, patches = _directions(images)
        nearest = []
        for start in range(0, directions.shape[1], ROWS_AT_A_TIME):
            with torch.autocast(directions.device.type, enabled=False):
                distance = 1 - directions[:, start : start + ROWS_AT_A_TIME] @ directions.mT
            own = torch.ones_like(distance, dtype=torch.bool).tril(start).triu(start)
            nearest.append(distance.masked_fill(own | ~patches.unsqueeze(1), torch.inf).amin(-1))
        # The only patch of an image has no neighbour; no two are farther from each other than 2.
        return torch.cat(nearest, dim=1).clamp(max=2).masked_fill(~patches, torch.nan)

    def select(self, scores: torch.Tensor, images: EncodedImages, counts: list[int]) -> torch.Tensor:
        directions, patches = _directions(images)
        rows = torch.arange(len(scores), device=scores.device)
        wanted = send(counts, scores.device)
        # Structure is chosen when nothing else is left: a distance is not below 0.
        far = scores.nan_to_num(nan=-1.0, posinf=torch.inf).masked_fill(~images.present, -torch.inf)
        chosen, begun = torch.zeros_like(patches), torch.zeros_like(wanted, dtype=torch.bool)
        for turn in range(max(counts)):
            pick = far.masked_fill(chosen, -torch.inf).argmax(1)
            chosen[rows, pick] |= turn < wanted
            # Structure that must stay is far from nothing.
            patch = patches[rows, pick].unsqueeze(1)
            with torch.autocast(directions.device.type, enabled=False):
                distance = 1 - torch.einsum("rcd,rd->rc", directions, directions[rows, pick])
            nearer = torch.where(begun.unsqueeze(1), torch.minimum(far, distance), distance)
            far = torch.where(patch & patches, nearer, far)
            begun = begun | patch.squeeze(1)
        return chosen


def _directions(images: EncodedImages) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors `(images, tokens, hidden)` float32, and which are patches, `(images, tokens)` bool."""
    patches = images.present & ~images.features.isnan().any(-1)
    states = embeddings(images).float().masked_fill(~patches.unsqueeze(-1), 0)
    return F.normalize(states, dim=-1), patches
