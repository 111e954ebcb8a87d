"""Sweeps of the speed benchmark: what is measured before, what fails, what is stopped, and what is refused."""

import hashlib
import json
import sys
import weakref

import pytest
import torch

from learnpruner.hub_cards.records import code_digest, read_result

import speed_formulas
import speed_point
import speed_presets
import speed_sweep
from tiny_speed import TEXT, run, tiny_presets  # noqa: F401


def test_a_sweep_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    arguments = ["--batch", "1,2", "--ratio", "0.4,1", "--new-tokens", "1", "--rounds", "1"]
    arguments += ["--output", str(tmp_path / "sweep")]
    assert run(*arguments) == 0
    files = sorted((tmp_path / "sweep").iterdir())
    assert [file.name for file in files] == [
        f"llava-batch{batch}-text{TEXT}-new1-ratio{ratio}-sdpa.json" for batch in (1, 2) for ratio in ("0.4", "1")
    ]
    for file in files:
        found = read_result(file, speed=True)
        assert f"batch{found['settings']['batch_size']}-" in file.name
        assert f"ratio{found['ratio']:g}-" in file.name
    before = {file: file.stat().st_mtime_ns for file in files}
    files[1].unlink()
    assert run(*arguments) == 0
    assert [file for file in files if file.stat().st_mtime_ns != before[file]] == [files[1]]
    capsys.readouterr()
    monkeypatch.setattr(speed_sweep, "build_pair", lambda *args: pytest.fail("built a model"))
    assert run(*arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"output": str(file), "already_measured": True} for file in files]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("measured") / "result.json"
    assert run("--rounds", "1", "--new-tokens", "1", "--output", str(path)) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("ratio",), 0.4),
        (("device",), "Another CPU"),
        (("device_type",), "cuda"),
        (("code_sha256",), "c" * 64),
        *((("versions", name), "1.0.0") for name in ("torch", "transformers", "learnpruner", "python")),
        *((("settings", name), 3) for name in ("rounds", "warmup", "threads", "seed", "batch_size", "new_tokens")),
        (("settings", "dtype"), "bfloat16"),
    ],
)
def test_another_measurement_is_not_passed_off_as_this_one(place, value, measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed_sweep, "build_pair", lambda *args: pytest.fail("built a model"))
    other = json.loads(json.dumps(measured))
    inner = other[place[0]] if len(place) > 1 else other
    assert inner[place[-1]] != value
    inner[place[-1]] = value
    path = tmp_path / "result.json"
    path.write_text(json.dumps(other))
    assert run("--rounds", "1", "--new-tokens", "1", "--output", str(path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"with another {place[-1]}: remove the file" in line


def test_the_code_that_figures_depend_on(tmp_path):
    names = [file.name for file in speed_sweep.code_files()]
    harness = ["speed.py", *(f"speed_{part}.py" for part in ("formulas", "measure", "point", "presets", "sweep"))]
    assert {"rows_learnpruner.py", "modeling_learnpruner_llava.py", "scores_learnpruner.py", *harness} <= set(names)
    assert names == sorted(names)
    assert not any(name.startswith(("test", "render")) for name in names)
    (tmp_path / "a.py").write_text("1")
    files = [tmp_path / "a.py"]
    first = code_digest(files)
    assert first == hashlib.sha256(b"a.py\x001\x00").hexdigest()
    files[0].write_text("2")
    changed = code_digest(files)
    renamed = code_digest([files[0].rename(tmp_path / "b.py")])
    assert len({first, changed, renamed}) == 3


@pytest.mark.parametrize("place", ["build_inputs", "generation_times"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory\nmuch advice"),
        RuntimeError(f"DefaultCPUAllocator: can't allocate memory {'x' * 400}"),
        ImportError("no kernel\nadvice"),
        ValueError("no such shape\nadvice"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_point_that_fails_leaves_the_others(place, error, tmp_path, monkeypatch, capsys):
    build, held = speed_point.build_inputs, []

    def building(config, image, batch, *rest):
        # What earlier points were given is released, that of the one that failed, too.
        assert [inputs for inputs in held if inputs() is not None] == []
        inputs = build(config, image, batch, *rest)
        held.append(weakref.ref(inputs["pixel_values"]))
        return inputs

    def failing(*args, **kwargs):
        # Inputs are built from the batch size, answers are made of inputs.
        if (args[2] if place == "build_inputs" else len(args[1]["input_ids"])) == 2:
            raise type(error)(*error.args)  # one that nobody else holds, with the frames it came through
        return inner(*args, **kwargs)

    monkeypatch.setattr(speed_point, "build_inputs", building)
    inner = getattr(speed_point, place)
    monkeypatch.setattr(speed_point, place, failing)
    assert run("--batch", "1,2,3", "--new-tokens", "1", "--rounds", "1", "--output", str(tmp_path)) == 2
    assert [file.name.split("-")[1] for file in sorted(tmp_path.iterdir())] == ["batch1", "batch3"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("speed: not measured")]
    _, _, message = line.partition(".json: ")
    assert "-batch2-" in line
    assert message == str(error).splitlines()[0][:300]


def test_a_sweep_that_is_stopped_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    measure = speed_sweep.measure

    def stopped(stock, pruned, point, *rest):
        if point.batch_size == 2:
            raise KeyboardInterrupt
        return measure(stock, pruned, point, *rest)

    monkeypatch.setattr(speed_sweep, "measure", stopped)
    assert run("--batch", "1,2", "--new-tokens", "1", "--rounds", "1", "--output", str(tmp_path)) == 130
    assert [file.name.split("-")[1] for file in tmp_path.iterdir()] == ["batch1"]
    assert "same command goes on" in capsys.readouterr().err.splitlines()[-1]


def test_conditions(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(speed_sweep.os, "cpu_count", lambda: 4)
    loads = iter([1.9, 3.2, 0.0])
    monkeypatch.setattr(speed_sweep.os, "getloadavg", lambda: (next(loads), 0, 0))
    arguments = ("--new-tokens", "1", "--rounds", "1", "--output")
    assert run("--batch", "1,2", *arguments, str(tmp_path / "sweep")) == 0
    first, second = (json.loads(file.read_text())["conditions"] for file in sorted((tmp_path / "sweep").iterdir()))
    assert first == {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": None, "load_average": 1.9}
    # By then it is the benchmark's own, and no warning.
    assert second["load_average"] == 3.2
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr(speed_sweep.os, "getloadavg", lambda: (2.1, 0, 0))
    assert run(*arguments, str(tmp_path / "result.json")) == 0
    assert "load average is 2.10 on 4 cores" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is a place where not even root writes")
def test_a_place_that_cannot_be_written_to(monkeypatch, capsys):
    monkeypatch.setattr(speed_sweep, "build_pair", lambda *args: pytest.fail("built a model"))
    assert run("--output", "/proc/self/result.json") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert "/proc/self" in line


def test_a_cache_that_is_not_the_formula_s(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed_formulas, "kv_bytes", lambda *args: 1)
    assert run("--output", str(tmp_path / "result.json")) == 2
    assert "bytes" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ratio", "0"), "ratio"),
        (("--ratio", "0.5,1.5"), "ratio"),
        (("--batch", "0"), "whole number"),
        (("--text", "four"), "whole number"),
        (("--new-tokens", "1,-1"), "whole number"),
        (("--rounds", "0"), "whole number"),
        (("--preset", "llava-1.5-70b"), "llava-1.5-7b"),
        (("--backend", "fast"), "sdpa, eager"),
        (("--backend", "flash_attention_2"), "float32"),
        (("--device", "cuda"), "GPU"),
        (("--device", "cuda:99"), "GPU"),
        (("--device", "abacus"), "cuda:N"),
        (("--device", "mps"), "cuda:N"),
        (("--dtype", "int8"), "float32"),
        (("--batch", "1,2"), "folder"),
    ],
)
def test_refusals_come_before_any_work(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(speed_sweep, "build_pair", lambda *args: pytest.fail("built a model"))
    try:
        status = run("--output", str(tmp_path / "result.json"), *arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed_presets.psutil, "virtual_memory", lambda: type("Free", (), {"available": 10**9}))
    monkeypatch.setattr(speed_sweep, "build_pair", lambda *args: pytest.fail("built a model"))
    assert run("--output", str(tmp_path / "result.json"), preset="llava-1.5-7b") == 2
    assert "28.3 GB" in capsys.readouterr().err


def test_output_must_not_be_a_folder(tmp_path, capsys):
    (tmp_path / "result.json").mkdir()
    assert run("--output", str(tmp_path / "result.json")) == 2
    assert "folder" in capsys.readouterr().err
