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
    """Where a prompt has its images and videos, and what the host must know of it.

    Attributes:
        kinds (`torch.Tensor` of shape `(batch, sequence)`, int8): 0 text, 1 placeholder of an image, 2 of a video.
        valid (`torch.Tensor` of shape `(batch, sequence)`, bool, or `None`): False at padding.
        lengths (`list[int]`): Rows of each sample that are not padding.
        placeholders (`dict[str, list[int]]`): For each modality, how many placeholders each sample has.
        grids (`dict[str, list[list[int]]]`): For each argument that lays images out, its rows.
        mistyped (`int`): Tokens whose `mm_token_type_ids` are not of their kind.
    """

    kinds: torch.Tensor
    valid: torch.Tensor | None
    lengths: list[int]
    placeholders: dict[str, list[int]]
    grids: dict[str, list[list[int]]]
    mistyped: int = 0

    @classmethod
    def read(
        cls,
        kinds: torch.Tensor,
        valid: torch.Tensor | None,
        grids: dict[str, torch.Tensor],
        types: torch.Tensor | None = None,
        start: int = 0,
    ) -> "Prompt":
        """In one transfer, for which the host waits once. Of `kinds` and `valid`, the columns before `start` are not part
        of the call; only `types` are compared with them.

        Raises:
            `ValueError`: where a grid is no table of whole numbers, or a mask or `types` is not of the prompt.
        """
        for name, grid in grids.items():
            if (grid := torch.as_tensor(grid)).dim() != 2 or grid.is_floating_point():
                raise ValueError(f"{name} has a row of whole numbers for each, got {grid.dtype} {tuple(grid.shape)}.")
        if valid is not None and len(valid) != len(kinds):
            raise ValueError(f"attention_mask has {len(valid)} rows, the prompt {len(kinds)}: give each sample one.")
        if types is None:
            types = kinds
        elif types.shape[0] != kinds.shape[0] or types.shape[1] < kinds.shape[1]:
            raise ValueError(
                f"mm_token_type_ids {tuple(types.shape)} are not those of a prompt {tuple(kinds.shape)}: pass what the "
                "processor returned beside input_ids."
            )
        # A continued conversation may give them for all of its turns.
        mistyped = types[:, -kinds.shape[1] :].to(kinds.device) != kinds
        mistyped = (mistyped if valid is None else mistyped & valid).sum().view(1, 1)
        kinds, valid = kinds[:, start:], None if valid is None else valid[:, start:]
        seen = kinds if valid is None else kinds * valid
        counts = torch.stack([(seen == kind).sum(1) for kind in range(1, 1 + len(MODALITIES))])
        lengths = (kinds >= 0 if valid is None else valid).sum(1).unsqueeze(0)
        tables = [mistyped, lengths, counts, *(torch.as_tensor(grid).to(kinds.device) for grid in grids.values())]
        values = iter(torch.cat([table.flatten() for table in tables]).tolist())
        ((mistyped,),), (lengths,), counts, *rows = [
            [[next(values) for _ in range(table.shape[1])] for _ in range(len(table))] for table in tables
        ]
        return cls(kinds, valid, lengths, dict(zip(MODALITIES, counts)), dict(zip(grids, rows)), mistyped)

    def owners(self, modality: str, sizes: list[int]) -> list[int]:
        """Which sample of the batch each image, or part of a video, belongs to.

        Args:
            sizes (`list[int]`): Tokens of each, in the order of the prompt.

        Raises:
            `ValueError`: where the placeholders of a sample are not those of a whole number of images.
        """
        owners, image = [], 0
        for row, count in enumerate(self.placeholders[modality]):
            while count > 0 and image < len(sizes):
                count -= sizes[image]
                owners.append(row)
                image += 1
            if count != 0:
                break
        if count != 0 or image != len(sizes):
            raise ValueError(
                f"{modality.capitalize()} features and {modality} tokens do not match: the {modality}s have {sizes} "
                f"tokens, and the samples hold {self.placeholders[modality]} placeholders (none under attention_mask "
                "0). Build input_ids and pixels with one processor call; in a later turn on one cache, give that "
                "turn's pixels alone."
            )
        return owners
