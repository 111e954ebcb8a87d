# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""A call's prompt, read once: where its images and videos are, and what of it the host must know."""

from dataclasses import dataclass

import torch

# What images and videos are called; their place, from 1, is their kind in a prompt. 0 is text.
MODALITIES = ("image", "video")


def send(values: list | torch.Tensor, device: torch.device) -> torch.Tensor:
    """The host's numbers on a device; unlike `torch.tensor`, without waiting for what a GPU has yet to do."""
    values = torch.as_tensor(values, device="cpu")
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


@dataclass
class Prompt:
    """Where a prompt has its images and videos, and what the host must know of it."""

    kinds: torch.Tensor  # (batch, sequence), int8: 0 at text, 1 at an image's placeholders, 2 at a video's
    valid: torch.Tensor | None  # (batch, sequence), bool: False at padding
    lengths: list[int]  # rows of each sample that are not padding
    placeholders: dict[str, list[int]]  # for each modality, how many placeholders each sample has
    grids: dict[str, list[list[int]]]  # for each argument that lays images out, its rows
    mistyped: int = 0  # tokens whose `mm_token_type_ids` are not of their kind

    @classmethod
    def read(
        cls,
        kinds: torch.Tensor,
        valid: torch.Tensor | None,
        grids: dict[str, torch.Tensor],
        types: torch.Tensor | None = None,
        start: int = 0,
    ) -> "Prompt":
        """Reads a call's prompt in one transfer to the host, which waits for the device once.

        Columns of `kinds` and `valid` before `start` are not part of the call: only `types` (`mm_token_type_ids`, or
        `None`) are compared with them. Raises `ValueError` where a grid, `valid` or `types` does not fit the prompt.
        """
        for name, grid in grids.items():
            if (grid := torch.as_tensor(grid)).dim() != 2 or grid.is_floating_point():
                raise ValueError(f"{name} has a row of whole numbers for each, got {grid.dtype} {tuple(grid.shape)}.")
        if valid is not None and len(valid) != len(kinds):
            raise ValueError(f"attention_mask has {len(valid)} rows, the prompt {len(kinds)}: give each sample one.")
        types = kinds if types is None else types
        if types.shape[0] != kinds.shape[0] or types.shape[1] < kinds.shape[1]:
            raise ValueError(
                f"mm_token_type_ids {tuple(types.shape)} are not those of a prompt {tuple(kinds.shape)}: pass what the "
                "processor returned beside input_ids."
            )
        real = torch.ones_like(kinds, dtype=torch.bool) if valid is None else valid
        # A continued conversation may give types for all of its turns.
        mistyped = (real & (types[:, -kinds.shape[1] :].to(kinds.device) != kinds)).sum().view(1, 1)
        kinds, real = kinds[:, start:], real[:, start:]
        places = (real & (kinds == kind) for kind in range(1, 1 + len(MODALITIES)))
        counts = torch.stack([marked.sum(1) for marked in (real, *places)])
        tables = [mistyped, counts, *(torch.as_tensor(grid).to(kinds.device) for grid in grids.values())]
        values = iter(torch.cat([table.flatten() for table in tables]).tolist())
        tables = [[[next(values) for _ in range(table.shape[1])] for _ in range(len(table))] for table in tables]
        ((mistyped,),), (lengths, *counts), *rows = tables
        placeholders, grids = dict(zip(MODALITIES, counts)), dict(zip(grids, rows))
        return cls(kinds, None if valid is None else real, lengths, placeholders, grids, mistyped)

    def owners(self, modality: str, sizes: list[int]) -> list[int]:
        """The sample of each image, or part of a video, of `sizes` tokens; `ValueError` where they do not fit."""
        owners, left = [], sizes[::-1]
        for row, count in enumerate(self.placeholders[modality]):
            while count > 0 and left:
                count -= left.pop()
                owners.append(row)
            if count != 0:
                break
        if count != 0 or left:
            raise ValueError(
                f"{modality.capitalize()} features and {modality} tokens do not match: the {modality}s have {sizes} "
                f"tokens, and the samples hold {self.placeholders[modality]} placeholders (none under attention_mask "
                "0). Build input_ids and pixels with one processor call; in a later turn on one cache, give that "
                "turn's pixels alone."
            )
        return owners
