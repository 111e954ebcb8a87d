"""Scenes of several objects, composed from the public easy-vqa images, with questions about them.

The package's images show one shape each. Here some of them stand in a 3 x 3 grid (192 x 192 pixels: at a patch of 8,
the 576 vision tokens of LLaVA-1.5), on plain ground elsewhere, and the questions are the package's own kinds asked of
the whole scene. Train scenes are made of train images alone, test scenes of test images. In scenes of the level
"cluttered" they stand anywhere, scaled, on photographs and among pieces that no question asks about (grounds.py).

    python examples/easy_vqa/scenes.py --output runs/scenes

writes train scenes as any other data would come to `learnpruner train`: pictures, and JSON Lines with image, question,
answer and boxes, one question a scene, of the standard and the hard level, or of those that `--levels` names;
`eval.jsonl` has other scenes than `train.jsonl`.
"""

import json
import math
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets
from PIL import Image as Picture
from tqdm import tqdm

from learnpruner_commands.arguments import Parser, positive

import grounds

CELL, GRID = 64, 3
SIDE = CELL * GRID
SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
# Objects of a scene: the standard set; a harder one of more objects and of the smaller half of the shapes; one of
# another size and shape, for models that take images as they are; and one on photographs.
OBJECTS = {"standard": (2, 4), "hard": (4, 6), "wide": (2, 4), "cluttered": (3, 5)}
GRIDS = {"standard": (GRID, GRID), "hard": (GRID, GRID), "wide": (2, 4)}
KINDS = ("color", "shape", "presence", "count")
# Cluttered scenes: how objects are scaled; and in pixels, their longer side at least, what lies at least between two
# boxes, and what lies at most between those that are put close together.
SCALES, LEAST, APART, CLOSE = (0.7, 1.5), 11, 4, 8


@dataclass(frozen=True)
class Source:
    """One image of the package.

    Attributes:
        path (`Path`): Its file.
        shape, color (`str`): As the package's own questions and answers tell.
        box (`tuple[int, int, int, int]`): Left, top, right, bottom of the shape, in pixels of the image.
        area (`int`): Pixels of the shape.
        ground (`tuple[int, int, int]`): Red, green and blue of what it stands on.
    """

    path: Path
    shape: str
    color: str
    box: tuple[int, int, int, int]
    area: int
    ground: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """An image and what stands in it; `boxes` in pixels of the scene, one for each of `objects`."""

    image: Picture.Image
    objects: tuple[Source, ...]
    boxes: tuple[tuple[int, int, int, int], ...]


def _package(split: str):
    if split not in ("train", "test"):
        raise ValueError(f"The split is 'train' or 'test', got {split!r}.")
    try:
        import easy_vqa

        questions = getattr(easy_vqa, f"get_{split}_questions")()
        paths = getattr(easy_vqa, f"get_{split}_image_paths")()
        if not paths:
            raise OSError("it has no images")
    except (ImportError, OSError, ValueError) as error:
        raise ImportError(
            f"The easy-vqa package is missing or damaged ({error}): pip install --force-reinstall easy-vqa==1.0"
        ) from error
    return questions, paths


def _labels(questions: tuple[list, list, list]) -> dict[int, tuple[str, str]]:
    """(shape, color) of each image whose questions tell both. A thing is there if it is the answer, or if the question
    names it and the answer affirms it ("is there not a red shape?" is affirmed by "no").
    """
    facts = defaultdict(set)
    for question, answer, image in zip(*questions):
        words = set(re.findall(r"\w+", question))
        if answer not in ("yes", "no"):
            facts[image] |= words | {answer}
        elif (answer == "yes") != bool(words & {"not", "no"}):
            facts[image] |= words
    found = {
        image: ([s for s in SHAPES if s in told], [c for c in COLORS if c in told]) for image, told in facts.items()
    }
    return {image: (s[0], c[0]) for image, (s, c) in found.items() if len(s) == len(c) == 1}


def covered(pixels: np.ndarray, ground: tuple[int, int, int]) -> np.ndarray:
    """Which of `pixels` `(height, width, 3)` are not ground: bool `(height, width)`."""
    return np.abs(pixels.astype(int) - ground).sum(-1) > 60


@cache
def sources(split: str) -> tuple[Source, ...]:
    """The labelled images of a split, in the order of their numbers.

    Raises:
        `ValueError`: for an unknown split.
        `ImportError`: where the package or one of its images is missing or damaged.
    """
    questions, paths = _package(split)
    found = []
    for image, (shape, color) in sorted(_labels(questions).items()):
        try:
            pixels = np.asarray(Picture.open(paths[image]).convert("RGB"))
        except (KeyError, OSError, SyntaxError) as error:  # Pillow's PNG reader raises the last
            raise ImportError(
                f"Image {image} of easy-vqa is missing or damaged: pip install --force-reinstall easy-vqa==1.0"
            ) from error
        # A shape may cover a corner, but not all, and ground is lighter than any shape.
        ground = max((pixels[row, column].tolist() for row in (0, -1) for column in (0, -1)), key=sum)
        rows, columns = np.nonzero(covered(pixels, ground))
        box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
        found.append(Source(Path(paths[image]), shape, color, box, len(rows), tuple(ground)))
    return tuple(found)


@cache
def _tile(path: Path) -> Picture.Image:
    return Picture.open(path).convert("RGB")


def make_scene(
    rng: random.Random,
    images: tuple[Source, ...],
    objects: tuple[int, int],
    *,
    grid: tuple[int, int] = (GRID, GRID),
    cell: int = CELL,
) -> Scene:
    """Puts `objects` (least, most) images into different cells of a grid of (rows, columns).

    A `cell` of fewer pixels than an image has holds a part of it, with its shape whole: as the dataset's objects, with
    less ground.
    """
    rows, columns = grid
    fitting = [source for source in images if max(_extent(source, axis) for axis in (0, 1)) <= cell]
    chosen = rng.sample(fitting, rng.randint(*objects))
    places = rng.sample(range(rows * columns), len(chosen))
    scene = Picture.new("RGB", (cell * columns, cell * rows), chosen[0].ground)
    boxes = []
    for source, place in zip(chosen, places):
        tile, box = _tile(source.path), source.box
        if cell < CELL:
            left, top = (rng.randint(max(0, box[axis + 2] - cell), min(box[axis], CELL - cell)) for axis in (0, 1))
            tile = tile.crop((left, top, left + cell, top + cell))
            box = _moved(box, (-left, -top))
        corner = (place % columns * cell, place // columns * cell)
        scene.paste(tile, corner)
        boxes.append(_moved(box, corner))
    return Scene(scene, tuple(chosen), tuple(boxes))


def _cut_out(source: Source, scale: float) -> tuple[Picture.Image, tuple[int, int, int]]:
    """The object alone, scaled: its mask, which reaches all four edges, and its color."""
    pixels = np.asarray(_tile(source.path)).astype(int)
    apart = np.abs(pixels - source.ground).sum(-1)
    color = pixels[np.unravel_index(apart.argmax(), apart.shape)]  # others are of edges, mixed with ground
    mask = Picture.fromarray((255 * apart / apart.max()).astype(np.uint8)).crop(source.box)
    scale = max(scale, LEAST / max(mask.size))
    mask = mask.resize([round(edge * scale) for edge in mask.size], Picture.Resampling.BICUBIC)
    mask = mask.crop(mask.point(lambda value: 255 * (value >= 128)).getbbox())
    return mask, tuple(color.tolist())


def _place(rng: random.Random, size: tuple[int, int], boxes: list[tuple[int, int, int, int]]) -> tuple | None:
    """A box of this size, close to one of `boxes` or anywhere, `APART` pixels from each; `None` where none fits."""
    for _ in range(100):
        area = (0, 0, SIDE, SIDE)
        if boxes and rng.random() < 0.5:
            other, reach = rng.choice(boxes), [edge + CLOSE for edge in size]
            area = [max(0, other[axis] - reach[axis]) for axis in (0, 1)]
            area += [min(SIDE, other[axis + 2] + reach[axis]) for axis in (0, 1)]
        corner = tuple(rng.randint(area[axis], area[axis + 2] - size[axis]) for axis in (0, 1))
        box = _moved((0, 0, *size), corner)
        if grounds.free(box, boxes, APART):
            return box
    return None


def make_cluttered_scene(rng: random.Random, images: tuple[Source, ...], split: str) -> Scene:
    """Puts objects of four colors, in sizes of their own, anywhere on a ground of a split. None hides another."""
    palette = rng.sample(COLORS, 4)
    drawn = rng.sample([source for source in images if source.color in palette], rng.randint(*OBJECTS["cluttered"]))
    cut_outs = [_cut_out(source, math.exp(rng.uniform(*map(math.log, SCALES)))) for source in drawn]
    boxes = []
    for mask, _ in cut_outs:
        boxes.append(_place(rng, mask.size, boxes))
        if boxes[-1] is None:
            return make_cluttered_scene(rng, images, split)
    scene = grounds.draw_ground(rng, split, SIDE)
    grounds.draw_pieces(rng, scene, boxes)
    for (mask, color), box in zip(cut_outs, boxes):
        scene.paste(color, box[:2], mask)
    return Scene(grounds.add_noise(rng, scene), tuple(drawn), tuple(boxes))


def _extent(source: Source, axis: int) -> int:
    return source.box[axis + 2] - source.box[axis]


def _moved(box: tuple[int, int, int, int], by: tuple[int, int]) -> tuple[int, int, int, int]:
    return tuple(edge + offset for edge, offset in zip(box, by * 2))


def ask(
    rng: random.Random,
    scene: Scene,
    kind: str,
    counts: tuple[str, ...] = ("all", "shape", "color"),
    balanced: bool = False,
) -> tuple[str, str] | None:
    """One question of a kind and its answer, or `None` where the scene allows none of it.

    - color: of a shape that stands once. shape: of a color that stands once.
    - presence: of a shape, a color, or both; as often yes as no where the scene allows both, and a "no" of both names
      what is there apart.
    - count: of one of `counts`: all shapes, one shape, or one color.

    `balanced`: presence is asked of what allows the answer that was drawn, and each count that the scene has is as
    likely as another.
    """
    shapes = Counter(source.shape for source in scene.objects)
    colors = Counter(source.color for source in scene.objects)
    if kind == "color":
        once = [source for source in scene.objects if shapes[source.shape] == 1]
        if not once:
            return None
        source = rng.choice(once)
        form = rng.choice(("what color is the {}?", "what is the color of the {}?"))
        return form.format(source.shape), source.color
    if kind == "shape":
        once = [source for source in scene.objects if colors[source.color] == 1]
        if not once:
            return None
        source = rng.choice(once)
        return rng.choice(("what shape is {}?", "what is the {} shape?")).format(source.color), source.shape
    if kind == "presence":
        pairs = {(source.color, source.shape) for source in scene.objects}
        wanted = rng.random() < 0.5
        apart = [(color, shape) for color in COLORS if color in colors for shape in SHAPES if shape in shapes]
        all_things = (
            [shape for shape in SHAPES if (shape in shapes) == wanted],
            [f"{color} shape" for color in COLORS if (color in colors) == wanted],
            [" ".join(pair) for pair in apart if (pair in pairs) == wanted],
        )
        things = rng.choice([things for things in all_things if things or not balanced])
        if not things:
            return None
        form = rng.choice(("is there a {}?", "does the image contain a {}?", "is a {} present?"))
        return form.format(rng.choice(things)), "yes" if wanted else "no"
    if kind == "count":
        named = rng.choice(counts)
        if named == "all":
            return "how many shapes are there?", str(len(scene.objects))
        names, found, form = (SHAPES, shapes, "{}s") if named == "shape" else (COLORS, colors, "{} shapes")
        if balanced:
            wanted = rng.choice(sorted({found[name] for name in names}))
            names = [name for name in names if found[name] == wanted]
        name = rng.choice(names)
        return f"how many {form.format(name)} are there?", str(found[name])
    raise ValueError(f"The kinds of questions are {KINDS}, got {kind!r}.")


def scene_at(
    split: str, level: str, seed: int, number: int, per_scene: int
) -> tuple[Scene, list[tuple[str, str, str]]]:
    """Scene `number` of a data set, and `per_scene` questions of all kinds in turn: (kind, question, answer).

    Counts are of one shape or one color. How many shapes there are at all asks for no part of the image more than for
    another, so that a wrong answer would say little of what a pruner kept.

    It depends on the arguments alone, so that any part of a set can be made on its own.
    """
    if level not in OBJECTS:
        raise ValueError(f"The level is one of {sorted(OBJECTS)}, got {level!r}.")
    rng = random.Random(f"{split} {level} {seed} {number}")
    cluttered = level == "cluttered"
    if cluttered:
        scene = make_cluttered_scene(rng, sources("test" if split == "test" else "train"), split)
    else:
        images = sources(split)
        if level == "hard":
            middle = sorted(source.area for source in images)[len(images) // 2]
            images = tuple(source for source in images if source.area <= middle)
        scene = make_scene(rng, images, OBJECTS[level], grid=GRIDS[level])
    asked, turn = [], number
    while len(asked) < per_scene:
        kind = KINDS[turn % len(KINDS)]
        turn += 1
        question = ask(rng, scene, kind, counts=("shape", "color"), balanced=cluttered)
        if question is not None:
            asked.append((kind, *question))
    return scene, asked


def scene_dataset(split: str, scenes: int, *, level: str = "standard", seed: int = 0, per_scene: int = 4) -> Dataset:
    """A data set with one row for each question.

    Args:
        split (`str`): `"train"` or `"test"`: of which images the scenes are made. Cluttered scenes also have the split
            `"validation"`, to make choices on: train images on grounds of its own.
        scenes (`int`): How many scenes.
        level (`str`): `"standard"`, `"hard"`, `"wide"` or `"cluttered"`.
        seed (`int`): Another seed, other scenes.
        per_scene (`int`): Questions of each scene.

    Returns:
        [`Dataset`]: image, question, answer, kind, scene (its number), boxes `(objects, 4)` in pixels.
    """

    def rows():
        for number in range(scenes):
            scene, asked = scene_at(split, level, seed, number, per_scene)
            for kind, question, answer in asked:
                yield {
                    "image": scene.image,
                    "question": question,
                    "answer": answer,
                    "kind": kind,
                    "scene": number,
                    "boxes": [list(box) for box in scene.boxes],
                }

    text = {name: Value("string") for name in ("question", "answer", "kind")}
    features = Features({"image": Image(), **text, "scene": Value("int32"), "boxes": List(List(Value("int32"), 4))})
    return Dataset.from_list(list(rows()), features=features)


def write_questions(path: Path, questions: int, seed: int, levels: Sequence[str] = ("standard", "hard")) -> None:
    """Writes about train scenes, as many of each level, one question each: `path`, and pictures in a folder beside
    it."""
    pictures = path.parent / path.stem
    pictures.mkdir(parents=True, exist_ok=True)
    # The first levels take what is left over.
    parts = [len(range(number, questions, len(levels))) for number in range(len(levels))]
    rows = concatenate_datasets(
        [
            scene_dataset("train", part, level=level, seed=seed, per_scene=1)
            for part, level in zip(parts, levels)
            if part
        ]
    )
    lines = []
    for number, row in enumerate(tqdm(rows, desc=path.name)):
        row["image"].save(pictures / f"{number}.png")
        row["image"] = f"{path.stem}/{number}.png"
        lines.append(json.dumps({name: row[name] for name in ("image", "question", "answer", "boxes")}))
    path.write_text("\n".join(lines) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Train scenes in files.")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--questions", type=positive, default=960, help="to train on")
    parser.add_argument("--held-out", type=positive, default=192, help="to choose a checkpoint by")
    parser.add_argument("--levels", nargs="+", choices=OBJECTS, default=["standard", "hard"], help="equal shares")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        write_questions(arguments.output / "train.jsonl", arguments.questions, arguments.seed, arguments.levels)
        write_questions(arguments.output / "eval.jsonl", arguments.held_out, arguments.seed + 1, arguments.levels)
    except (ImportError, OSError) as error:
        print(f"scenes: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
