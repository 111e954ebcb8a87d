# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Baselines that know nothing of the picture, or all: chance, a grid, a mean of neighbours, and known boxes."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from learnpruner.cuts_learnpruner import EncodedImages
from learnpruner.prompt_learnpruner import send

from .base import Method, Place, TopKImages
from .images import coordinates, embeddings, grids, padded, places

# Rows of distances formed at a time: bounds the memory of a large image.
ROWS_AT_A_TIME = 256


@dataclass(unsafe_hash=True)
class Random(Method):
    """Keeps tokens by chance.

    Args:
        seed (`int`, `str`, or a list or tuple of them): Of every image, or of each image of the call. The draw depends
            on it and on the number of tokens alone, so that batches make no difference.
    """

    seed: int | str | list[int | str] | tuple[int | str, ...] = 0

    def __post_init__(self):
        super().__post_init__()
        seeds = self.seed if isinstance(self.seed, list | tuple) else [self.seed]
        if not all(isinstance(seed, int | str) for seed in seeds):
            raise ValueError(f"random: seed is a whole number, a text, or a list of them, got {self.seed!r}.")

    def places(self, model: nn.Module) -> tuple[Place, ...]:
        return (Place(0, 1, RandomScore(self.seed)),)


@dataclass(unsafe_hash=True)
class RandomScore(TopKImages):
    seed: int | str | list[int | str] | tuple[int | str, ...]

    def __call__(self, images: EncodedImages) -> torch.Tensor:
        seeds = [self.seed] * len(images.sizes) if isinstance(self.seed, int | str) else self.seed
        if len(seeds) != len(images.sizes):
            raise ValueError(f"random: the call has {len(images.sizes)} images, and {len(seeds)} seeds were given.")
        return padded([random_scores(size, seed) for seed, size in zip(seeds, images.sizes)])[..., 0].to(
            images.features.device
        )


def random_scores(tokens: int, seed: int | str) -> torch.Tensor:
    """Uniform, `(tokens, 1)`, the same on every device and release of torch."""
    rng = random.Random(seed)
    return torch.tensor([[rng.random()] for _ in range(tokens)])


@dataclass(unsafe_hash=True)
class Uniform(Method):
    """Keeps a grid of patches, as evenly as the budget allows. Structure (LLaVA-NeXT's newlines) goes first."""

    def places(self, model: nn.Module) -> tuple[Place, ...]:
        return (Place(0, 1, UniformScore()),)


@dataclass(unsafe_hash=True)
class UniformScore:
    def __call__(self, images: EncodedImages) -> torch.Tensor:
        return images.features.new_zeros(images.present.shape, dtype=torch.float32)

    def select(self, scores: torch.Tensor, images: EncodedImages, counts: list[int]) -> torch.Tensor:
        chosen = []
        for every, size, count in zip(grids(images), images.sizes, counts):
            patches = [rows * columns for rows, columns in every]
            # By largest remainder, so that the shares of several grids sum to the count.
            shares = [count * part / sum(patches) for part in patches]
            given = [min(math.floor(share), part) for share, part in zip(shares, patches)]
            order = sorted(range(len(every)), key=lambda number: given[number] - shares[number])
            for number in order * 2:
                if sum(given) < min(count, sum(patches)) and given[number] < patches[number]:
                    given[number] += 1
            marks = torch.cat([grid_marks(*grid, part) for grid, part in zip(every, given)])
            chosen.append(_with_newlines(marks, every, size, count))
        marks = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True).to(scores.device)
        # The row that ends a sample must stay: it takes the place of its image's last other.
        must = scores == torch.inf
        columns = torch.arange(marks.shape[1], device=marks.device)
        last = (columns * (marks & ~must)).argmax(1, keepdim=True) == columns
        return (marks & ~(last & (must & ~marks).any(1, keepdim=True))) | must


def grid_marks(rows: int, columns: int, count: int) -> torch.Tensor:
    """`(rows * columns,)` bool: `count` patches spread evenly over a grid. That of a very thin image may have none."""
    marks = torch.zeros(rows, columns, dtype=torch.bool)
    if count == 0:
        return marks.flatten()
    lines = min(rows, max(1, round(math.sqrt(count * rows / columns)), math.ceil(count / columns)))
    for line in range(lines):
        here = count * (line + 1) // lines - count * line // lines
        marks[int((line + 0.5) * rows / lines), ((torch.arange(here) + 0.5) * columns / max(1, here)).long()] = True
    return marks.flatten()


def _with_newlines(marks: torch.Tensor, every: list[tuple[int, int]], size: int, count: int) -> torch.Tensor:
    """Puts newlines behind the rows of the last grid, where there are any; what the patches leave of the budget is
    theirs."""
    if len(marks) == size:
        return marks
    rows, columns = every[-1]
    newlines, first = torch.arange(rows) < count - len(marks), len(marks) - rows * columns
    last = torch.cat([marks[first:].view(rows, columns), newlines.unsqueeze(1)], dim=1)
    return torch.cat([marks[:first], last.flatten()])


@dataclass(unsafe_hash=True)
class Pool(Method):
    """Keeps a grid, each patch of it the mean of those that are nearer to it than to others, after the projector. Each
    group of frames, and each of LLaVA-NeXT's two views of an image, is averaged by itself."""

    def places(self, model: nn.Module) -> tuple[Place, ...]:
        return (Place(0, 1, UniformScore(), merge=mean_of_nearest),)


def mean_of_nearest(images: EncodedImages, chosen: torch.Tensor) -> torch.Tensor:
    """Embeddings `(images, tokens, hidden)` with each chosen patch the mean of the patches of its grid whose middle is
    nearest to its own; ties go to the first. A grid is a group of frames, or one of LLaVA-NeXT's two views; where none
    of its patches is chosen, they are in no mean."""
    states, (grid, x, y) = embeddings(images), places(images).unbind(-1)
    patches = ~grid.isnan()
    chosen, nearest, distances = chosen & patches, [], []
    for start in range(0, chosen.shape[1], ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        distance = (x[:, rows, None] - x[:, None]).square() + (y[:, rows, None] - y[:, None]).square()
        # Patches of one distance tie, whatever their rounding.
        distance = (1e6 * distance).round()
        same = chosen.unsqueeze(1) & (grid[:, rows, None] == grid[:, None])
        least = distance.masked_fill(~same, torch.inf).min(-1)
        nearest.append(least.indices)
        distances.append(least.values)
    columns = torch.arange(chosen.shape[1], device=chosen.device)
    nearest = torch.where(chosen, columns, torch.cat(nearest, dim=1))
    member = (torch.cat(distances, dim=1) < torch.inf).float().unsqueeze(-1)
    flat = (nearest + len(columns) * torch.arange(len(chosen), device=chosen.device).unsqueeze(1)).flatten()
    values = torch.cat([states.float().nan_to_num() * member, member], dim=-1).flatten(0, 1)
    sums = torch.zeros_like(values).index_add(0, flat, values).view(*chosen.shape, -1)
    means = sums[..., :-1] / sums[..., -1:].clamp(min=1)
    return torch.where(chosen.unsqueeze(-1), means.to(states.dtype), states)


@dataclass(unsafe_hash=True)
class OracleBoxes(Method):
    """Keeps the patches of known boxes, each object's from the middle outwards, objects in turn; then, where the budget
    is larger than the boxes, all others, the nearest first. What looking for objects alone can do.

    Args:
        boxes (`Sequence`): For each image of the call its boxes: left, top, right and bottom, in pixels.
        picture (`tuple[int, int]`): Width and height of the pictures, in pixels.
    """

    boxes: Sequence[Sequence[Sequence[float]]] = ()
    picture: tuple[int, int] = (1, 1)

    def places(self, model: nn.Module) -> tuple[Place, ...]:
        return (Place(0, 1, BoxScore(tuple(self.boxes), self.picture)),)


@dataclass(unsafe_hash=True)
class BoxScore(TopKImages):
    boxes: tuple
    picture: tuple[int, int]

    def __call__(self, images: EncodedImages) -> torch.Tensor:
        if len(self.boxes) != len(images.sizes):
            raise ValueError(f"oracle_boxes: {len(images.sizes)} images in the call, and boxes of {len(self.boxes)}.")
        for number, boxes in enumerate(self.boxes):
            if not len(boxes):
                raise ValueError(f"oracle_boxes: image {number} has no box: give it one, or take another method.")
        width, height = self.picture
        x, y = (coordinates(images) * send([width, height], images.features.device)).unbind(-1)
        rows = [
            box_scores(x[row, :size], y[row, :size], boxes)
            for row, (size, boxes) in enumerate(zip(images.sizes, self.boxes))
        ]
        return padded([row.unsqueeze(-1) for row in rows])[..., 0]


# Below every score of a patch inside a box.
OUTSIDE = -1e6


def box_patches(x: torch.Tensor, y: torch.Tensor, boxes: Sequence) -> torch.Tensor:
    """`(objects, tokens)` bool: patches whose middle is in an object's box. A small object may hold no patch's middle:
    the patch nearest its own middle counts as inside.

    Args:
        x, y (`torch.Tensor` of shape `(tokens,)`): The patches' middles, in the units of the boxes; NaN at structure,
            which is in no box.
        boxes: Left, top, right, bottom of each object.
    """
    inside = [
        (x >= left) & (x < right) & (y >= top) & (y < bottom) | (distance == distance.nan_to_num(torch.inf).min())
        for (left, top, right, bottom), distance in zip(boxes, _distances(x, y, boxes))
    ]
    return torch.stack(inside)


def _distances(x: torch.Tensor, y: torch.Tensor, boxes: Sequence) -> list[torch.Tensor]:
    return [torch.hypot(x - (left + right) / 2, y - (top + bottom) / 2) for left, top, right, bottom in boxes]


def box_scores(x: torch.Tensor, y: torch.Tensor, boxes: Sequence) -> torch.Tensor:
    """Scores of [`OracleBoxes`], `(tokens,)` float32; NaN at structure."""
    scores = torch.full_like(x, -torch.inf)
    for inside, distance in zip(box_patches(x, y, boxes), _distances(x, y, boxes)):
        turn = distance.masked_fill(~inside, torch.inf).argsort(stable=True).argsort()
        scores = torch.maximum(scores, torch.where(inside, -turn.float(), OUTSIDE - distance))
    return scores
