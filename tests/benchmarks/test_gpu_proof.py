"""The parts of the proof on a GPU, on the CPU with tiny shapes: they hold where pruning is right, and only there."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from learnpruner import LearnPrunerLlavaForConditionalGeneration, doctor_models
from learnpruner.doctor_models import CheckError, build_case
from learnpruner.families import model_class

import gpu
import gpu_log
import gpu_proof
import gpu_results
import gpu_training

FAMILIES = list(gpu_log.NAMES)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a part on one family; returns its exit status and the checks by name."""

    def call(part, family, device="cpu"):
        monkeypatch.setattr(gpu_log, "NAMES", {family: gpu_log.NAMES[family]})
        file = tmp_path / f"{part}.json"
        with torch.random.fork_rng():
            status = gpu_proof.main([part, "--device", device, "--output", str(file)])
        found = json.loads(file.read_text())
        assert {check["family"] for check in found["checks"].values()} == {family}
        # It fits the schema that an archive is checked by.
        about = gpu_proof.about(torch.device("cpu"))
        outcome = {"part": part, "outcome": "passed", "seconds": 1, "limit_seconds": 2, "command": part, "stderr": []}
        file.write_text(json.dumps({**outcome, **about, **found}))
        gpu_results.read_part(file)
        return status, {check["name"]: check for check in found["checks"].values()}, found

    return call


def results(checks):
    return {name: check["result"] for name, check in checks.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_equality(family, run):
    status, checks, _ = run("equality", family)
    assert status == 0
    assert set(results(checks).values()) == {"holds"}
    masked = {f"{name}, {dtype}" for name in gpu_proof.ANY_PRECISION for dtype in ("float32", "bfloat16")}
    assert set(checks) == masked | {"masked answer, float32", "batch and rows, float32"}
    assert all(check["detail"] for check in checks.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_layer_fails_in_each_precision(dtype, run, monkeypatch, capsys):
    build_pair = doctor_models.build_pair

    def broken(*arguments):
        stock, pruned = build_pair(*arguments)
        layers = pruned.model.language_model.layers
        layers[1].load_state_dict(layers[2].state_dict())
        return stock, pruned

    monkeypatch.setattr(doctor_models, "build_pair", broken)
    status, checks, _ = run("equality", "llava")
    assert status == 1
    assert {checks[f"{name}, {dtype}"]["result"] for name in gpu_proof.ANY_PRECISION} == {"fails"}
    assert "checks fail: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", gpu_training.CHECKPOINTING)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step(family, kind, dtype, run, monkeypatch):
    # Without is what the others are compared with.
    chosen = {name: gpu_training.CHECKPOINTING[name] for name in ("no checkpointing", kind)}
    monkeypatch.setattr(gpu_training, "CHECKPOINTING", chosen)
    _, checks, _ = run(f"training-{dtype}", family)
    assert results(checks) == {f"training, {name}, {dtype}": "holds" for name in chosen}


def test_a_pruner_without_a_gradient_fails(run, monkeypatch):
    loss = torch.ones(1, requires_grad=True)
    monkeypatch.setattr(
        LearnPrunerLlavaForConditionalGeneration, "forward", lambda self, **_: SimpleNamespace(loss=loss.sum())
    )
    status, checks, _ = run("training-float32", "llava")
    assert status == 1
    assert set(results(checks).values()) == {"fails"}
    assert "No gradient reached ['model.pruner." in checks["training, no checkpointing, float32"]["detail"]


def test_gradients_are_compared():
    exact = torch.tensor([3.0, 4.0])
    assert "of 1e-04 that may be" in gpu_training.compare_gradients(exact * 1.00005, exact, torch.tensor(0.0))
    with pytest.raises(CheckError, match=r"2\.0e-04 from float32's, more than 1e-04"):
        gpu_training.compare_gradients(exact * 1.0002, exact, torch.tensor(0.0))
    # In a lower precision, twice its own rounding.
    gpu_training.compare_gradients(exact * 1.019, exact, torch.tensor(0.01))
    for wrong in (exact * 1.021, exact * torch.nan):
        with pytest.raises(CheckError):
            gpu_training.compare_gradients(wrong, exact, torch.tensor(0.01))


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels(family, run):
    status, checks, _ = run("kernels", family)
    assert status == 0
    assert results(checks) == {"training, flash_attention of sdpa, bfloat16": "holds"}


def test_backends(run):
    status, checks, _ = run("backends", "llava")
    assert status == 0
    found = results(checks)
    # What is not there is said to be not there, whatever is installed here.
    assert found.pop("ratio 1 and masked, flash_attention_2, bfloat16") == "not there"
    assert found.pop("ratio 1 and masked, flex_attention, float32") == "not there"
    assert found == {
        "ratio 1 and masked, the flash kernel of sdpa, bfloat16": "holds",
        "ratio 1 and masked, eager, float32": "holds",
    }


def test_a_step_is_measured(run):
    _, checks, found = run("step", "llava")
    step = found["steps"]["no checkpointing"]
    assert (step["preset"], step["batch_size"], step["dtype"]) == ("tiny", 1, "bfloat16")
    assert step["image_tokens"] == (doctor_models.SIDE // doctor_models.PATCH) ** 2
    assert 0 < step["seconds"]["low"] <= step["seconds"]["median"] <= step["seconds"]["high"]
    assert step["seconds"]["confidence"] >= 0.95
    assert step["weights_bytes"] > 0
    assert found["steps"]["non-reentrant checkpointing"]["batch_size"] == 4
    assert checks["a step of tiny, batch 1, no checkpointing"]["result"] == "holds"


def test_waits_need_a_gpu(run):
    status, checks, _ = run("waits", "llava")
    assert status == 0
    assert set(results(checks).values()) == {"not there"}


@pytest.fixture
def waiting(monkeypatch):
    """A tiny case, and a function that makes a module of one of its models wait as CUDA would report it."""
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    case = build_case(model_class(gpu_log.NAMES["llava"]))

    def wait(module):
        module.register_forward_pre_hook(
            lambda *_: warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        )

    yield case, wait
    assert modes
    assert modes[-1] == "default"


def compare(case, more=0):
    with torch.no_grad():
        return gpu_proof.compare_waits(case, lambda model: model(**case.batch), more)


def test_waits_are_counted_against_stock(waiting):
    case, wait = waiting
    assert compare(case) == "stock waits 0 times, the pruned model 0 times"
    for model in (case.stock, case.pruned):
        wait(model.lm_head)
    assert "stock waits 1 times, the pruned model 1 times: test_gpu_proof.py:" in compare(case)
    wait(case.pruned.lm_head)
    with pytest.raises(CheckError, match=r"the pruned model 2 times, where 0 more are planned: test_gpu_proof\.py:"):
        compare(case)
    assert "2 times" in compare(case, more=1)


def test_a_wait_inside_the_layers_fails_whatever_stock_does(waiting):
    case, wait = waiting
    for model in (case.stock, case.pruned):
        wait(model.model.language_model.layers[2])
    with pytest.raises(CheckError, match="1 of them inside the decoder's layers"):
        compare(case, more=5)


def test_what_was_found_before_a_crash_is_kept(tmp_path):
    log = gpu_log.Log(tmp_path / "part.json")
    log.check("llava", "one", lambda: "fine")
    log.check("llava", "two", lambda: 1 / 0)
    found = json.loads((tmp_path / "part.json").read_text())["checks"]
    assert found["llava: one"]["result"] == "holds"
    assert found["llava: two"]["result"] == "fails"
    assert "ZeroDivisionError" in found["llava: two"]["detail"]


def test_a_model_that_cannot_be_built_is_a_check_that_fails(run, monkeypatch):
    monkeypatch.setitem(doctor_models.BUILDERS, "llava", lambda: 1 / 0)
    status, checks, _ = run("kernels", "llava")
    assert status == 1
    assert results(checks) == {"models are built, bfloat16": "fails"}


def test_the_runner_knows_all_parts():
    assert {part.name for part in gpu.proof_parts("cuda", gpu.HERE)} == set(gpu_proof.PARTS)
