"""An archive of a GPU's records is checked, put in its place, and shown; without one the pages say so."""

import io
import json
import re
import tarfile
from pathlib import Path

import pytest

import learnpruner

import gpu
import gpu_results
import render_gpu
import render_speed

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
VERSIONS = {"learnpruner": learnpruner.__version__, "transformers": "5.24.0", "torch": "2.11.0", "python": "3.12.3"}
ABOUT = {
    "device": "NVIDIA H100 80GB HBM3",
    "device_type": "cuda",
    "versions": {**VERSIONS, "cuda": "13.0"},
    "code_sha256": "c" * 64,
}


def part(name, checks=(), outcome="passed", **fields):
    return {
        "part": name,
        "outcome": outcome,
        "seconds": 12.3,
        "limit_seconds": 60,
        "command": f"gpu_proof.py {name} --device cuda",
        "stderr": [] if outcome == "passed" else ["Traceback", f"the <last> | words of {name}"],
        **ABOUT,
        **({"checks": {f"{family}: {check}": found for (family, check), found in checks}} if checks else {}),
        **fields,
    }


def check(family, name, result="holds", detail="difference 1e-05"):
    found = {"family": family, "name": name, "result": result, "detail": detail, "seconds": 0.5}
    return (family, name), found


STEP = {
    "preset": "llava-1.5-7b",
    "batch_size": 4,
    "checkpointing": "non-reentrant checkpointing",
    "ratio": 1 / 9,
    "image_tokens": 576,
    "text_tokens": 324,
    "answer_tokens": 60,
    "dtype": "bfloat16",
    "rounds": 6,
    "seconds": {"median": 1.234, "low": 1.2, "high": 1.3, "confidence": 0.9688},
    "weights_bytes": 14_100_000_000,
    "peak_memory_bytes": 21_500_000_000,
}
EQUALITY = part(
    "equality",
    [
        check("llava", "ratio 1, float32"),
        check("qwen2_vl", "ratio 1, float32", "fails", "Logits | are\nnot those of the <stock> class."),
        check("llava", "ratio 1, bfloat16", "not there", "flash is not installed"),
        check("llava_next", "ratio 1, bfloat16", "not there", "flash is not installed"),
    ],
    outcome="failed",
)
POINT = json.loads(min((RESULTS / "speed" / "cpu").glob("*batch4*.json")).read_text())
POINT |= {**ABOUT, "settings": {**POINT["settings"], "preset": "llava-1.5-7b", "dtype": "bfloat16"}}
RECORDS = {
    "proof/equality.json": EQUALITY,
    "proof/step.json": part("step", [check("llava", "a step")], steps={"non-reentrant checkpointing": STEP}),
    "speed/llava-1.5-7b.json": part("llava-1.5-7b"),
    "speed/growth.json": part("growth", outcome="no time was left"),
    "points/llava-1.5-7b-batch4.json": POINT,
}


def changed(name, *place, value=None):
    """The records with another value at one place, or without it."""
    records = json.loads(json.dumps(RECORDS))  # a deep copy would share what they share
    inner = records[name]
    for key in place[:-1]:
        inner = inner[key]
    if value is None:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return records


@pytest.fixture
def archive(tmp_path):
    """Packs records as the runner does."""

    def pack(records):
        output = tmp_path / "made"
        for name, record in records.items():
            file = output / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(record))
        gpu.pack(output, tmp_path / "gpu.tar.gz")
        return tmp_path / "gpu.tar.gz"

    return pack


@pytest.fixture
def put(tmp_path):
    def call(archive):
        folders = ["--records", str(tmp_path / "gpu"), "--points", str(tmp_path / "speed" / "gpu")]
        return gpu_results.main([str(archive), *folders])

    return call


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.json")}


def test_records_are_put_in_their_place(archive, put, tmp_path):
    assert put(archive(RECORDS)) == 0
    device = "nvidia-h100-80gb-hbm3"
    assert files(tmp_path / "gpu") == {f"{device}/{name}" for name in RECORDS if not name.startswith("points/")}
    assert files(tmp_path / "speed" / "gpu") == {f"{device}/llava-1.5-7b-batch4.json"}
    assert json.loads((tmp_path / "gpu" / device / "proof" / "equality.json").read_text()) == EQUALITY


def test_a_newer_proof_replaces_the_older_one_and_no_figures(archive, put, tmp_path):
    assert put(archive(RECORDS)) == 0
    (tmp_path / "gpu" / "other" / "proof").mkdir(parents=True)
    other = tmp_path / "gpu" / "other" / "proof" / "equality.json"
    other.write_text("{}")
    newer = tmp_path / "newer"
    (newer / "proof").mkdir(parents=True)
    (newer / "proof" / "waits.json").write_text(json.dumps(part("waits", [check("llava", "host waits")])))
    gpu.pack(newer, tmp_path / "newer.tar.gz")
    assert put(tmp_path / "newer.tar.gz") == 0
    device = tmp_path / "gpu" / "nvidia-h100-80gb-hbm3"
    assert files(device) == {"proof/waits.json", "speed/llava-1.5-7b.json", "speed/growth.json"}
    assert files(tmp_path / "speed" / "gpu")
    assert other.exists()


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ({}, "The archive is empty"),
        (
            changed("proof/equality.json", "device_type", value="cpu"),
            "proof/equality.json was run on .*, which is no GPU",
        ),
        (changed("proof/equality.json", "device", value="Another GPU"), "are not of the same device"),
        (changed("proof/equality.json", "versions", "torch", value="2.10.0"), "are not of the same torch"),
        (changed("proof/equality.json", "code_sha256", value="d" * 64), "in proof/ are of several states of the code"),
        (changed("proof/equality.json", "code_sha256"), "proof/equality.json is not a record .*'code_sha256'"),
        (changed("proof/equality.json", "versions", "torch"), "versions lacks .*'torch'"),
        (
            changed("proof/equality.json", "outcome", value="perfect"),
            "outcome is 'perfect', and should be one of passed",
        ),
        (changed("proof/equality.json", "seconds", value=-1), "seconds is -1"),
        (changed("proof/equality.json", "stderr", value="text"), "stderr is 'text'"),
        (changed("proof/equality.json", "checks", value={}), "checks is {}"),
        (changed("proof/equality.json", "checks", "llava: ratio 1, float32", "result", value="yes"), "result is 'yes'"),
        (changed("proof/equality.json", "checks", "llava: ratio 1, float32", "family", value="a|b"), "family is 'a|b'"),
        (changed("proof/step.json", "steps", "non-reentrant checkpointing", "batch_size", value=0), "batch_size is 0"),
        (changed("proof/step.json", "steps", "non-reentrant checkpointing", "seconds", "median"), "seconds lacks"),
        (changed("points/llava-1.5-7b-batch4.json", "prefill_speedup", value="fast"), "prefill_speedup is 'fast'"),
        ({**RECORDS, "proof/list.json": []}, "proof/list.json is not a record"),
        ({**RECORDS, "other/equality.json": EQUALITY}, "holds 'other/equality.json', which is no record"),
        ({**RECORDS, "proof/deep/equality.json": EQUALITY}, "holds 'proof/deep/equality.json'"),
        ({**RECORDS, "proof/a b.json": EQUALITY}, "holds 'proof/a b.json'"),
    ],
)
def test_what_is_no_record_is_refused_and_nothing_is_written(records, reason, archive, put, tmp_path, capsys):
    assert put(archive(records)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(reason, line), line
    assert not (tmp_path / "gpu").exists()
    assert not (tmp_path / "speed").exists()


def test_another_release_is_refused(archive, put, monkeypatch, capsys):
    monkeypatch.setattr(learnpruner, "__version__", "9.9.9")
    assert put(archive(RECORDS)) == 2
    assert f"of learnpruner {VERSIONS['learnpruner']}, and this is 9.9.9" in capsys.readouterr().err


def tar(path, *members):
    with tarfile.open(path, "w:gz") as packed:
        for member, content in members:
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    return path


def link(name, target, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


EQUALITY_TEXT = json.dumps(EQUALITY).encode()


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([(tarfile.TarInfo("../proof/equality.json"), EQUALITY_TEXT)], "'../proof/equality.json', which is no record"),
        ([(tarfile.TarInfo("/proof/equality.json"), EQUALITY_TEXT)], "'/proof/equality.json'"),
        ([(tarfile.TarInfo("proof/../../equality.json"), EQUALITY_TEXT)], "equality.json', which is no record"),
        ([(tarfile.TarInfo("proof/run.py"), b"1")], "'proof/run.py', which is no record"),
        ([link("proof/equality.json", "/etc/passwd", tarfile.SYMTYPE)], "'proof/equality.json', which is no record"),
        ([link("proof/equality.json", "/etc/passwd", tarfile.LNKTYPE)], "'proof/equality.json', which is no record"),
        ([link("proof", "", tarfile.DIRTYPE)], "'proof', which is no record"),
        ([(tarfile.TarInfo("proof/equality.json"), EQUALITY_TEXT)] * 2, "holds proof/equality.json twice"),
        ([(tarfile.TarInfo("proof/equality.json"), b" " * (2**20 + 1))], "of more than 1048576 bytes"),
        ([(tarfile.TarInfo(f"proof/{number}.json"), b"{}") for number in range(501)], "more than 500 files"),
        ([(tarfile.TarInfo("proof/equality.json"), b"{")], "proof/equality.json is not a record"),
        ([(tarfile.TarInfo("proof/equality.json"), b"\xff")], "proof/equality.json is not a record"),
    ],
)
def test_archives_of_strangers(members, reason, put, tmp_path, capsys):
    assert put(tar(tmp_path / "bad.tar.gz", *members)) == 2
    assert reason in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"bad.tar.gz"}


@pytest.mark.parametrize("content", [b"", b"no archive", EQUALITY_TEXT])
def test_files_that_are_no_archives(content, put, tmp_path, capsys):
    (tmp_path / "bad.tar.gz").write_bytes(content)
    assert put(tmp_path / "bad.tar.gz") == 2
    assert "bad.tar.gz is no archive of benchmarks/gpu.py" in capsys.readouterr().err
    assert put(tmp_path / "none.tar.gz") == 2


PAGE = "\n".join(f"<!-- {mark} -->\nold\n<!-- /{mark} -->" for mark in ("checks", "steps", "parts"))
README = "<!-- gpu -->\nold\n<!-- /gpu -->"


def render(folder, tmp_path):
    page, readme = tmp_path / "GPU.md", tmp_path / "README.md"
    page.write_text(PAGE)
    readme.write_text(README)
    assert render_gpu.main([str(folder), "--into", str(page), "--readme", str(readme)]) == 0
    return page.read_text(), readme.read_text()


def test_without_a_record_the_pages_say_not_measured(tmp_path):
    page, readme = render(tmp_path / "gpu", tmp_path)
    assert page == PAGE.replace("old", "not measured")
    assert "On a GPU: not measured" in readme


def test_with_a_record_the_pages_show_it(archive, put, tmp_path):
    assert put(archive(RECORDS)) == 0
    page, readme = render(tmp_path / "gpu", tmp_path)
    assert "\nold\n" not in page
    assert "not measured" not in page
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    assert ["check", "llava", "llava_next", "qwen2_vl", "qwen2_5_vl"] in rows
    assert ["ratio 1, float32", "holds", "", "**fails**", ""] in rows
    assert ["ratio 1, bfloat16", "not there", "not there", "", ""] in rows
    assert "- **fails**: ratio 1, float32, qwen2_vl: Logits &#124; are not those of the &lt;stock> class." in page
    # Once, where it is the same of several families.
    assert "- not there: ratio 1, bfloat16, llava, llava_next: flash is not installed" in page
    assert "NVIDIA H100 80GB HBM3: learnpruner" in page
    assert f"code {'c' * 8}" in page
    step = [
        "llava-1.5-7b, bfloat16",
        "4 x (576 + 324)",
        "non-reentrant checkpointing",
        "1.234 (1.200-1.300)",
        "14.1",
        "21.5",
    ]
    assert ["NVIDIA H100 80GB HBM3", *step] in rows
    parts = [row[1:] for row in rows if len(row) == 6]
    # In the order in which they are run, not of their names.
    assert parts[1:] == [
        ["proof", "equality", "failed", "12 of 60", "the &lt;last> &#124; words of equality"],
        ["proof", "step", "passed", "12 of 60", ""],
        ["speed", "llava-1.5-7b", "passed", "12 of 60", ""],
        ["speed", "growth", "no time was left", "12 of 60", "the &lt;last> &#124; words of growth"],
    ]
    assert "On NVIDIA H100 80GB HBM3: 2 of 3 checks hold ([benchmarks/GPU.md]" in readme
    assert "speed in [benchmarks/SPEED.md]" in readme
    points = render_speed.read_folder(tmp_path / "speed")
    assert "| llava-1.5-7b | 4 |" in render_speed.speed_table(points)


def test_a_proof_alone_leaves_speed_not_measured(archive, put, tmp_path):
    assert put(archive({"proof/step.json": RECORDS["proof/step.json"]})) == 0
    _, readme = render(tmp_path / "gpu", tmp_path)
    assert "1 of 1 checks hold" in readme
    assert "speed not measured." in readme


def test_the_committed_pages_are_those_of_the_committed_records(tmp_path):
    pages = {"--into": ROOT / "benchmarks" / "GPU.md", "--readme": ROOT / "README.md"}
    arguments = []
    for option, path in pages.items():
        copied = tmp_path / path.name
        copied.write_text(path.read_text())
        arguments += [option, str(copied)]
    assert render_gpu.main([str(RESULTS / "gpu"), *arguments]) == 0
    for path in pages.values():
        assert (tmp_path / path.name).read_text() == path.read_text()


def test_a_broken_record_is_not_shown(tmp_path, capsys):
    (tmp_path / "some" / "proof").mkdir(parents=True)
    (tmp_path / "some" / "proof" / "equality.json").write_text("{}")
    assert render_gpu.main([str(tmp_path)]) == 2
    assert "equality.json is not a record of benchmarks/gpu.py" in capsys.readouterr().err
