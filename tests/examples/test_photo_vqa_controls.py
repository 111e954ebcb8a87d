# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Controls of the photo bench: a module trained on labels of patches finds them, a probe names what it can tell."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from learnpruner import LearnPrunerForConditionalGeneration

import label_pruner
import probe
import prompts
from features import LAYER, Features
from packages import Packages
from stamps import MERGED
from tiny_photo import scene_of, tiny_tower

SCENES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Features in which each merged word has a direction of its own, and what is not asked about another."""
    folder = tmp_path_factory.mktemp("features") / "train"
    folder.mkdir()
    scenes = [scene_of(number) for number in range(SCENES)]
    generator = torch.Generator().manual_seed(0)
    looks = 4 * torch.randn(len(MERGED) + 1, 24, generator=generator)
    layers = 0.1 * torch.randn(SCENES, 577, 24, generator=generator)
    for layer, scene in zip(layers, scenes):
        for thing, cover in zip(scene.objects, scene.coverage):
            layer[1:][torch.from_numpy(cover).flatten() >= 0.5] += looks[
                MERGED.index(thing.merged) if thing.asked else -1
            ]
    coverage = torch.cat([torch.from_numpy(scene.coverage) for scene in scenes])
    save_file({"layer": layers.half(), "coverage": coverage}, folder / "00000.safetensors")
    records = [scene.record() | {"pixels": ""} for scene in scenes]
    (folder / "00000.json").write_text(json.dumps({"made_of": {"fold": 0, "set": "train"}, "scenes": records}))
    return folder


def test_labels_are_the_middles_of_asked_objects(folder):
    labels = label_pruner.labels_of(Features(folder), 3).view(24, 24).bool()
    assert labels.sum() == label_pruner.LABELLED
    for thing, cover in zip(scene_of(3).objects, torch.from_numpy(scene_of(3).coverage)):
        here = labels & (cover > 0)
        assert bool(here.any()) == thing.asked
        if thing.asked:
            column, row = (int(place // 14) for place in thing.center)
            assert labels[row, column]
            # Objects take turns.
            assert here.sum() in (label_pruner.LABELLED // 3, label_pruner.LABELLED // 3 + 1)


def test_a_module_that_is_told_finds_them(joined, renamed, folder, tmp_path):
    joined[-1].save_pretrained(tmp_path / "base")
    prompts.build_processor(renamed).save_pretrained(tmp_path / "base")
    arguments = ["--base", str(tmp_path / "base"), "--features", str(folder), "--scenes", str(SCENES)]
    output = tmp_path / "pruner"
    assert label_pruner.main([*arguments, "--epochs", "60", "--output", str(output)]) == 0
    losses = json.loads((output / "training.json").read_text())["loss"]
    assert losses[-1] < 0.5 * losses[0]
    assert all("pruner" in name for name in load_file(output / "model.safetensors"))
    model = LearnPrunerForConditionalGeneration.from_pretrained(output)
    assert model.config.pruner_trained
    with torch.no_grad():
        seen = model.get_encoder("image").encoder.layer[LAYER](Features(folder).layer(0).float()[None])[0, 1:]
        scores = model.model.pruner(seen)
    labels = label_pruner.labels_of(Features(folder), 0).bool()
    asked = [place for place, thing in enumerate(scene_of(0).objects) if thing.asked]
    others = torch.from_numpy(scene_of(0).coverage[asked]).amax(0).flatten() == 0
    assert scores[labels].median() > scores[others].quantile(0.95)


def test_the_probe_names_what_features_tell(joined, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "find", lambda folder: Packages(*[tmp_path] * 6))
    tower = tiny_tower()
    tower.encoder.layer[LAYER].forward = lambda states, *_, **__: states
    monkeypatch.setattr(probe, "load_tower", lambda path: tower)
    output = tmp_path / "probe.json"
    given = ["--features", str(folder), "--scenes", str(SCENES), "--on", str(folder), "--output", str(output)]
    assert probe.main(given) == 0
    found = json.loads(output.read_text())
    assert found["accuracy"] == 1
    assert found["objects"] == 3 * SCENES
    assert set(found["by_word"]) == {t.merged for n in range(SCENES) for t in scene_of(n).objects if t.asked}
