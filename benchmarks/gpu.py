"""Proof and speed on a GPU, in parts: each a process of its own under a time limit, with a record of how it went.

    python benchmarks/gpu.py proof --device cuda --output runs/gpu --limit 300
    python benchmarks/gpu.py speed --device cuda --output runs/gpu --limit 540

Nothing is installed, and nothing is fetched: the package is found in this checkout, and wheels in the folder `--wheels`
come first on the path. A part that fails, or for which no time is left, does not stop the others. `--output` gets
`proof/` or `speed/` with a record of each part, and `points/` with the results of benchmarks/speed.py; everything in it
goes into one archive, which benchmarks/gpu_results.py takes.

On `--device cpu` all shapes are tiny: that proves these scripts, and is no record.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Seconds below which a part is not begun, since its imports alone take as long; and those that are kept for packing.
LEAST, END = 15, 3
# Of a part's stderr, in its record.
LINES, LONGEST = 20, 300
# Seconds for the first look at the device.
LOOK = 90
# No network, and on stderr nothing but what went wrong.
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
POINTS = "points"


@dataclass(frozen=True)
class Part:
    """A process.

    Attributes:
        name (`str`): Of its record.
        limit (`float`): Seconds.
        command (`tuple[str, ...]`): A script of this folder, and its arguments but `--output`.
        output (`Path`): Where it writes.
    """

    name: str
    limit: float
    command: tuple[str, ...]
    output: Path


def proof_parts(device: str, output: Path) -> list[Part]:
    """In the order of importance: what comes last may find no time."""
    limits = {
        "equality": 90,
        "training-float32": 60,
        "training-bfloat16": 60,
        "waits": 45,
        "step": 90,
        "kernels": 45,
        "backends": 100,
    }
    return [
        Part(name, limit, ("gpu_proof.py", name, "--device", device), output / "proof" / f"{name}.json")
        for name, limit in limits.items()
    ]


# What benchmarks/speed.py measures on a GPU of 80 GB, that of the bars first. On sdpa, the stock vision tower of
# Qwen2.5-VL makes one attention call for each window: there, flash_attention_2 is what to compare on.
SPEED = {
    "llava-next-7b": (120, "--preset llava-next-7b --batch 8 --ratio 160/2928 --new-tokens 2"),
    "llava-1.5-7b": (90, "--preset llava-1.5-7b --batch 8,32 --ratio 1/18 --new-tokens 2"),
    "qwen2.5-vl-7b-4k": (180, "--preset qwen2.5-vl-7b-4k --batch 8 --ratio 0.11 --new-tokens 2"),
    "growth": (70, "--preset llava-1.5-7b --batch 8 --ratio 1/18,1/9,2/9,1/3,2/3,1 --new-tokens 1"),
    "answers": (120, "--preset llava-1.5-7b --batch 1,8 --ratio 1/18 --new-tokens 32"),
    "batches": (500, "--preset llava-1.5-7b --batch 1,4,16 --ratio 1/18 --new-tokens 1,128"),
    "texts": (90, "--preset llava-1.5-7b --batch 8 --text 32,256 --ratio 1/18 --new-tokens 1"),
    "llava-next-7b-answers": (300, "--preset llava-next-7b --ratio 160/2928 --new-tokens 32,128"),
    "qwen2.5-vl-7b-4k-answers": (300, "--preset qwen2.5-vl-7b-4k --ratio 0.11 --new-tokens 32,128"),
    "llava-1.5-13b": (200, "--preset llava-1.5-13b --batch 1,8 --ratio 1/18 --new-tokens 1"),
    "qwen2.5-vl-7b-1k": (90, "--preset qwen2.5-vl-7b-1k --batch 1,8 --ratio 0.11 --new-tokens 1"),
    "qwen2.5-vl-7b-16k": (400, "--preset qwen2.5-vl-7b-16k --ratio 0.11 --new-tokens 1"),
}
# The smallest model of the speed benchmark, one round.
SPEED_ON_CPU = {"cpu-small": (300, "--preset cpu-small --text 1 --ratio 1/18 --new-tokens 1 --rounds 1")}


def speed_parts(device: str, output: Path, backend: str) -> list[Part]:
    """Those of [`SPEED`]: a run with a higher limit measures the later ones, and points that are there stay."""
    fixed = ["--device", device, "--backend", backend]
    if device == "cpu":
        chosen = SPEED_ON_CPU
    else:
        chosen, fixed = SPEED, [*fixed, "--warmup", "2", "--rounds", "6"]
    points = output / POINTS
    return [Part(name, limit, ("speed.py", *given.split(), *fixed), points) for name, (limit, given) in chosen.items()]


def start(command: tuple[str, ...], environment: dict[str, str], stderr) -> subprocess.Popen:
    script = str(HERE / command[0])
    return subprocess.Popen(
        [sys.executable, str(HERE / "checkout.py"), script, *command[1:]],
        env=environment,
        stderr=stderr,
        # Of its own group, which ends with it.
        start_new_session=True,
    )


def run(command: tuple[str, ...], limit: float, environment: dict[str, str]) -> tuple[int | None, float, list[str]]:
    """Exit status (`None`: out of time), seconds, and the last lines of stderr."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        process = start(command, environment, stderr)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        stderr.seek(0)
        lines = [line.rstrip()[-LONGEST:] for line in stderr.read().replace("\r", "\n").splitlines() if line.strip()]
    return status, time.monotonic() - began, lines[-LINES:]


def record_of(part: Part, file: Path, limit: float, about: dict, environment: dict[str, str]) -> dict:
    """Runs a part, and says how it went: what it wrote itself, and the outcome."""
    if limit < LEAST:
        status, seconds, lines, outcome = None, 0.0, [], "no time was left"
    else:
        status, seconds, lines = run((*part.command, "--output", str(part.output)), limit, environment)
        outcome = {None: "out of time", 0: "passed"}.get(status, "failed")
        if status is not None and status < 0:
            lines.append(f"ended by signal {-status}")
    found = json.loads(file.read_text()) if file.exists() else {}
    return {
        "part": part.name,
        "outcome": outcome,
        "seconds": round(seconds, 2),
        "limit_seconds": round(max(limit, 0), 1),
        "command": " ".join(part.command),
        "stderr": [] if outcome == "passed" else lines,
        **about,
        **found,
    }


def write(record: dict, file: Path) -> None:
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(file)


def nameless(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without the user whose file it is."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def pack(output: Path, archive: Path) -> None:
    """Every record and result, under the names that they have below `output`."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_name(f"{archive.name}.part")
    with tarfile.open(part, "w:gz") as packed:
        for file in sorted(output.rglob("*.json")):
            packed.add(file, file.relative_to(output).as_posix(), recursive=False, filter=nameless)
    part.replace(archive)


def install(wheels: Path, site: str) -> None:
    """Unpacks the wheels of a folder, and nothing else. Raises `ValueError` where pip does not."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    done = subprocess.run([*pip, "--target", site, *files], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"pip does not install the wheels of {wheels}: {done.stderr.strip()[-LONGEST:]}")


def look(device: str, folder: Path, environment: dict[str, str]) -> dict:
    """Device, versions and digest of the code. Raises `ValueError` where nothing can be run here."""
    file = folder / "about.json"
    status, _, lines = run(("gpu_proof.py", "about", "--device", device, "--output", str(file)), LOOK, environment)
    if status != 0:
        raise ValueError(lines[-1] if lines else f"nothing can be run on {device} here")
    return json.loads(file.read_text())


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("proof", "speed"))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu, there with tiny shapes")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the records; figures of speed that are there stay"
    )
    parser.add_argument("--archive", type=Path, help="default: --output with .tar.gz behind it")
    parser.add_argument("--wheels", type=Path, default=Path("wheels"), help="folder of wheels that come first")
    parser.add_argument("--limit", type=float, required=True, help="seconds for everything")
    parser.add_argument("--backend", default="sdpa", help="of attention, for speed")
    arguments = parser.parse_args(argv)
    what, device, output = arguments.what, arguments.device, arguments.output.resolve()
    archive = arguments.archive or output.with_name(f"{output.name}.tar.gz")
    parts = proof_parts(device, output) if what == "proof" else speed_parts(device, output, arguments.backend)
    failed = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            install(arguments.wheels, folder)
            path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
            environment = {**os.environ, **QUIET, "PYTHONPATH": path}
            about = look(device, Path(folder), environment)
            print(f"{about['device']}: {' '.join(f'{name} {number}' for name, number in about['versions'].items())}")
            (output / what).mkdir(parents=True, exist_ok=True)
            for part in parts:
                file = output / what / f"{part.name}.json"
                file.unlink(missing_ok=True)  # of an earlier run
                limit = min(part.limit, arguments.limit - END - (time.monotonic() - began))
                print(f"\n{what}: {part.name}, {max(limit, 0):.0f} s at most", flush=True)
                record = record_of(part, file, limit, about, environment)
                write(record, file)
                # After each part: where the whole is ended from outside, what is there is packed.
                pack(output, archive)
                print(
                    f"{what}: {part.name}: {record['outcome']} in {record['seconds']:.0f} s",
                    *record["stderr"],
                    sep="\n",
                )
                failed += [part.name] if record["outcome"] != "passed" else []
    except KeyboardInterrupt:
        print("gpu: stopped. Records of finished parts are kept.", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    print(f"\n{len(parts) - len(failed)} of {len(parts)} parts passed. The archive is {archive}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
