# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Scenes come to `learnpruner train` as pictures and conversations."""

import json

import pytest
import torch
from PIL import Image

from learnpruner.training import PrunerCollator, load_samples

import prompts
import pruner_data
from photo_scenes import make_scene
from questions import YES_NO
from tower import pixel_values

NUMBERS = range(5, 8)


@pytest.fixture(scope="module")
def folder(material, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    pruner_data.write(material, 0, NUMBERS, folder, 4)
    return folder


def test_a_row_is_a_scene_and_a_conversation_about_it(material, folder):
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert len(rows) == len(NUMBERS)
    for number, row in zip(NUMBERS, rows):
        scene = make_scene(material, 0, "train", number)
        assert Image.open(folder / row["image"]).tobytes() == scene.picture.tobytes()
        questions = [turn["value"] for turn in row["conversations"] if turn["from"] == "human"]
        assert len(questions) == 4
        assert [question.count("<image>") for question in questions] == [1, 0, 0, 0]
        assert row["conversations"] == pruner_data.conversation(scene, 4)
        assert len(pruner_data.conversation(scene, 100)) > 30


def test_kinds_can_be_chosen(material, tmp_path):
    pruner_data.write(material, 0, NUMBERS, tmp_path, 12, ("presence",))
    for line in (tmp_path / "train.jsonl").read_text().splitlines():
        turns = json.loads(line)["conversations"]
        assert turns
        assert {turn["value"] for turn in turns if turn["from"] == "gpt"} <= set(YES_NO)


def test_the_trainer_reads_what_the_base_was_trained_on(material, folder, renamed):
    """The same prompt, answers and ends alone as labels, and the pixels that features are made of."""
    samples = load_samples(folder / "train.jsonl")
    batch = PrunerCollator(prompts.build_processor(renamed))([samples[0]])
    scene = make_scene(material, 0, "train", NUMBERS[0])
    turns = pruner_data.conversation(scene, 4)
    asked = [(a["value"].removeprefix("<image>\n"), b["value"]) for a, b in zip(turns[::2], turns[1::2])]
    packer = prompts.Packer(renamed)
    packed = packer.pack(asked, apart=False)
    prefix = len(packer.start) + prompts.TOKENS
    assert batch["input_ids"][0, prefix:].tolist() == packed.ids.tolist()
    labels = batch["labels"][0]
    places = (labels != -100).nonzero()[:, 0]
    assert sorted((packed.rows + 1).tolist()) == places.tolist()
    assert torch.equal(labels[packed.rows + 1], packed.targets)
    torch.testing.assert_close(batch["pixel_values"][0], pixel_values(scene.picture))
