# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The photo model's trained weights, as they are committed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import packages
import photo_llava
import train_base

FOLDERS = sorted((Path(train_base.__file__).parent / "trained").iterdir())
HIDDEN, LAYERS, TOWER = 576, 30, 384


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_weights_and_record(folder):
    weights = load_file(folder / "photo-llava.safetensors")
    factors = [name for name in weights if name.startswith("text.")]
    assert len(factors) == 2 * LAYERS * len(photo_llava.ADAPTED)
    assert all(photo_llava.RANK in weights[name].shape for name in factors)
    assert weights["projector.linear_1.weight"].shape == (HIDDEN, TOWER)
    assert weights["projector.linear_2.weight"].shape == (HIDDEN, HIDDEN)
    assert all(weight.isfinite().all() and weight.dtype == torch.float16 for weight in weights.values())
    assert all(weights[name].abs().max() > 0 for name in factors if name.endswith(".up"))
    record = json.loads((folder / "photo-llava.json").read_text())
    assert record["done"] == record["sequences"]
    assert str(record["made_of"]["fold"]) == folder.name
    assert {name: record["made_of"][name] for name in ("tower", "text")} == {
        name: packages.DIGESTS[name] for name in ("tower", "text")
    }
