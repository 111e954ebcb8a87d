# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What the cluttered scenes stand on: photographs, with textures, strokes and pieces that no question asks about.

The photographs are files of the scikit-image package. They are read where it is installed; its code is not imported.
"""

import hashlib
import importlib.util
import math
import random
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# No photograph is of two splits.
GROUNDS = {
    "train": ("brick.png", "camera.png", "chelsea.png", "grass.png", "hubble_deep_field.jpg", "ihc.png"),
    "validation": ("coffee.png", "text.png"),
    "test": ("astronaut.png", "gravel.png", "rocket.jpg"),
}
DIGEST = "70341553dbe6b6b148aa40b048b32437649fd99c80102fafeb0a130045a85062"
INSTALL = 'pip install "scikit-image>=0.24"'
# Of pieces and strokes. None is near a color that is asked about.
COLORS = {
    "sand": (240, 210, 150),
    "peach": (255, 195, 160),
    "rose": (255, 175, 210),
    "lilac": (205, 175, 255),
    "white": (255, 255, 255),
}
LIGHT = (0.2, 0.4)  # how much of a photograph is left; the rest is white
PIECES = (3, 5)
PIECE_SIDES = (8, 18)  # pixels
GAP = 3  # pixels between an object's box and a piece
NOISE = 6  # of 255, at most


@cache
def photographs(split: str) -> tuple[Image.Image, ...]:
    """The grounds of a split, RGB.

    Raises:
        `ValueError`: for an unknown split.
        `ImportError`: where scikit-image is not installed, or holds other photographs.
    """
    if split not in GROUNDS:
        raise ValueError(f"The split of cluttered scenes is one of {sorted(GROUNDS)}, got {split!r}.")
    spec = importlib.util.find_spec("skimage")
    if spec is None:
        raise ImportError(f"The photographs of cluttered scenes are in scikit-image: {INSTALL}")
    folder = Path(spec.origin).parent / "data"
    names = [name for names in GROUNDS.values() for name in names]
    try:
        content = b"".join((folder / name).read_bytes() for name in names)
    except OSError as error:
        raise ImportError(f"A photograph of scikit-image is missing ({error}): {INSTALL} --force-reinstall") from error
    if hashlib.sha256(content).hexdigest() != DIGEST:
        raise ImportError(f"The photographs in {folder} are not those of cluttered scenes: {INSTALL} --force-reinstall")
    return tuple(Image.open(folder / name).convert("RGB") for name in GROUNDS[split])


def _window(rng: random.Random, photograph: Image.Image, side: int) -> Image.Image:
    """A square part, at most as large as the photograph is, at `side` pixels."""
    size = rng.randint(side // 2, min(photograph.size))
    left, top = (rng.randint(0, edge - size) for edge in photograph.size)
    window = photograph.resize((side, side), Image.Resampling.BILINEAR, (left, top, left + size, top + size))
    return window.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else window


def _pale(rng: random.Random, window: Image.Image) -> Image.Image:
    """Tinted, and lighter than every object."""
    tint = Image.new("RGB", window.size, tuple(rng.randint(200, 255) for _ in range(3)))
    tinted = Image.blend(window, tint, 0.4)
    return Image.blend(Image.new("RGB", window.size, "white"), tinted, rng.uniform(*LIGHT))


def _around(rng: random.Random, middle: tuple[float, float], radius: float, shares: list[float], start: float) -> list:
    """Corners around a middle, at `shares` of the radius."""
    angles = [start + 2 * math.pi * number / len(shares) for number in range(len(shares))]
    return [
        (middle[0] + radius * share * math.cos(angle), middle[1] + radius * share * math.sin(angle))
        for share, angle in zip(shares, angles)
    ]


def draw_ground(rng: random.Random, split: str, side: int) -> Image.Image:
    """A square picture of `side` pixels: a window of a photograph, blots of another one, and thin strokes."""
    images = photographs(split)
    ground = _pale(rng, _window(rng, rng.choice(images), side))
    for _ in range(rng.randint(1, 3)):
        blot = Image.new("L", ground.size)
        corners = [rng.uniform(0.5, 1) for _ in range(9)]
        middle = (rng.uniform(0, side), rng.uniform(0, side))
        ImageDraw.Draw(blot).polygon(_around(rng, middle, rng.uniform(20, 60), corners, 0), fill=255)
        ground.paste(_pale(rng, _window(rng, rng.choice(images), side)), mask=blot.filter(ImageFilter.BoxBlur(4)))
    draw = ImageDraw.Draw(ground)
    for _ in range(rng.randint(2, 6)):
        x, y, turn = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0, 2 * math.pi)
        points = [(x, y)]
        for _ in range(rng.randint(2, 8)):
            turn += rng.uniform(-0.8, 0.8)
            x, y = x + 12 * math.cos(turn), y + 12 * math.sin(turn)
            points.append((x, y))
        draw.line(points, fill=rng.choice(list(COLORS.values())), width=rng.randint(1, 2))
    return ground


def _piece(rng: random.Random, side: int) -> Image.Image:
    """Mask of a star, a cross, an arrow or a zigzag."""
    scale = 4  # drawn larger: its edges come out smooth
    whole, middle, start = side * scale, (side * scale / 2, side * scale / 2), rng.uniform(0, 2 * math.pi)
    mask = Image.new("L", (whole, whole))
    draw = ImageDraw.Draw(mask)
    form = rng.choice(("star", "cross", "arrow", "zigzag"))
    if form == "star":
        draw.polygon(_around(rng, middle, whole / 2, rng.choice((5, 6)) * [1, 0.4], start), fill=255)
    elif form == "cross":
        for first, second in ((0, 2), (1, 3)):
            ends = _around(rng, middle, whole / 2, [1, 1, 1, 1], start)
            draw.line((ends[first], ends[second]), fill=255, width=whole // 5)
    elif form == "arrow":
        tip, left, tail, right = _around(rng, middle, whole / 2, [1, 0.8, 1, 0.8], start)
        for end in (left, tail, right):
            draw.line((tip, end), fill=255, width=whole // 7)
    else:
        corners = [(whole * x / 6, whole * (0.25 if x % 2 else 0.75)) for x in range(7)]
        draw.line(corners, fill=255, width=whole // 7)
        mask = mask.rotate(math.degrees(start))
    return mask.resize((side, side), Image.Resampling.BOX)


def draw_pieces(rng: random.Random, picture: Image.Image, boxes: list[tuple[int, int, int, int]]) -> None:
    """Draws pieces that keep `GAP` pixels from the boxes."""
    for _ in range(rng.randint(*PIECES)):
        side = rng.randint(*PIECE_SIDES)
        mask, color = _piece(rng, side), rng.choice(list(COLORS.values()))
        for _ in range(20):
            left, top = (rng.randint(-side // 4, edge - side * 3 // 4) for edge in picture.size)
            if free((left, top, left + side, top + side), boxes, GAP):
                picture.paste(color, (left, top), mask)
                break


def free(box: tuple[int, int, int, int], boxes: list[tuple[int, int, int, int]], gap: int) -> bool:
    """Whether at least `gap` pixels lie between a box and each of `boxes`."""
    left, top, right, bottom = box
    return all(
        right + gap <= other[0] or other[2] + gap <= left or bottom + gap <= other[1] or other[3] + gap <= top
        for other in boxes
    )


def add_noise(rng: random.Random, picture: Image.Image) -> Image.Image:
    pixels = np.asarray(picture).astype(int)
    noise = np.frombuffer(rng.randbytes(pixels.size), np.uint8).reshape(pixels.shape).astype(int)
    return Image.fromarray((pixels + noise * (2 * NOISE + 1) // 256 - NOISE).clip(0, 255).astype(np.uint8))
