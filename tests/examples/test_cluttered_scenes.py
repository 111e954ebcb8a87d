# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Cluttered scenes: true boxes and answers, and nothing that two splits share."""

import importlib.util
import json
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

import grounds
import scenes
from by_hand import RED_GREEN_BLUE, answer_by_hand
from scenes import COLORS, KINDS, OBJECTS, SIDE, scene_at, sources

with_photographs = pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason=grounds.INSTALL)
NUMBERS = range(40)


@pytest.fixture(scope="module")
def drawn():
    """Some scenes of each split, with their questions."""
    return {split: [scene_at(split, "cluttered", 0, number, 4) for number in NUMBERS] for split in grounds.GROUNDS}


@with_photographs
def test_boxes_hold_the_objects_and_nothing_else(drawn, monkeypatch):
    """The same scenes with their objects in other colors differ inside the boxes alone, and at all four edges."""
    cut_out = scenes._cut_out

    def recolored(source, scale):
        mask, color = cut_out(source, scale)
        return mask, tuple((value + 128) % 256 for value in color)

    monkeypatch.setattr(scenes, "_cut_out", recolored)
    for number in NUMBERS:
        scene, _ = drawn["train"][number]
        least, most = OBJECTS["cluttered"]
        assert least <= len(scene.objects) == len(scene.boxes) <= most
        assert scene.image.size == (SIDE, SIDE)
        other = scene_at("train", "cluttered", 0, number, 4)[0]
        assert other.boxes == scene.boxes
        change = np.abs(np.asarray(scene.image).astype(int) - np.asarray(other.image)).max(-1)
        for left, top, right, bottom in scene.boxes:
            assert 0 <= left < right <= SIDE
            assert 0 <= top < bottom <= SIDE
            inside = change[top:bottom, left:right]
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.max() >= 128 // 2 - grounds.NOISE
            inside[:] = 0  # so that boxes which overlap would fail
        assert not change.any()


@with_photographs
def test_objects_can_be_told_from_all_else(drawn):
    """Each is of its color in the middle, and nothing outside the boxes is of a color that is asked about."""
    asked = np.array(list(RED_GREEN_BLUE.values()))
    for scene, _ in (row for rows in drawn.values() for row in rows):
        pixels = np.asarray(scene.image).astype(int)
        outside = np.ones((SIDE, SIDE), dtype=bool)
        for source, (left, top, right, bottom) in zip(scene.objects, scene.boxes):
            middle = pixels[(top + bottom) // 2, (left + right) // 2]
            assert np.abs(middle - RED_GREEN_BLUE[source.color]).max() < 30
            outside[top:bottom, left:right] = False
        assert np.abs(pixels[outside][:, None] - asked).max(-1).min() > 30


@with_photographs
def test_objects_stand_anywhere_in_several_sizes_and_often_close(drawn):
    boxes = [box for rows in drawn.values() for scene, _ in rows for box in scene.boxes]
    assert len({left % scenes.CELL for left, *_ in boxes}) > 40
    longest = sorted(max(right - left, bottom - top) for left, top, right, bottom in boxes)
    assert longest[0] < 16
    assert longest[-1] > 44
    close = [
        any(not grounds.free(box, [other], scenes.CLOSE + 1) for other in scene.boxes if other != box)
        for rows in drawn.values()
        for scene, _ in rows
        for box in scene.boxes
    ]
    assert 0.3 < sum(close) / len(close) < 0.9


@with_photographs
def test_splits_share_no_image_and_no_ground(drawn, monkeypatch):
    names = [name for names in grounds.GROUNDS.values() for name in names]
    assert len(set(names)) == len(names)
    pixels = [image.tobytes() for split in grounds.GROUNDS for image in grounds.photographs(split)]
    assert len(set(pixels)) == len(names)
    paths = {split: {source.path for source in sources(split)} for split in ("train", "test")}
    for split, rows in drawn.items():
        used = {source.path for scene, _ in rows for source in scene.objects}
        assert used <= paths["test" if split == "test" else "train"]
    photographs, taken = grounds.photographs, []
    monkeypatch.setattr(grounds, "photographs", lambda name: taken.append(name) or photographs(name))
    for split in grounds.GROUNDS:
        scene_at(split, "cluttered", 0, 0, 1)
        assert set(taken) == {split}
        taken.clear()


@with_photographs
def test_a_scene_depends_on_split_seed_and_number_alone(drawn):
    seen = set()
    for split in grounds.GROUNDS:
        for seed, number in ((0, 3), (0, 4), (1, 3)):
            scene, asked = scene_at(split, "cluttered", seed, number, 4)
            seen.add(scene.image.tobytes())
            if seed == 0:
                assert scene.image.tobytes() == drawn[split][number][0].image.tobytes()
                assert (scene.boxes, asked) == (drawn[split][number][0].boxes, drawn[split][number][1])
    assert len(seen) == 9


@with_photographs
def test_answers_are_right_and_balanced():
    answers = defaultdict(Counter)
    for number in range(300):
        scene, asked = scene_at("validation", "cluttered", 1, number, 4)
        for kind, question, answer in asked:
            assert answer == answer_by_hand(question, scene.objects), question
            answers[kind][answer] += 1
    assert set(answers) == set(KINDS)
    # Nobody is often right without a look at the image.
    often = {kind: max(given.values()) / given.total() for kind, given in answers.items()}
    assert often["color"] < 0.25
    assert often["shape"] < 0.45
    assert often["presence"] < 0.58
    assert often["count"] < 0.45
    assert set(answers["color"]) == set(COLORS)
    assert {"0", "1", "2", "3"} <= set(answers["count"])
    for kind in KINDS:
        assert 0.15 < answers[kind].total() / 1200 < 0.35


@with_photographs
def test_train_scenes_in_files(tmp_path):
    """Three levels take equal shares, and a first one what is left over."""
    arguments = ["--output", str(tmp_path), "--levels", "standard", "hard", "cluttered"]
    assert scenes.main([*arguments, "--questions", "4", "--held-out", "3"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    levels = ("standard", "standard", "hard", "cluttered")
    for row, level, number in zip(rows, levels, (0, 1, 0, 0), strict=True):
        scene, asked = scene_at("train", level, 0, number, 1)
        assert Image.open(tmp_path / row["image"]).tobytes() == scene.image.tobytes()
        assert (row["question"], row["answer"]) == asked[0][1:]
    assert len((tmp_path / "eval.jsonl").read_text().splitlines()) == 3


def test_a_crowded_ground_is_given_up():
    """In place of a loop without end."""
    assert scenes._place(random.Random(0), (100, 100), [(60, 60, 130, 130)]) is None


def test_unknown_splits():
    with pytest.raises(ValueError, match="validation"):
        scene_at("eval", "cluttered", 0, 0, 1)


def test_without_the_photographs(tmp_path, monkeypatch, capsys):
    """One clear line that names the command, where the package is missing, is not whole, or is another."""
    grounds.photographs.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert scenes.main(["--output", str(tmp_path), "--levels", "cluttered"]) == 2
    says = f"scenes: The photographs of cluttered scenes are in scikit-image: {grounds.INSTALL}\n"
    assert capsys.readouterr().err == says
    (tmp_path / "data").mkdir()
    spec = importlib.util.spec_from_file_location("skimage", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ImportError, match=r"missing .*: pip install .*scikit-image.* --force-reinstall"):
        grounds.photographs("train")
    for name in (name for names in grounds.GROUNDS.values() for name in names):
        Image.new("RGB", (200, 200)).save(tmp_path / "data" / name)
    with pytest.raises(ImportError, match=r"not those .*: pip install .*scikit-image.* --force-reinstall"):
        grounds.photographs("test")
