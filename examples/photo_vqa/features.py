# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What the frozen tower makes of scenes, computed once and kept in files.

    python examples/photo_vqa/features.py --fold 0 --set train --count 2400 --output FOLDER

writes shards of 100 scenes: `00000.safetensors` with hidden state 8, the class token's attention in the last layer and
what each object covers, `00000.json` with the scenes and the digests of their pixels. Hidden state 9, which the photo
model reads, is one layer away: a pruning method that hooks that layer still finds it running. A shard that is there is
kept, so that a stopped run goes on and a larger --count adds to it.
"""

import hashlib
import json
import multiprocessing
import os
import sys
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from learnpruner_commands.arguments import Parser, positive

from packages import Packages, find, verify
from photo_scenes import SETS, Scene, make_scene
from stamps import FOLDS
from tower import load_tower, look, pixel_values

LAYER = 8
SHARD = 100  # scenes
BATCH = 4


@cache
def _tower(path: Path):
    torch.set_num_threads(1)
    return load_tower(path)


def write_shard(tower, packages: Packages, made_of: dict, path: Path, numbers: range) -> int:
    """Composes the scenes of one shard, runs the tower and writes both files; returns the number of scenes.

    Args:
        tower (`Dinov2Model`): With eager attention.
        packages ([`Packages`]): Where stamps and grounds lie.
        made_of (`dict`): Fold, set, layer and digests: the record's head.
        path (`Path`): The shard's path without an ending.
        numbers (`range`): Which scenes.
    """
    records, coverage, layers, attention = [], [], [], []
    for start in range(numbers.start, numbers.stop, BATCH):
        scenes = [
            make_scene(packages, made_of["fold"], made_of["set"], number)
            for number in range(start, min(start + BATCH, numbers.stop))
        ]
        hidden, attended = look(tower, torch.stack([pixel_values(scene.picture) for scene in scenes]), made_of["layer"])
        layers.append(hidden.half())
        attention.append(attended)
        for scene in scenes:
            pixels = hashlib.sha256(scene.picture.tobytes()).hexdigest()
            records.append(scene.record() | {"pixels": pixels})
            coverage.append(torch.from_numpy(scene.coverage))
    tensors = {"layer": torch.cat(layers), "cls_attention": torch.cat(attention), "coverage": torch.cat(coverage)}
    _replace(path.with_suffix(".safetensors"), lambda name: save_file(tensors, name))
    text = json.dumps({"made_of": made_of, "scenes": records})
    # Last, because a shard counts as there once its record is.
    _replace(path.with_suffix(".json"), lambda name: Path(name).write_text(text))
    return len(records)


def _replace(path: Path, write) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    write(temporary)
    temporary.replace(path)


def _work(job: tuple) -> int:
    packages, made_of, path, numbers = job
    return write_shard(_tower(packages.tower), packages, made_of, path, numbers)


def _record(path: Path) -> dict:
    return json.loads(path.with_suffix(".json").read_text())


def jobs(folder: Path, made_of: dict, count: int) -> list[tuple[Path, range]]:
    """The shards that `count` scenes still need.

    Raises:
        `ValueError`: where the folder holds scenes of another fold, set, layer or material.
    """
    found = []
    for start in range(0, count, SHARD):
        path, numbers = folder / f"{start // SHARD:05d}", range(start, min(start + SHARD, count))
        if path.with_suffix(".json").exists():
            record = _record(path)
            if record["made_of"] != made_of:
                raise ValueError(
                    f"{path}.json was made of {record['made_of']}, not of {made_of}: use another --output."
                )
            if len(record["scenes"]) >= len(numbers):
                continue
        found.append((path, numbers))
    return found


def extract(
    packages: Packages, material: dict[str, str], fold: int, set_: str, count: int, folder: Path, workers: int = 2
) -> None:
    """Fills `folder` up to `count` scenes; `material` is what [`verify`] gave, a worker a process with one thread."""
    seen = {name: value for name, value in material.items() if name != "text"}
    made_of = {"fold": fold, "set": set_, "layer": LAYER, "material": seen}
    folder.mkdir(parents=True, exist_ok=True)
    left = jobs(folder, made_of, count)
    todo = [(packages, made_of, path, numbers) for path, numbers in left]
    done = count - sum(len(job[-1]) for job in todo)
    with tqdm(total=count, initial=done, unit=" scenes", desc=str(folder)) as bar:
        if workers == 1 or len(todo) < 2:
            for job in todo:
                bar.update(_work(job))
            return
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for made in pool.imap_unordered(_work, todo):
                bar.update(made)


class Features:
    """Reads a folder that [`extract`] fills; arrays are read from the files when asked for.

    Args:
        folder (`str` or `Path`): The folder.
        count (`int`, *optional*): Use the first `count` scenes only.

    Raises:
        `FileNotFoundError`: for a folder without shards.
        `ValueError`: where it holds fewer scenes than `count`.
    """

    def __init__(self, folder: str | Path, count: int | None = None):
        self.folder = Path(folder)
        self.made_of: dict = {}
        self._records, self._places, self._files = [], [], {}
        while (path := self.folder / f"{len(self._files):05d}").with_suffix(".json").exists():
            record = _record(path)
            self.made_of = record["made_of"]
            self._files[path] = None
            first = 0
            for row, scene in enumerate(record["scenes"]):
                self._records.append(scene)
                self._places.append((path, row, first))
                first += len(scene["objects"])
            if len(record["scenes"]) < SHARD:
                break
        if not self._records:
            raise FileNotFoundError(f"{folder} holds no features: python examples/photo_vqa/features.py makes them.")
        if count is not None and count > len(self._records):
            raise ValueError(f"{folder} holds {len(self._records)} scenes, fewer than {count}.")
        self._length = len(self._records) if count is None else count

    def __len__(self) -> int:
        return self._length

    def _slice(self, number: int, name: str) -> tuple:
        if not 0 <= number < self._length:
            raise IndexError(f"Scene {number} of {self._length}.")
        path, row, first = self._places[number]
        if self._files[path] is None:
            self._files[path] = safe_open(path.with_suffix(".safetensors"), "pt")
        return self._files[path].get_slice(name), row, first

    def scene(self, number: int) -> Scene:
        """The scene without its picture; `coverage` `(objects, 24, 24)` float16."""
        rows, _, first = self._slice(number, "coverage")
        record = self._records[number]
        return Scene.of_record(record, rows[first : first + len(record["objects"])].numpy())

    def pixels(self, number: int) -> str:
        """SHA-256 of the scene's pixels."""
        return self._records[number]["pixels"]

    def layer(self, number: int) -> torch.Tensor:
        """Hidden state 8 with the class token first, float16 `(577, 384)`."""
        rows, row, _ = self._slice(number, "layer")
        return rows[row]

    def cls_attention(self, number: int) -> torch.Tensor:
        """How the class token attends to the patches in the last layer, float32 `(576,)`."""
        rows, row, _ = self._slice(number, "cls_attention")
        return rows[row]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Features of scenes, kept in files.")
    parser.add_argument(
        "--packages", type=Path, help="folder of packages.py; otherwise PHOTO_VQA_PACKAGES or the system"
    )
    parser.add_argument("--fold", type=int, choices=range(FOLDS), default=0)
    parser.add_argument("--set", choices=sorted(SETS), required=True)
    parser.add_argument("--count", type=positive, required=True, help="scenes that the folder then holds")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--workers", type=positive, default=2)
    arguments = parser.parse_args(argv)
    try:
        packages = find(arguments.packages)
        extract(
            packages,
            verify(packages),
            arguments.fold,
            arguments.set,
            arguments.count,
            arguments.output,
            arguments.workers,
        )
    except (ImportError, OSError, ValueError) as error:
        print(f"features: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
