# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Stored scenes as benchmarks/accuracy.py asks about them: the tower's hidden states stand in for pictures."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import BatchEncoding, LlavaProcessor, PreTrainedModel

from features import LAYER, Features
from photo_scenes import SIDE
from prompts import TOKENS
from questions import random_of, test_questions


@dataclass(frozen=True)
class StoredPicture:
    """A scene's picture, as the tower saw it."""

    features: Features
    number: int
    size = (SIDE, SIDE)

    def hidden_state(self) -> torch.Tensor:
        """Float16 `(577, 384)`."""
        return self.features.layer(self.number)


class StoredQuestions(Sequence):
    """Test questions of stored scenes: rows by number, columns by name.

    A row has `image` ([`StoredPicture`]), `scene` (its number), `kind`, `question`, `answer`, and `boxes`, in pixels,
    of what answers the question; of all asked objects where the answer is that there is nothing.

    Args:
        features ([`Features`]): Of one of the sets "validation", "a" and "b"; the last is asked with merged words.
        limit (`int`, *optional*): The first questions only.
        other (`bool`): With the picture of the next scene, which tells what questions alone give away.
    """

    def __init__(self, features: Features, limit: int | None = None, other: bool = False):
        self.features, self.rows = features, []
        for number in range(len(features)):
            scene = features.scene(number)
            for one in test_questions(scene, random_of(scene), "merged" if scene.set == "b" else "fine"):
                boxes = [scene.objects[place].box for place in one.about]
                picture = StoredPicture(features, (number + other) % len(features))
                row = {"image": picture, "scene": number, "boxes": boxes}
                self.rows.append({**row, "kind": one.kind, "question": one.question, "answer": one.answer})
        self.rows = self.rows[:limit]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | str):
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]

    @property
    def level(self) -> str:
        made_of = self.features.made_of
        return f"photo-{made_of['set']}-{made_of['fold']}"

    def pixels_digest(self) -> str:
        """SHA-256 of the digests of the pictures that are asked about, in turn."""
        pixels = [self.features.pixels(picture.number) for picture in dict.fromkeys(self["image"])]
        return hashlib.sha256("\n".join(pixels).encode()).hexdigest()


class StoredProcessor(LlavaProcessor):
    """The photo model's processor, for [`StoredPicture`]s."""

    def __call__(self, images: list[StoredPicture], text: list[str], **options) -> BatchEncoding:
        text = [one.replace(self.image_token, self.image_token * TOKENS) for one in text]
        inputs = self.tokenizer(text, **options)
        inputs["pixel_values"] = torch.stack([image.hidden_state() for image in images])
        return inputs


def read_stored(model: PreTrainedModel) -> None:
    """Makes a photo model take stored hidden states for pixels: of its tower only the layer behind them runs, whose
    output the projector reads. What hooks that layer, or computes the class token's attention there, still can."""
    tower = model.get_encoder("image")

    def hand_on(states, *_, **__):
        return states.to(tower.dtype)

    for module in (tower.embeddings, *tower.encoder.layer[:LAYER], *tower.encoder.layer[LAYER + 1 :]):
        module.forward = hand_on
