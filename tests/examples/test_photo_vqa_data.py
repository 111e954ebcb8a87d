# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Scenes of photographs say the truth, splits share nothing, and answers follow from boxes.

Stamps and grounds are made in conftest.py.
"""

import json
import random
import re
from collections import Counter, defaultdict
from itertools import combinations

import numpy as np
import pytest

import photo_scenes
import questions
from photo_scenes import GRID, OVERLAP, PATCH, SETS, SIDE, Object, Scene, draw_kinds, grounds, make_scene
from questions import NUMBERS, commonest, random_of, statistics, training_questions
from stamps import FINE, FOLDS, KINDS, MERGED, held_out, plural, training, with_article


def unpictured(number: int, set_: str = "train", fold: int = 0) -> Scene:
    """A scene of the kinds that the real one might have, anywhere: many in no time."""
    rng = random.Random(f"{set_} {number}")
    found = []
    for kind in draw_kinds(rng, set_) + [KINDS["coin"]] * 3:
        left, top = rng.randint(0, 250), rng.randint(0, 250)
        box = (left, top, left + rng.randint(50, 80), top + rng.randint(50, 80))
        found.append(Object(kind.name, kind.merged, kind.files[0], box, rng.randint(500, 9000), kind.asked))
    rng.shuffle(found)
    return Scene(fold, set_, number, "none", tuple(found))


@pytest.mark.parametrize("fold", range(FOLDS))
def test_stamps_of_training_and_held_out_ones_are_disjoint(fold):
    for kind in KINDS.values():
        seen, out = training(kind, fold), held_out(kind, fold)
        assert not set(seen) & set(out)
        assert 2 <= len(seen) <= kind.training
        assert out
    with pytest.raises(ValueError, match="below 3, got 3"):
        held_out(KINDS["cow"], FOLDS)


def test_every_stamp_is_held_out_in_one_fold():
    for kind in KINDS.values():
        assert sorted(file for fold in range(FOLDS) for file in held_out(kind, fold)) == sorted(kind.files)
    files = [file for kind in KINDS.values() for file in kind.files]
    assert len(set(files)) == len(files)


def test_a_word_has_one_meaning():
    for kind in KINDS.values():
        alike = [other for other in KINDS.values() if other.merged == kind.merged]
        assert kind.merged not in KINDS or alike == [kind]
    assert 14 <= len(FINE) <= 18
    assert 8 <= len(MERGED) <= 12


def test_grounds_of_splits_are_disjoint_and_all_used():
    splits = [grounds(split) for split in ("train", "validation", "test")]
    assert len(set().union(*splits)) == sum(map(len, splits)) == 74
    assert all(len({name.split("/")[0] for name in splits[place]}) == 3 for place in (0, 2))


@pytest.mark.parametrize("set_", SETS)
def test_scenes_use_the_stamps_and_grounds_of_their_set(scenes, set_):
    allowed = held_out if set_ == "b" else training
    for scene in scenes[set_]:
        assert scene.ground in grounds(SETS[set_])
        assert all(thing.file in allowed(KINDS[thing.name], 0) for thing in scene.objects)


def test_a_scene_depends_on_its_arguments_alone(material, scenes):
    photo_scenes._stamp.cache_clear()
    photo_scenes._ground.cache_clear()
    for set_ in SETS:
        again = make_scene(material, 0, set_, 7)
        assert again == scenes[set_][7]
        assert again.picture.tobytes() == scenes[set_][7].picture.tobytes()
        np.testing.assert_array_equal(again.coverage, scenes[set_][7].coverage)
    pictures = [scene.picture.tobytes() for rows in scenes.values() for scene in rows]
    assert len(set(pictures)) == len(pictures)
    assert make_scene(material, 1, "a", 7) != scenes["a"][7]
    with pytest.raises(ValueError, match="'test'"):
        make_scene(material, 0, "test", 0)


def test_objects_stand_where_the_scene_says(scenes):
    for scene in (scene for rows in scenes.values() for scene in rows):
        pixels = np.asarray(scene.picture).astype(int)
        assert pixels.shape == (SIDE, SIDE, 3)
        assert scene.coverage.shape == (len(scene.objects), GRID, GRID)
        for thing, cover in zip(scene.objects, scene.coverage):
            left, top, right, bottom = thing.box
            red, green, blue = pixels[(top + bottom) // 2, (left + right) // 2]
            assert ((red, blue) if thing.asked else (blue, red)) > (150, 0)
            assert green < 20
            assert cover.astype(float).sum() * PATCH**2 == pytest.approx(thing.area, rel=0.01)
            assert thing.area == pytest.approx(np.pi / 4 * (right - left) * (bottom - top), rel=0.1)
            rows, columns = np.nonzero(cover)
            assert left // PATCH <= columns.min()
            assert columns.max() <= right // PATCH
            assert top // PATCH <= rows.min()
            assert rows.max() <= bottom // PATCH


def test_scenes_hold_what_they_promise(scenes):
    for scene in (scene for rows in scenes.values() for scene in rows):
        asked = [thing for thing in scene.objects if thing.asked]
        assert 3 <= len(asked) <= 5
        assert 4 <= len(scene.objects) - len(asked) <= 10
        for thing in scene.objects:
            left, top, right, bottom = thing.box
            assert min(left, top, SIDE - right, SIDE - bottom) >= 0
            low, high = (51, 126) if thing.asked else (39, 101)
            assert low <= max(right - left, bottom - top) <= high
        for one, other in combinations(scene.objects, 2):
            apart = max(
                max(one.box[axis], other.box[axis]) - min(one.box[axis + 2], other.box[axis + 2]) for axis in (0, 1)
            )
            assert apart >= -OVERLAP


@pytest.mark.parametrize("set_", ["train", "b"])
def test_half_of_the_scenes_repeat_one_kind(set_):
    tops = Counter()
    for number in range(1000):
        kinds = draw_kinds(random.Random(number), set_)
        counts = Counter(kind.merged if set_ == "b" else kind.name for kind in kinds)
        tops[max(counts.values())] += 1
        assert sorted(counts.values())[:-1] == [1] * (len(counts) - 1)
    assert 440 <= tops[1] <= 560
    assert 200 <= tops[2] <= 300
    assert 200 <= tops[3] <= 300


def test_a_record_gives_the_scene_back(scenes):
    scene = scenes["b"][0]
    assert Scene.of_record(json.loads(json.dumps(scene.record()))) == scene


def by_boxes(scene: Scene, one: questions.Question, words: str) -> tuple[str, set[int]]:
    """The answer and the objects that give it, from the text and the boxes."""
    asked = [number for number, thing in enumerate(scene.objects) if thing.asked]

    def name(number):
        return scene.objects[number].name if words == "fine" else scene.objects[number].merged

    def middle(number):
        left, top, right, bottom = scene.objects[number].box
        return (left + right) / 2, (top + bottom) / 2

    names = FINE if words == "fine" else MERGED
    if found := re.fullmatch(r"Is there (an? \w+)\?", one.question):
        there = {number for number in asked if with_article(name(number)) == found[1]}
        return ("yes", there) if there else ("no", set(asked))
    if found := re.fullmatch(r"How many ([\w ]+) are there\?", one.question):
        there = {number for number in asked if plural(name(number)) == found[1]}
        return NUMBERS[len(there)], there or set(asked)
    if found := re.fullmatch(r"Which .+ is at the ([\w ]+)\?", one.question):
        assert ("kind of" in one.question) == (words == "merged")
        row, column = found[1].split() if " " in found[1] else ("center", "center")
        spans = {"left": (0, 112), "top": (0, 112), "center": (112, 224), "right": (224, 336), "bottom": (224, 336)}
        there = [
            number
            for number in asked
            if all(low <= place < high for place, (low, high) in zip(middle(number), (spans[column], spans[row])))
        ]
        assert len(there) == 1
        assert all(abs(place - border) >= 8 for place in middle(there[0]) for border in (112, 224))
        return name(there[0]), set(there)
    if re.fullmatch(r"Which .+ is largest\?", one.question):
        first, second = sorted(asked, key=lambda number: scene.objects[number].area)[-1:-3:-1]
        assert scene.objects[first].area > 1.3 * scene.objects[second].area
        return name(first), {first}
    found = re.fullmatch(r"Is the (\w+) (on the left or right|at the top or bottom)\?", one.question)
    (there,) = (number for number in asked if name(number) == found[1])
    assert found[1] in names
    across, down = middle(there)
    if "left" in found[2]:
        return "left" if across < 168 else "right", {there}
    return "top" if down < 168 else "bottom", {there}


@pytest.mark.parametrize(("set_", "words"), [("train", "fine"), ("a", "fine"), ("b", "merged"), ("train", "merged")])
def test_answers_follow_from_boxes(set_, words):
    kinds = Counter()
    for scene in (unpictured(number, set_) for number in range(150)):
        asked = questions.test_questions(scene, random_of(scene), words)
        assert asked == questions.test_questions(scene, random_of(scene), words)
        assert len({one.question for one in asked}) == len(asked)
        for one in asked:
            answer, about = by_boxes(scene, one, words)
            assert (one.answer, set(one.about)) == (answer, about), one
            assert one.answer in one.choices
            kinds[one.kind] += 1
    assert kinds.keys() == questions.ASKERS.keys()
    assert kinds.total() >= 2000 / 300 * 150


def test_training_asks_with_both_lists_and_nothing_twice():
    total, words = 0, Counter()
    for scene in (unpictured(number) for number in range(200)):
        asked = training_questions(scene, random_of(scene))
        assert len({one.question for one in asked}) == len(asked)
        for one in asked:
            text = one.question.replace("citrus fruits", "citrus")
            fine = not re.search("kind of|beast|fruit", text)
            assert (one.answer, set(one.about)) == by_boxes(scene, one, "fine" if fine else "merged")
            words[fine] += 1
        total += len(asked)
    assert 20 <= total / 200 <= 28
    assert words[False] > 0.2 * words.total()


@pytest.mark.parametrize(("set_", "words"), [("a", "fine"), ("b", "merged")])
def test_neither_the_word_nor_the_kind_of_question_tells_the_answer(set_, words):
    presence, counts = defaultdict(Counter), Counter()
    for scene in (unpictured(number, set_) for number in range(500)):
        for one in questions.questions(scene, random_of(scene), words=words, wanted={"presence": 16, "count": 2}):
            if one.kind == "presence":
                presence[one.question][one.answer] += 1
            else:
                counts[one.answer] += 1
    total = sum(presence.values(), Counter())
    assert total["yes"] / total.total() == pytest.approx(0.5, abs=0.03)
    for question, answers in presence.items():
        assert answers["yes"] / answers.total() == pytest.approx(0.5, abs=0.12), question
    assert all(0.12 <= counts[number] / counts.total() <= 0.38 for number in NUMBERS)


def test_unknown_words_and_kinds_are_refused():
    for words, wanted in (("coarse", {}), ("fine", {"color": 1})):
        with pytest.raises(ValueError, match=r"fine.*presence"):
            questions.questions(unpictured(0), random.Random(0), words=words, wanted=wanted)


def test_statistics_are_those_of_the_answers():
    def thing(name, area):
        return Object(name, KINDS[name].merged, "", (0, 0, 60, 60), area, True)

    scene = Scene(0, "a", 0, "", (thing("cow", 1), thing("cow", 2), thing("pig", 9), thing("bird", 3)))
    assert commonest(scene, "fine") == ("cow",)
    assert commonest(scene, "merged") == ("beast",)
    sides = [questions.Question("side", "", answer, pair, (0,)) for pair in (("left", "right"),) for answer in pair]
    sides += [questions.Question("side", "", "top", ("top", "bottom"), (0,))] * 2
    largest = questions.Question("largest", "", "pig", FINE, (2,))
    found = statistics([(scene, [*sides, largest]), (scene, [largest])], "fine")
    assert found["side"]["questions"] == 4
    assert found["side"]["majority"] == 0.75
    assert found["side"]["commonest"] is None
    assert found["largest"] == {"questions": 2, "answers": {"pig": 2}, "majority": 1.0, "commonest": 0.0}
