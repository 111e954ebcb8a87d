"""A sweep of benchmarks/speed.py: its points and their files, what a file must agree with, and points that fail."""

import argparse
import json
import os
import platform
import re
import sys
import tempfile
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
import transformers

import learnpruner
from learnpruner.hub_cards.records import code_digest, read_result, weights_digest

from speed_point import Point, measure
from speed_presets import PRESETS, build_pair, check_fits, stock_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHOWN = ("prefill_speedup", "prefill_ceiling", "end_to_end_speedup", "overhead_at_ratio_one")
# How OpenMP's threads wait, and how many there are.
ENVIRONMENT = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")
# Of an error, in characters.
LONGEST = 300


@torch.no_grad()
def measure_all(arguments: argparse.Namespace) -> list[str]:
    """Measures the points that have no file yet. Returns a line for each that failed.

    Raises:
        `ValueError`, `ImportError`, `OSError`: before any work, where nothing could come of it.
    """
    grid = product(arguments.batch, arguments.text, arguments.new_tokens, arguments.backend, arguments.ratio)
    points = [Point(arguments.preset, *values) for values in grid]
    files = output_files(arguments.output, points)
    device = arguments.device
    dtype = DTYPES[arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    check_request(device, dtype, arguments.backend)
    about = about_run(arguments, device, dtype)
    known = [is_there(file, identity(point, about)) for point, file in zip(points, files)]
    for file in (file for file, there in zip(files, known) if there):
        print(json.dumps({"output": str(file), "already_measured": True}))
    missing = [(point, file) for point, file, there in zip(points, files, known) if not there]
    if not missing:
        return []
    preset = PRESETS[arguments.preset]
    config = preset.config()
    with torch.device("meta"):
        shapes = stock_model(config, dtype)
    for name in arguments.backend:
        shapes.set_attn_implementation(name)
    check_fits(shapes, device)
    check_writable(files[0].parent)
    load = os.getloadavg()[0]
    if device.type == "cpu":
        warn_of(load)
    stock, pruned = build_pair(config, device, dtype, arguments.seed)
    constant = {
        "parameters": sum(weight.numel() for weight in stock.parameters()),
        "base_sha256": weights_digest(pruned),
        "pruner_sha256": weights_digest(pruned, pruner=True),
    }
    failed = []
    for number, (point, file) in enumerate(missing, 1):
        label = f"{number}/{len(missing)} {file.stem}"
        try:
            measured = measure(stock, pruned, point, preset.image, arguments.rounds, arguments.warmup, label)
        except (ImportError, RuntimeError, ValueError) as error:  # torch.OutOfMemoryError is a RuntimeError
            failed.append(f"{file.name}: {first_line(error)}")
        else:
            record = {**measured, **identity(point, about), "conditions": conditions(load), **constant}
            save(record, file)
            print(json.dumps({"output": str(file), **{name: record[name] for name in SHOWN}}))
        # What the point held is released by now.
        if device.type == "cuda":
            torch.cuda.empty_cache()
        load = os.getloadavg()[0]
    return failed


def save(record: dict, file: Path) -> None:
    """Whole or not at all."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(file)


def output_files(output: Path, points: list[Point]) -> list[Path]:
    """A file for each point. Raises `ValueError` where `output` cannot hold them."""
    if output.suffix != ".json":
        return [output / point.file for point in points]
    if len(points) > 1:
        raise ValueError(f"{len(points)} points do not go into one file: --output takes a folder for them.")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder.")
    return [output]


def check_request(device: torch.device, dtype: torch.dtype, backends: list[str]) -> None:
    """Raises `ValueError` where the device is not there, or a backend does not take the dtype."""
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {device}, and torch finds {torch.cuda.device_count()} GPUs: take one that is there, or "
            "--device cpu and a preset that fits it."
        )
    if "flash_attention_2" in backends and dtype == torch.float32:
        raise ValueError("flash_attention_2 does not take float32: give --dtype bfloat16, or another --backend.")


def check_writable(folder: Path) -> None:
    """Makes the folder. Raises `OSError` where nothing can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder):
        pass


def warn_of(load: float) -> None:
    """On stderr, where others keep more than half of the cores busy."""
    cores = os.cpu_count()
    if load > 0.5 * cores:
        print(
            f"speed: warning: the load average is {load:.2f} on {cores} cores. What else runs, or ran a minute ago, "
            "may slow what is measured.",
            file=sys.stderr,
        )


def about_run(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    """What all points of a run have in common and their figures depend on. Weights are those of the seed."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "settings": {
            "dtype": str(dtype).removeprefix("torch."),
            **{name: getattr(arguments, name) for name in ("rounds", "warmup", "threads", "seed")},
        },
        "versions": {
            "learnpruner": learnpruner.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "code_sha256": code_digest(code_files()),
    }


def identity(point: Point, about: dict) -> dict:
    """Everything that the figures of a point depend on."""
    settings = {**asdict(point), **about["settings"]}
    return {**about, "ratio": settings.pop("ratio"), "settings": dict(sorted(settings.items()))}


def is_there(file: Path, expected: dict) -> bool:
    """Whether a point was measured before. Raises `ValueError` where its file holds another measurement.

    Args:
        expected: Of [`identity`].
    """
    if not file.exists():
        return False
    found = _flat(read_result(file, speed=True))
    other = sorted(name for name, value in _flat(expected).items() if found.get(name) != value)
    if other:
        raise ValueError(
            f"{file} holds a measurement with another {', '.join(other)}: remove the file, or give --output another "
            "place."
        )
    return True


def _flat(record: dict) -> dict:
    nested = ("settings", "versions")
    return (
        {name: value for name, value in record.items() if name not in nested} | record["settings"] | record["versions"]
    )


def code_files() -> list[Path]:
    """The code that is measured, and the code that measures, by name."""
    folders = {Path(learnpruner.__file__).parent: "*.py", Path(__file__).parent: "speed*.py"}
    files = (file for folder, names in folders.items() for file in folder.glob(names))
    return sorted(files, key=lambda file: file.name)


def conditions(load: float) -> dict[str, str | float | None]:
    """What may explain a figure, and no figure of two runs needs to have in common.

    Args:
        load (`float`): Load average of the minute before the point; from the second point on, that is the one before.
    """
    return {**{name: os.environ.get(name) for name in ENVIRONMENT}, "load_average": round(load, 2)}


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:LONGEST]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    return f"{found[1] if found else platform.machine()}, {cores}"
