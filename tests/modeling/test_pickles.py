"""Models and outputs through `torch.save`, pickle and `multiprocessing`: wherever the stock class goes through."""

import io
import multiprocessing
import pickle
import subprocess
import sys

import pytest
import torch
from processes import answer_of

from tiny_models import FAMILIES, QWEN, build_inputs, samples_of, tiny_pair


def through(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [through, lambda value: pickle.loads(pickle.dumps(value))], ids=["save", "pickle"])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model(family, called, copied):
    stock, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("padded", family))
    if called:
        stock(**inputs)
        pruned(**inputs)
    if called and family not in QWEN:
        # The first call leaves closures on the stock tower.
        for model in (stock, pruned):
            with pytest.raises(AttributeError, match="output_capturing_hook"):
                copied(model)
        return
    twin = copied(pruned)
    expected, found = pruned(**inputs), twin(**inputs)
    assert torch.equal(found.logits, expected.logits)
    assert all(torch.equal(*pair) for pair in zip(found.kept_mask, expected.kept_mask, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_schedules(family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("padded", family))
    for model in (pruned, pruned.model):
        outputs = model(**inputs)
        again, schedule = through((outputs, pruned.model.pruner_schedule()))
        assert type(again) is type(outputs)
        assert torch.equal(again[0], outputs[0])
        assert torch.equal(model(**inputs, schedule=schedule)[0], outputs[0])


@pytest.mark.parametrize(
    "family",
    ["qwen2_vl", *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES if family != "qwen2_vl")],
)
def test_a_spawned_process(family):
    stock, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("padded", family))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        if family in QWEN:
            expected, found = pruned(**inputs), pool.apply(answer_of, (pruned, dict(inputs)))
            assert type(found) is type(expected)
            assert (found.logits - expected.logits).abs().max() < 1e-5
            return
        # A LLaVA that was not constructed in its process finds no hidden states of its tower, stock as ours.
        for model in (stock, pruned):
            with pytest.raises(TypeError):
                pool.apply(answer_of, (model, dict(inputs)))


BUNDLE = """
import io, sys, torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
inputs = torch.load(sys.argv[2])
buffer = io.BytesIO()
torch.save(model, buffer)
buffer.seek(0)
again = torch.load(buffer, weights_only=False)
with torch.no_grad():
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
assert type(again).__module__.startswith("transformers_modules.")
assert "learnpruner" not in sys.modules
"""


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_vl", marks=pytest.mark.slow)])
def test_code_of_a_checkpoint_without_the_package(family, tmp_path, monkeypatch):
    _, pruned = tiny_pair(family)
    pruned.save_pretrained(tmp_path / "model")
    torch.save(dict(build_inputs(family, samples_of("padded", family))), tmp_path / "inputs.pt")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    command = [sys.executable, "-c", BUNDLE, str(tmp_path / "model"), str(tmp_path / "inputs.pt")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
