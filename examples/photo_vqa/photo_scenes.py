# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Scenes of cut-out photographs on photographs, 336 x 336 pixels: 576 patches of 14 pixels.

Three to five objects are of kinds that are asked about, up to ten others stand around. A scene depends on fold, set and
number alone, so that any part of a set can be made on its own.
"""

import hashlib
import io
import random
import re
import struct
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter

from packages import GROUNDS, Packages
from stamps import KINDS, Kind, held_out, training

SIDE, PATCH = 336, 14
GRID = SIDE // PATCH
OVERLAP = 3  # pixels that two objects' boxes may share
UPSCALED = 1.8
ASKED_SIZES, UNASKED_SIZES = (52, 125), (40, 100)  # pixels of the longer side
SETS = {"train": "train", "validation": "validation", "a": "test", "b": "test"}  # set -> its grounds
# How often kinds of a merged word are drawn in scenes of seen stamps: words of many kinds are not drowned by them.
WEIGHTS = {"beast": 3, "fruit": 2}

_MONUMENTS = 49
_TEST, _VALIDATION = 16, 6


@cache
def grounds(split: str) -> tuple[str, ...]:
    """Grounds of a split, `"train"`, `"validation"` or `"test"`: `"templates/cliff.jpg"`, `"monuments/7"`."""
    names = [f"{piece}/{file}" for piece, files in GROUNDS.items() for file in files]
    names += [f"monuments/{number}" for number in range(_MONUMENTS)]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    first = {"test": (0, _TEST), "validation": (_TEST, _TEST + _VALIDATION), "train": (_TEST + _VALIDATION, None)}
    return tuple(names[slice(*first[split])])


@dataclass(frozen=True)
class Object:
    """What stands in a scene.

    Attributes:
        name, merged (`str`): Its kind, by the fine name and by the merged word.
        file (`str`): Its stamp.
        box (`tuple[int, int, int, int]`): Left, top, right, bottom in pixels of the scene.
        area (`int`): Pixels that it covers.
        asked (`bool`): Whether questions are about it.
    """

    name: str
    merged: str
    file: str
    box: tuple[int, int, int, int]
    area: int
    asked: bool

    @property
    def center(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Scene:
    """A composed picture.

    Attributes:
        fold, set, number: What it was made from.
        ground (`str`): Its ground's name.
        objects (`tuple[Object, ...]`): In no telling order.
        picture (`Image`): 336 x 336, RGB; `None` for a scene that was read from records.
        coverage (`np.ndarray`): Share of each patch that each object covers, float16 `(objects, 24, 24)`; or `None`.
    """

    fold: int
    set: str
    number: int
    ground: str
    objects: tuple[Object, ...]
    picture: Image.Image | None = field(default=None, compare=False)
    coverage: np.ndarray | None = field(default=None, compare=False)

    def record(self) -> dict:
        """All but the arrays, for JSON."""
        kept = {name: getattr(self, name) for name in ("fold", "set", "number", "ground")}
        return kept | {"objects": [asdict(thing) for thing in self.objects]}

    @classmethod
    def of_record(cls, record: dict, coverage: np.ndarray | None = None) -> "Scene":
        objects = tuple(Object(**{**thing, "box": tuple(thing["box"])}) for thing in record["objects"])
        kept = {name: record[name] for name in ("fold", "set", "number", "ground")}
        return cls(**kept, objects=objects, coverage=coverage)


@lru_cache(maxsize=1024)
def _stamp(path: Path) -> Image.Image:
    with Image.open(path) as file:
        stamp = file.convert("RGBA")
    opaque = stamp.getchannel("A").point(lambda value: 255 if value > 40 else 0)
    stamp = stamp.crop(opaque.getbbox())
    stamp.thumbnail((400, 400), Image.Resampling.LANCZOS)
    return stamp


@cache
def _monuments(path: Path) -> tuple[bytes, ...]:
    """The WebP photographs in a Qt resource file, which holds them as they are; small ones are buttons."""
    data = path.read_bytes()
    found = []
    for match in re.finditer(rb"RIFF(....)WEBP", data, re.DOTALL):
        image = data[match.start() : match.start() + 8 + struct.unpack("<I", match.group(1))[0]]
        with Image.open(io.BytesIO(image)) as opened:
            if min(opened.size) >= 300:
                found.append(image)
    if len(found) != _MONUMENTS:
        raise ValueError(f"{path} holds {len(found)} photographs of monuments, not {_MONUMENTS}: another version?")
    return tuple(found)


@lru_cache(maxsize=128)
def _ground(packages: Packages, name: str) -> Image.Image:
    piece, file = name.split("/")
    path = getattr(packages, piece)
    with Image.open(io.BytesIO(_monuments(path)[int(file)]) if piece == "monuments" else path / file) as opened:
        ground = opened.convert("RGB")
    scale = 700 / min(ground.size)
    if scale < 1:
        ground = ground.resize(tuple(round(edge * scale) for edge in ground.size), Image.Resampling.BILINEAR)
    return ground


def _cut(rng: random.Random, ground: Image.Image) -> Image.Image:
    """A square part of a ground, between half and all of it, perhaps mirrored, lighter or darker."""
    shorter = min(ground.size)
    edge = rng.randint(max(round(shorter * 0.45), min(shorter, 300)), shorter)
    left, top = (rng.randint(0, length - edge) for length in ground.size)
    cut = ground.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=(left, top, left + edge, top + edge))
    if rng.random() < 0.5:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return ImageEnhance.Brightness(cut).enhance(rng.uniform(0.75, 1.2))


def weight(kind: Kind, set_: str) -> float:
    """How often an asked kind is drawn, relative to others. Merged words are as frequent as one another in set "b"."""
    alike = sum(other.asked and other.merged == kind.merged for other in KINDS.values())
    return (1 if set_ == "b" else WEIGHTS.get(kind.merged, 1)) / alike


def draw_kinds(rng: random.Random, set_: str) -> list[Kind]:
    """The asked kinds of a scene, three to five; different ones, but in half of the scenes one stands twice or three
    times, so that counts of two and three exist.

    In set "b", where merged words are asked, "different" is of different merged words.
    """
    times = rng.choice((1, 1, 2, 3))
    number = rng.randint(max(3, times + 1), 5)

    def word(kind: Kind) -> str:
        return kind.merged if set_ == "b" else kind.name

    left = [kind for kind in KINDS.values() if kind.asked]
    kinds: list[Kind] = []
    while len(kinds) < number:
        kind = rng.choices(left, [weight(kind, set_) for kind in left])[0]
        kinds += [kind] * (1 if kinds else times)
        left = [other for other in left if word(other) != word(kind)]
    return kinds


def _place(rng: random.Random, size: tuple[int, int], boxes: list[tuple]) -> tuple[int, int] | None:
    for _ in range(80):
        left, top = (rng.randint(0, SIDE - length) for length in size)
        right, bottom = left + size[0] - OVERLAP, top + size[1] - OVERLAP
        if all(right <= b[0] or b[2] <= left + OVERLAP or bottom <= b[1] or b[3] <= top + OVERLAP for b in boxes):
            return left, top
    return None


def _size(rng: random.Random, bounds: tuple[int, int]) -> float:
    """Pixels, from the smaller or the larger half of a range, in equal shares."""
    middle = sum(bounds) / 2
    return rng.uniform(*rng.choice(((bounds[0], middle), (middle, bounds[1]))))


def make_scene(packages: Packages, fold: int, set_: str, number: int) -> Scene:
    """Composes one scene.

    Args:
        packages ([`Packages`]): Where stamps and grounds lie.
        fold (`int`): Which stamps are held out, 0 to 2.
        set_ (`str`): `"train"`; `"validation"` and `"a"`: the same stamps on other grounds; `"b"`: held-out stamps, on
            the grounds of `"a"`.
        number (`int`): Of the scene in its set.

    Raises:
        `ValueError`: for an unknown set or fold.
    """
    if set_ not in SETS:
        raise ValueError(f"The set is one of {sorted(SETS)}, got {set_!r}.")
    rng = random.Random(f"photo scene, fold {fold}, set {set_}, number {number}")
    files = held_out if set_ == "b" else training
    ground = rng.choice(grounds(SETS[set_]))
    picture = _cut(rng, _ground(packages, ground))

    asked = [(kind, _size(rng, ASKED_SIZES)) for kind in draw_kinds(rng, set_)]
    unasked = [kind for kind in KINDS.values() if not kind.asked]
    others = [(rng.choice(unasked), _size(rng, UNASKED_SIZES)) for _ in range(rng.randint(4, 10))]
    placed, boxes = [], []
    # Large ones first, or they find no room.
    for kind, size in [*sorted(asked, key=lambda one: -one[1]), *sorted(others, key=lambda one: -one[1])]:
        file = rng.choice(files(kind, fold))
        stamp = _stamp(packages.stamps / file)
        if rng.random() < 0.5:
            stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        stamp = ImageEnhance.Brightness(stamp).enhance(rng.uniform(0.85, 1.15))
        bounds = ASKED_SIZES if kind.asked else UNASKED_SIZES
        corner = None
        while corner is None and size >= bounds[0]:
            longer = min(size, UPSCALED * max(stamp.size))
            edges = tuple(max(4, round(edge * longer / max(stamp.size))) for edge in stamp.size)
            corner = _place(rng, edges, boxes)
            size *= 0.85
        if corner is None:
            continue
        stamp = stamp.resize(edges, Image.Resampling.LANCZOS if longer < max(stamp.size) else Image.Resampling.BICUBIC)
        alpha = stamp.getchannel("A")
        # Softer, never wider: beyond the stamp's own edge its colors mean nothing.
        alpha = ImageChops.darker(alpha, alpha.filter(ImageFilter.GaussianBlur(0.8)))
        picture.paste(stamp, corner, alpha)
        mask = Image.new("L", (SIDE, SIDE))
        mask.paste(alpha, corner)
        pixels = np.asarray(mask, np.float32) / 255
        cover = pixels.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)).astype(np.float16)
        boxes.append((*corner, corner[0] + edges[0], corner[1] + edges[1]))
        placed.append((Object(kind.name, kind.merged, file, boxes[-1], round(float(pixels.sum())), kind.asked), cover))
    rng.shuffle(placed)  # the order tells no size
    objects, coverage = zip(*placed)
    return Scene(fold, set_, number, ground, objects, picture, np.stack(coverage))
