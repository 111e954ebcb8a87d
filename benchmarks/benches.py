"""What benchmarks/accuracy.py asks: scenes of easy-vqa images, or stored scenes of photographs."""

import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin

import learnpruner
from learnpruner.compare import load_processor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "easy_vqa"))
from scenes import scene_dataset

EASY_VQA, PHOTO_VQA = (Path(__file__).parents[1] / "examples" / name for name in ("easy_vqa", "photo_vqa"))
PER_SCENE = 4


def pixels_digest(data: Dataset) -> str:
    """sha256 of the images that were asked about, in turn, before any processor: their size, mode and pixels."""
    digest = hashlib.sha256()
    for image in data["image"]:
        digest.update(repr((image.size, image.mode)).encode() + image.tobytes())
    return digest.hexdigest()


def code_files(scenes: Sequence[Path] = (EASY_VQA / "scenes.py", EASY_VQA / "grounds.py")) -> list[Path]:
    """The code that takes part: the models', the methods', those that ask, and what composes the `scenes`."""
    folders = (Path(learnpruner.__file__).parent, Path(learnpruner.methods.__file__).parent)
    files = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    return [*files, Path(__file__).with_name("accuracy.py"), Path(__file__), *scenes]


class Bench(NamedTuple):
    """What is asked.

    Attributes:
        data: Rows by number, columns by name: `image`, `scene`, `kind`, `question`, `answer`, `boxes`.
        processor: Of these images.
        level (`str`): What the record calls the scenes.
        pixels (`str`): A digest of the images.
        code: The files that take part.
        prepare: Makes a model take what the processor gives.
    """

    data: Dataset | Sequence
    processor: ProcessorMixin
    level: str
    pixels: str
    code: list[Path]
    prepare: Callable[[PreTrainedModel], None] = lambda model: None


def easy_vqa(model: str, split: str, level: str, seed: int, limit: int, trust_remote_code: bool) -> Bench:
    count = math.ceil(limit / PER_SCENE)
    data = scene_dataset(split, count, level=level, seed=seed, per_scene=PER_SCENE).select(range(limit))
    name = level if split == "test" else f"{level}-{split}"
    return Bench(data, load_processor(model, trust_remote_code), name, pixels_digest(data), code_files())


def photo_vqa(model: str, features: Path, limit: int, other_picture: bool) -> Bench:
    sys.path.insert(0, str(PHOTO_VQA))
    import stored

    data = stored.StoredQuestions(stored.Features(features), limit, other_picture)
    processor = stored.StoredProcessor.from_pretrained(model)
    code = code_files(sorted(PHOTO_VQA.glob("*.py")))
    return Bench(data, processor, data.level, data.pixels_digest(), code, stored.read_stored)
