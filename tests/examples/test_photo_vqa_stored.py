# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Stored scenes are asked about as if the tower had seen their pictures."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.compare import build_prompt, load_processor
from learnpruner.methods import METHODS

import accuracy
import prompts
import questions
import stored
from features import LAYER
from tiny_photo import scene_of
from tower import pixel_values

SCENES = 3


def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (336, 336, 3), dtype=np.uint8)) for _ in range(SCENES)]


@pytest.fixture(scope="module")
def checkpoint(joined, renamed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photo-llava")
    joined[-1].save_pretrained(folder)
    prompts.build_processor(renamed).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["a", "b"])
def folder(request, joined, tmp_path_factory):
    """Features of three pictures, as the tower of `joined` sees them."""
    folder = tmp_path_factory.mktemp("features")
    scenes = [scene_of(number, request.param) for number in range(SCENES)]
    with torch.no_grad():
        pixels = torch.stack([pixel_values(picture) for picture in pictures()])
        layer = joined[3](pixels, output_hidden_states=True).hidden_states[LAYER]
    coverage = torch.cat([torch.from_numpy(scene.coverage) for scene in scenes])
    save_file({"layer": layer.contiguous(), "coverage": coverage}, folder / "00000.safetensors")
    records = [scene.record() | {"pixels": str(number)} for number, scene in enumerate(scenes)]
    about = {"made_of": {"fold": 0, "set": request.param}, "scenes": records}
    (folder / "00000.json").write_text(json.dumps(about))
    return folder


def test_questions_are_those_of_the_scenes(folder):
    data = stored.StoredQuestions(stored.Features(folder))
    scene = scene_of(1, folder_set := data.features.made_of["set"])
    expected = questions.test_questions(scene, questions.random_of(scene), "merged" if folder_set == "b" else "fine")
    rows = [row for row in data if row["scene"] == 1]
    assert [(row["kind"], row["question"], row["answer"]) for row in rows] == [
        (one.kind, one.question, one.answer) for one in expected
    ]
    assert [row["boxes"] for row in rows] == [[scene.objects[place].box for place in one.about] for one in expected]
    assert data["answer"][: len(data)] == [row["answer"] for row in data]
    assert data.pixels_digest() == hashlib.sha256(b"0\n1\n2").hexdigest()
    assert len(stored.StoredQuestions(stored.Features(folder), limit=4)) == 4


@pytest.mark.parametrize("name", ["learnpruner", "cls_attention", "vispruner", "divprune"])
def test_logits_are_those_of_pictures(checkpoint, folder, name):
    data = stored.StoredQuestions(stored.Features(folder))
    rows = [data[number] for number in range(0, len(data), 3)]
    processor = stored.StoredProcessor.from_pretrained(checkpoint)
    text = [build_prompt(processor, row["question"]) for row in rows]
    model = LearnPrunerForConditionalGeneration.from_pretrained(checkpoint).eval()
    usual = load_processor(str(checkpoint))
    seen = usual(images=[pictures()[row["scene"]] for row in rows], text=text, padding=True, return_tensors="pt")
    given = processor(images=[row["image"] for row in rows], text=text, padding=True, return_tensors="pt")
    assert torch.equal(seen["input_ids"], given["input_ids"])
    assert torch.equal(seen["attention_mask"], given["attention_mask"])
    schedule = METHODS[name](1 / 18)
    with torch.no_grad():
        expected = model(**seen, schedule=schedule)
        stored.read_stored(model)
        found = model(**given, schedule=schedule)
    assert torch.equal(expected.kept_mask[-1], found.kept_mask[-1])
    assert torch.allclose(expected.logits, found.logits, atol=1e-4)
    assert expected.logits.std() > 0.1


def test_a_record_of_stored_scenes(checkpoint, folder, tmp_path):
    paths = [tmp_path / f"{name}.json" for name in ("none", "oracle")]
    common = ["--model", str(checkpoint), "--photo", str(folder), "--dtype", "bfloat16"]
    assert accuracy.main([*common, "--method", "none", "--output", str(paths[0])]) == 0
    ratio = ["--method", "oracle_boxes", "--ratio", "1/18"]
    assert accuracy.main([*common, *ratio, "--output", str(paths[1])]) == 0
    unpruned, oracle = (json.loads(path.read_text()) for path in paths)
    data = stored.StoredQuestions(stored.Features(folder))
    assert oracle["level"] == data.level
    assert oracle["n"] == unpruned["n"] == len(data)
    assert oracle["dtype"] == "bfloat16"
    assert oracle["pixels_sha256"] == data.pixels_digest()
    assert oracle["tokens"]["after_cuts"] == [32]
    # The boxes of one question hold fewer patches than 32, or a good part of them.
    assert oracle["tokens"]["objects_seen"] == [1.0]
    assert oracle["answers"]["scene"] == data["scene"]
