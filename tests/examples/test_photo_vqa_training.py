# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Training of the photo model on tiny random weights, and the checkpoint that is built of it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.compare import build_prompt

import build
import train_base
from packages import Packages
from tiny_photo import photo, start_run, tiny_text, tiny_tower, write_features


@pytest.fixture(autouse=True)
def _short_lookup(monkeypatch):
    monkeypatch.setattr(train_base, "LOOKUP_EPOCHS", 1)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, features, renamed, monkeypatch):
    whole = start_run(tmp_path, features, renamed, "whole")
    whole.train_on()
    first = start_run(tmp_path, features, renamed)
    step = first.step
    monkeypatch.setattr(first, "step", lambda: (step(), first.stop())[0])
    first.train_on()
    assert first.sequence == 4
    again = start_run(tmp_path, features, renamed)
    assert again.sequence == 4
    again.train_on()
    for name, weight in whole.trained().items():
        assert torch.equal(weight, again.trained()[name]), name
    moved = torch.load(tmp_path / "whole/run.pt", weights_only=True)["trained"]
    assert all(moved[name].abs().max() > 0 for name in moved if name.endswith(".up"))
    log = json.loads((tmp_path / "run/photo-llava.json").read_text())
    assert log["done"] == 8
    assert [entry["sequence"] for entry in log["log"] if "loss" in entry] == [4, 8]
    assert [sorted(entry) for entry in log["log"] if "said" in entry] == 2 * [
        ["among_choices", "minutes", "said", "sequence"]
    ]


def test_two_sequences_at_a_time_change_nothing(tmp_path, features, renamed):
    alone, beside = (start_run(tmp_path, features, renamed, str(threads), threads=threads) for threads in (1, 2))
    alone.train_on()
    beside.train_on()
    for name, weight in alone.trained().items():
        assert torch.equal(weight, beside.trained()[name]), name
    assert alone.validate() == beside.validate()


def test_a_finished_run_trains_nothing(tmp_path, features, renamed):
    start_run(tmp_path, features, renamed, sequences=2).train_on()
    before = (tmp_path / "run/run.pt").stat().st_mtime_ns
    again = start_run(tmp_path, features, renamed, sequences=2)
    again.train_on()
    assert (tmp_path / "run/run.pt").stat().st_mtime_ns == before


def test_added_scenes_take_part_from_the_next_pass(tmp_path, features, renamed):
    run = start_run(tmp_path, features, renamed)
    run.step()
    write_features(features / "train", range(9))
    run.step()
    assert run.passes == [[0, 6], [6, 9]]
    assert sorted(run.order) == list(range(9))


def test_time_is_kept(tmp_path, features, renamed):
    run = start_run(tmp_path, features, renamed)
    run.train_on(max_minutes=0)
    assert run.sequence == 4


@pytest.mark.parametrize(("change", "message"), [({"seed": 1}, "is of a run with"), ({"sequences": 5}, "is of a run")])
def test_a_folder_keeps_its_run(tmp_path, features, renamed, change, message):
    start_run(tmp_path, features, renamed).save()
    with pytest.raises(ValueError, match=message):
        start_run(tmp_path, features, renamed, **change)


def test_a_damaged_checkpoint_is_named(tmp_path, features, renamed):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.pt").write_bytes(b"half of")
    with pytest.raises(ValueError, match="is damaged"):
        start_run(tmp_path, features, renamed)


def test_the_rate_rises_and_falls():
    rates = [train_base.rate_at(sequence, 4000) for sequence in range(0, 4000, 4)]
    top = rates.index(max(rates))
    assert 4 * top < 2 * train_base.WARM_UP
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(train_base.LAST_RATE, rel=0.01)


@pytest.fixture
def built(tmp_path, features, renamed, monkeypatch):
    """A folder that build.py writes from what a short training left behind."""
    files = {}
    for name in ("tower", "text"):
        files[name] = tmp_path / name
        files[name].write_text(name)
    found = Packages(tmp_path, tmp_path, tmp_path, tmp_path, **files)
    monkeypatch.setattr(build, "find", lambda folder: found)
    monkeypatch.setattr(build, "load_text_model", lambda gguf, cache: (tiny_text(renamed, bfloat16=True), renamed))
    monkeypatch.setattr(build, "load_tower", lambda path: tiny_tower())
    run = start_run(tmp_path, features, renamed, sequences=4)
    run.about = {"made_of": {name: build.digest(path) for name, path in files.items()}}
    run.train_on()
    arguments = ["--trained", str(tmp_path / "run"), "--output", str(tmp_path / "photo-llava")]
    assert build.main(arguments) == 0
    return tmp_path / "photo-llava", run, files, arguments


def test_the_built_checkpoint_opens(built):
    folder, run, _, _ = built
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {torch.float32}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.config.vision_feature_layer == -4
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id != processor.tokenizer.eos_token_id
    saved = load_file(run.folder / "photo-llava.safetensors")
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight, saved["projector.linear_1.weight"].float())
    inputs = processor(images=photo(), text=build_prompt(processor, "Is there a cow?"), return_tensors="pt")
    pruned = LearnPrunerForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(pruned(**inputs, pruner_ratio=1.0).logits, model(**inputs).logits)


def test_other_weights_are_refused(built, capsys):
    _, _, files, arguments = built
    files["text"].write_text("another release")
    build.digest.cache_clear()
    assert build.main(arguments) == 2
    assert "another release than the one" in capsys.readouterr().err
