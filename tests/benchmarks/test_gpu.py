"""`make gpu-proof` and `make gpu-speed`, on the CPU with tiny shapes: parts that fail do not stop the others."""

import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

import gpu
import gpu_results
import render_gpu
import speed
import speed_sweep

ROOT = Path(__file__).resolve().parents[2]
ABOUT = {
    "device": "Some GPU",
    "device_type": "cuda",
    "versions": {"learnpruner": "0", "transformers": "1", "torch": "2", "python": "3"},
    "code_sha256": "c" * 64,
}


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Parts that are scripts of the test: name -> source. The device is looked at by none."""
    monkeypatch.setattr(gpu, "look", lambda *_: ABOUT)

    def use(limit=60, **sources):
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
        output = tmp_path / "gpu"
        parts = [
            gpu.Part(name, limit, (str(tmp_path / f"{name}.py"),), output / "proof" / f"{name}.json")
            for name in sources
        ]
        monkeypatch.setattr(gpu, "proof_parts", lambda *_: parts)
        return output

    return use


def run(output, *arguments, limit="200"):
    return gpu.main(["proof", "--device", "cpu", "--output", str(output), "--limit", limit, *arguments])


def records(output):
    return {path.stem: json.loads(path.read_text()) for path in (output / "proof").glob("*.json")}


WRITE = 'import sys, pathlib; pathlib.Path(sys.argv[2]).write_text(\'{"checks": {"one": 1}}\')\n'


def test_parts_that_fail_do_not_stop_the_others(scripts, capsys):
    output = scripts(
        broken="import sys\nprint('the reason', file=sys.stderr)\nraise SystemExit(3)",
        crashed=f"{WRITE}import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
        good=WRITE,
    )
    assert run(output) == 1
    found = records(output)
    assert {name: record["outcome"] for name, record in found.items()} == {
        "broken": "failed",
        "crashed": "failed",
        "good": "passed",
    }
    assert found["broken"]["stderr"] == ["the reason"]
    assert found["crashed"]["stderr"][-1] == "ended by signal 11"
    # What was written before the crash is kept.
    assert found["crashed"]["checks"] == found["good"]["checks"] == {"one": 1}
    assert "checks" not in found["broken"]
    for record in found.values():
        assert ABOUT.items() <= record.items()
        assert 0 < record["seconds"] < record["limit_seconds"] == 60
    assert "1 of 3 parts passed" in capsys.readouterr().out
    with tarfile.open(f"{output}.tar.gz") as packed:
        assert set(packed.getnames()) == {f"proof/{name}.json" for name in found}
        # It may be published.
        assert {(member.uname, member.uid) for member in packed} == {("", 0)}


def test_a_part_ends_at_its_limit_and_with_all_that_it_started(scripts, tmp_path):
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(6); pathlib.Path({str(mark)!r}).touch()"
    output = scripts(
        limit=16,
        slow=f"{WRITE}import subprocess, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)",
        next=WRITE,
    )
    gpu_run, seconds = gpu.run, []

    def short(command, limit, environment):
        seconds.append(limit)
        return gpu_run(command, limit - 13, environment)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "run", short)
        assert run(output) == 1
    found = records(output)
    assert found["slow"]["outcome"] == "out of time"
    assert found["slow"]["checks"] == {"one": 1}
    assert found["next"]["outcome"] == "passed"
    assert seconds == [16, 16]
    time.sleep(6)
    assert not mark.exists()


def test_without_time_nothing_is_begun(scripts):
    output = scripts(first=WRITE, second=WRITE)
    assert run(output, limit="10") == 1
    found = records(output)
    assert {record["outcome"] for record in found.values()} == {"no time was left"}
    assert all("checks" not in record for record in found.values())


def test_a_run_replaces_the_records_of_the_one_before(scripts):
    output = scripts(first=WRITE)
    assert run(output) == 0
    output = scripts(first="raise SystemExit(1)")
    assert run(output) == 1
    assert "checks" not in records(output)["first"]


def test_wheels_come_first_on_the_path_and_are_not_installed(scripts, tmp_path):
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "brought-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought.py", "ANSWER = 42\n")
        wheel.writestr("brought-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
        wheel.writestr("brought-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("brought-1.0.dist-info/RECORD", "")
    output = scripts(uses="import brought\nassert brought.ANSWER == 42")
    assert run(output, "--wheels", str(folder)) == 0
    assert run(output, "--wheels", str(tmp_path / "none")) == 1
    (folder / "broken-1.0-py3-none-any.whl").write_text("no wheel")
    assert run(output, "--wheels", str(folder)) == 2


def test_without_a_gpu_the_reason_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.main(["proof", "--output", str(tmp_path / "gpu"), "--limit", "300"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "finds no GPU. DEVICE=cpu runs everything through" in line
    assert not (tmp_path / "gpu").exists()


@pytest.mark.parametrize("part", gpu.speed_parts("cuda", Path(), "sdpa"), ids=lambda part: part.name)
def test_the_parts_of_speed_are_commands_that_it_takes(part, monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(speed, "measure_all", lambda arguments: given.append(arguments) or [])
    monkeypatch.setattr(speed.torch, "set_num_threads", lambda _: None)
    assert part.command[0] == "speed.py"
    assert speed.main([*part.command[1:], "--output", str(tmp_path)]) == 0
    (arguments,) = given
    assert arguments.device.type == "cuda"
    # Enough rounds for an interval of 95 %, which the bars ask for.
    assert arguments.rounds >= 6


def test_the_bars_come_first():
    names = [part.command[2] for part in gpu.speed_parts("cuda", Path(), "sdpa")[:3]]
    assert names == ["llava-next-7b", "llava-1.5-7b", "qwen2.5-vl-7b-4k"]
    assert gpu.speed_parts("cpu", Path(), "sdpa")[0].command[2] == "cpu-small"


def test_packages_of_the_checkout_are_found_and_come_first(tmp_path):
    """From any place, with no installation, or with another."""
    other = tmp_path / "learnpruner"
    other.mkdir()
    (other / "__init__.py").write_text("raise ImportError('the installed one')")
    script = tmp_path / "scripts" / "where.py"
    script.parent.mkdir()
    (script.parent / "beside.py").write_text("NAME = 'beside'")
    script.write_text(
        "import sys, beside, learnpruner_commands, learnpruner.families\n"
        "print(learnpruner.__file__, learnpruner_commands.__file__, *sys.argv[1:])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    checkout = ROOT / "benchmarks" / "checkout.py"
    done = subprocess.run(
        [sys.executable, checkout, script, "a", "--b"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = ROOT / "modeling" / "__init__.py", ROOT / "commands" / "__init__.py"
    assert done.stdout.split() == [*map(str, found), "a", "--b"]


def test_what_only_training_and_accuracy_need_is_not_needed(tmp_path):
    """A machine with a GPU and torch seldom has them."""
    script = tmp_path / "needs.py"
    script.write_text(
        "import sys\n"
        "for name in ('datasets', 'evaluate', 'matplotlib', 'torchvision', 'bitsandbytes', 'gradio', 'tensorboard'):\n"
        "    sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(gpu.HERE)!r})\n"
        "import gpu_proof, speed\n"
    )
    command = [sys.executable, gpu.HERE / "checkout.py", script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_make_gpu_proof_runs_through_on_the_cpu(tmp_path, capsys):
    command = ["make", "gpu-proof", f"PY={sys.executable}", "DEVICE=cpu", f"GPU={tmp_path / 'gpu'}", "LIMIT=900"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = records(tmp_path / "gpu")
    assert set(found) == {part.name for part in gpu.proof_parts("cpu", Path())}, done.stderr
    for record in found.values():
        assert record["outcome"] in ("passed", "failed"), record
        assert record["checks"]
        assert record["device_type"] == "cpu"
        assert record["versions"]["torch"] == speed_sweep.torch.__version__
        assert not [name for name, check in record["checks"].items() if check["result"] == "fails"]
    assert (done.returncode == 0) == all(record["outcome"] == "passed" for record in found.values())
    # On a CPU it is no record.
    arguments = ["--records", str(tmp_path / "records"), "--points", str(tmp_path / "points")]
    assert gpu_results.main([str(tmp_path / "gpu.tar.gz"), *arguments]) == 2
    assert "which is no GPU" in capsys.readouterr().err
    for name, record in found.items():
        gpu.write({**record, "device": "Some GPU", "device_type": "cuda"}, tmp_path / "gpu" / "proof" / f"{name}.json")
    gpu.pack(tmp_path / "gpu", tmp_path / "gpu.tar.gz")
    assert gpu_results.main([str(tmp_path / "gpu.tar.gz"), *arguments]) == 0
    assert len(render_gpu.read_folder(tmp_path / "records")["Some GPU"]) == len(found)
