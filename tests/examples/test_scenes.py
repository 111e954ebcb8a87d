"""Scenes say the truth: what is drawn, where it stands, and what the answers are."""

import hashlib
import json
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import scenes
from by_hand import RED_GREEN_BLUE, answer_by_hand
from scenes import CELL, GRIDS, KINDS, OBJECTS, ask, make_scene, scene_at, scene_dataset, sources


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_from_the_questions_are_the_colors_of_the_pixels(split):
    images = sources(split)
    assert len(images) > 800
    for source in images[::7]:
        pixels = np.asarray(Image.open(source.path).convert("RGB")).astype(int)
        left, top, right, bottom = source.box
        middle = pixels[(top + bottom) // 2, (left + right) // 2]
        assert np.abs(middle - RED_GREEN_BLUE[source.color]).max() < 30, source
        # A shape fills its box as its kind does: a rectangle all, a circle pi / 4, a triangle half.
        share = source.area / ((right - left) * (bottom - top))
        kinds = {"rectangle": (0.9, 1.01), "circle": (0.68, 0.9), "triangle": (0.4, 0.68)}
        low, high = kinds[source.shape]
        assert low < share < high, (source, share)


def test_splits_share_no_image():
    assert not {source.path for source in sources("train")} & {source.path for source in sources("test")}


def check_boxes(scene, columns, rows):
    """The boxes hold the objects whole and nothing else; ground is light everywhere else."""
    assert scene.image.size == (columns, rows)
    pixels = np.asarray(scene.image).astype(int)
    inside = np.zeros((rows, columns), dtype=bool)
    for source, (left, top, right, bottom) in zip(scene.objects, scene.boxes):
        assert (right - left, bottom - top) == (source.box[2] - source.box[0], source.box[3] - source.box[1])
        assert not inside[top:bottom, left:right].any()
        inside[top:bottom, left:right] = True
        middle = pixels[(top + bottom) // 2, (left + right) // 2]
        assert np.abs(middle - RED_GREEN_BLUE[source.color]).max() < 30
    assert pixels[~inside].min(initial=255) > 150


@pytest.mark.parametrize("level", GRIDS)
def test_boxes_hold_the_objects_and_nothing_else(level):
    for number in range(40):
        scene, _ = scene_at("test", level, 0, number, 1)
        least, most = OBJECTS[level]
        assert least <= len(scene.objects) <= most
        rows, columns = GRIDS[level]
        check_boxes(scene, CELL * columns, CELL * rows)


@pytest.mark.parametrize(("grid", "cell"), [((1, 3), 64), ((3, 2), 40), ((2, 2), 24)])
def test_scenes_of_other_sizes(grid, cell):
    rows, columns = grid
    for number in range(40):
        scene = make_scene(random.Random(number), sources("train"), (1, rows * columns), grid=grid, cell=cell)
        check_boxes(scene, columns * cell, rows * cell)


def test_the_hard_shapes_are_the_smaller_ones():
    areas = sorted(source.area for source in sources("test"))
    for number in range(20):
        scene, _ = scene_at("test", "hard", 1, number, 1)
        assert max(source.area for source in scene.objects) <= areas[len(areas) // 2]


@pytest.mark.parametrize("level", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_answers(kind, level):
    rng = random.Random(0)
    answers = Counter()
    for number in range(300):
        scene, _ = scene_at("test", level, 2, number, 1)
        asked = ask(rng, scene, kind)
        if asked is not None:
            question, answer = asked
            assert answer == answer_by_hand(question, scene.objects), question
            answers[answer] += 1
    assert len(answers) >= {"color": 8, "shape": 3, "presence": 2, "count": 4}[kind]
    if kind == "presence":
        assert 0.35 < answers["yes"] / answers.total() < 0.65


def test_the_benchmark_counts_what_it_names():
    """Not all shapes: that question has no evidence that is more to it than the rest."""
    questions = {question for number in range(200) for _, question, _ in scene_at("test", "hard", 0, number, 4)[1]}
    counts = {question for question in questions if question.startswith("how many")}
    assert "how many shapes are there?" not in counts
    assert any("circles" in question for question in counts)
    assert any("red" in question for question in counts)


def test_dataset():
    one, same, other = (scene_dataset("test", 6, seed=seed, per_scene=5) for seed in (0, 0, 1))
    assert len(one) == 30
    assert set(one.column_names) == {"image", "question", "answer", "kind", "scene", "boxes"}
    assert set(one["kind"]) == set(KINDS)
    assert one["question"] == same["question"]
    assert one["question"] != other["question"]
    assert np.array_equal(np.asarray(one[7]["image"]), np.asarray(same[7]["image"]))
    assert all(len(box) == 4 for box in one[3]["boxes"])
    # A longer set begins with the shorter one.
    assert scene_dataset("test", 9, per_scene=5)["answer"][:30] == one["answer"]


# Of the first six scenes of seeds 0 and 1, and of their questions. Recorded results are of these scenes.
DIGESTS = {
    ("train", "standard"): "1ccec36347f5259d8a237c3eee8a6522dd0a300908b51d9998b74802204fdad5",
    ("train", "hard"): "0dd4c03d3a702af405e47e33e3a1d8e63ac4b078df81c15b4e02b3a940ffa8b4",
    ("train", "wide"): "7d6265a423b8808dafff4b9958f55c5052dae70f5d1cc14ff8037202cf8b7133",
    ("test", "standard"): "6e5f57fe882181948f722f07f9744218401447b00ded1269d753ea131afa897f",
    ("test", "hard"): "77ce1bbad8643aa4350fdd40540343d103bc460bda01d998d25205d0f5bdd958",
    ("test", "wide"): "86d23b3c408aca08c97b3853ae7433749c19cf65ed3956642009d7c4ae466957",
}


@pytest.mark.parametrize(("split", "level"), DIGESTS)
def test_scenes_stay_as_they_were_recorded(split, level):
    digest = hashlib.sha256()
    for seed in (0, 1):
        for number in range(6):
            scene, asked = scene_at(split, level, seed, number, 4)
            digest.update(repr((scene.image.size, scene.boxes, asked)).encode() + scene.image.tobytes())
    assert digest.hexdigest() == DIGESTS[split, level]


@pytest.mark.parametrize(("split", "level"), [("validation", "standard"), ("test", "easy")])
def test_unknown_names(split, level):
    with pytest.raises(ValueError, match="is"):
        scene_dataset(split, 1, level=level)
    with pytest.raises(ValueError, match="kinds"):
        ask(random.Random(0), scene_at("test", "standard", 0, 0, 1)[0], "place")


def test_a_damaged_package(monkeypatch):
    import easy_vqa

    sources.cache_clear()
    monkeypatch.setattr(easy_vqa, "get_test_image_paths", dict)
    with pytest.raises(ImportError, match=r"pip install --force-reinstall easy-vqa==1\.0"):
        sources("test")
    monkeypatch.setattr(easy_vqa, "get_test_image_paths", lambda: {0: "nowhere.png"})
    with pytest.raises(ImportError, match="missing or damaged"):
        sources("test")
    monkeypatch.undo()
    sources.cache_clear()


def test_scenes_in_files(tmp_path):
    """What `learnpruner train` reads: half of each level, other scenes to choose by, the images as they were."""
    assert scenes.main(["--output", str(tmp_path), "--questions", "5", "--held-out", "4"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    held_out = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert (len(rows), len(held_out)) == (5, 4)
    expected = [
        scene_at("train", level, 0, number, 1)
        for level, half in (("standard", 3), ("hard", 2))
        for number in range(half)
    ]
    for row, (scene, asked) in zip(rows, expected):
        assert np.array_equal(np.asarray(Image.open(tmp_path / row["image"])), np.asarray(scene.image))
        assert [tuple(box) for box in row["boxes"]] == list(scene.boxes)
        assert (row["question"], row["answer"]) == asked[0][1:]
    assert not {str(row["boxes"]) for row in rows} & {str(row["boxes"]) for row in held_out}
