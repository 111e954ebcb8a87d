# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""`transformers serve FOLDER --trust-remote-code` finds the class of a checkpoint, where nobody imports the package."""

import subprocess
import sys

import pytest

from tiny_models import FAMILIES, tiny_pair

# What the command does before its first answer; it has no way to import a package.
SERVE = """
import sys
from transformers.cli.serving.model_manager import ModelManager

class Manager(ModelManager):
    def _load_processor(self, *args, **kwargs):  # a stock one, which the tiny models lack
        return None

for folder in sys.argv[1:]:
    manager = Manager(device="cpu", trust_remote_code=True, force_model=folder)
    (timed,) = manager.loaded_models.values()
    model = timed.model
    print(type(model).__name__, manager.get_model_modality(model).name, model.config.pruner_ratio)
    assert type(model).__module__.startswith("transformers_modules.")
    timed.delete_model()
assert "learnpruner" not in sys.modules
"""


@pytest.mark.core
def test_the_command_finds_every_family(tmp_path, monkeypatch):
    expected = []
    for family in FAMILIES:
        _, model = tiny_pair(family, pruner_ratio=0.3)
        model.save_pretrained(tmp_path / family)
        expected.append(f"{type(model).__name__} MULTIMODAL 0.3")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    command = [sys.executable, "-c", SERVE, *(str(tmp_path / family) for family in FAMILIES)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split("\n")[:-1] == expected
