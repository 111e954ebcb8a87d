# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Scenes as any other data would come to `learnpruner train`: pictures, and JSON Lines with a conversation each.

    python examples/photo_vqa/pruner_data.py --fold 0 --first 2400 --count 600 --output FOLDER

writes FOLDER/train.jsonl, and the pictures beside it. `--first` tells which scenes of the set "train": those behind the
ones that the base was trained on are new to it.
"""

import json
import random
import sys
from pathlib import Path

from tqdm import tqdm

from learnpruner_commands.arguments import Parser, positive

from packages import Packages, find
from photo_scenes import Scene, make_scene
from questions import ASKERS, training_questions
from stamps import FOLDS

QUESTIONS = 12


def conversation(scene: Scene, count: int = QUESTIONS, kinds: tuple[str, ...] = tuple(ASKERS)) -> list[dict]:
    """Up to `count` questions of a scene as the turns of one conversation, in LLaVA's layout."""
    rng = random.Random(f"pruner, fold {scene.fold}, number {scene.number}")
    asked = [one for one in training_questions(scene, rng) if one.kind in kinds][:count]
    turns = []
    for number, one in enumerate(asked):
        turns.append({"from": "human", "value": "<image>\n" * (number == 0) + one.question})
        turns.append({"from": "gpt", "value": one.answer})
    return turns


def write(
    packages: Packages, fold: int, numbers: range, folder: Path, count: int, kinds: tuple[str, ...] = tuple(ASKERS)
) -> None:
    """Writes pictures, PNG, and `train.jsonl`, which appears when it is complete. A scene without questions of the
    `kinds` is left out."""
    (folder / "train").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in tqdm(numbers, unit=" scenes", desc=str(folder)):
        scene = make_scene(packages, fold, "train", number)
        if turns := conversation(scene, count, kinds):
            name = f"train/{number:06d}.png"
            scene.picture.save(folder / name)
            rows.append(json.dumps({"image": name, "conversations": turns}))
    (folder / "train.jsonl.tmp").write_text("\n".join(rows) + "\n")
    (folder / "train.jsonl.tmp").replace(folder / "train.jsonl")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Pictures and conversations for `learnpruner train`.")
    parser.add_argument(
        "--packages", type=Path, help="folder of packages.py; otherwise PHOTO_VQA_PACKAGES or the system"
    )
    parser.add_argument("--fold", type=int, choices=range(FOLDS), default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first scene")
    parser.add_argument("--count", type=positive, required=True, help="scenes")
    parser.add_argument("--questions", type=positive, default=QUESTIONS, help="of each scene, at most")
    parser.add_argument("--kinds", nargs="+", choices=tuple(ASKERS), default=tuple(ASKERS))
    parser.add_argument("--output", type=Path, required=True, help="folder")
    arguments = parser.parse_args(argv)
    try:
        numbers = range(arguments.first, arguments.first + arguments.count)
        packages = find(arguments.packages)
        write(packages, arguments.fold, numbers, arguments.output, arguments.questions, tuple(arguments.kinds))
    except (OSError, ValueError) as error:
        print(f"pruner_data: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
