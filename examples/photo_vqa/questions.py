# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Questions about scenes, and what one can answer without looking.

    python examples/photo_vqa/questions.py [--fold 0] [--set a] [--scenes 300]

prints how the answers of each kind are distributed, and two baselines: the commonest answer of all, and the kind that
stands most often in the scene.
"""

import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path

from learnpruner_commands.arguments import Parser, positive

from packages import find
from photo_scenes import SETS, SIDE, Object, Scene, draw_kinds, make_scene
from stamps import FINE, FOLDS, MERGED, plural, with_article

WORDS = {"fine": FINE, "merged": MERGED}
NOUN = {"fine": "animal, flower or food", "merged": "kind of animal, flower or food"}
YES_NO = ("yes", "no")
NUMBERS = ("zero", "one", "two", "three")
ROWS, COLUMNS = ("top", "center", "bottom"), ("left", "center", "right")
CELL = SIDE // 3
# Pixels between a center and what would change the answer; and how much larger the largest object is than the next.
CELL_MARGIN, SIDE_MARGIN, LARGER = 8, 25, 1.3
TRAINING = {
    "fine": {"presence": 8, "cell": 4, "largest": 1, "count": 4, "side": 6},
    "merged": {"presence": 2, "cell": 4, "largest": 1, "count": 2, "side": 2},
}
TEST = {"presence": 2, "cell": 2, "largest": 1, "count": 2, "side": 2}


@dataclass(frozen=True)
class Question:
    """A question of one scene.

    Attributes:
        kind (`str`): One of [`ASKERS`].
        question, answer (`str`): The text, and the one word that answers it.
        choices (`tuple[str, ...]`): All words that could answer it.
        about (`tuple[int, ...]`): Which of the scene's objects answer it. All asked ones where none is of the kind.
    """

    kind: str
    question: str
    answer: str
    choices: tuple[str, ...]
    about: tuple[int, ...]


@cache
def _missing(words: str, set_: str) -> dict[str, float]:
    """How often a scene of a set has nothing that is called so, by word."""
    rng = random.Random("how often kinds are drawn")
    there, draws = Counter(), 2000
    for _ in range(draws):
        there.update({kind.name if words == "fine" else kind.merged for kind in draw_kinds(rng, set_)})
    return {word: 1 - there[word] / draws for word in WORDS[words]}


class _View:
    """A scene's asked objects, by the words of one list; `only` are the words that questions may ask about."""

    def __init__(self, scene: Scene, words: str, only: Iterable[str] | None = None):
        self.scene, self.words = scene, words
        self.asked = {number: thing for number, thing in enumerate(scene.objects) if thing.asked}
        self.named = defaultdict(list)
        for number, thing in self.asked.items():
            self.named[self.word(thing)].append(number)
        self.only = WORDS[words] if only is None else tuple(only)

    def word(self, thing: Object) -> str:
        return thing.name if self.words == "fine" else thing.merged

    def draw(self, rng: random.Random) -> list[str]:
        """Words to ask about, in random order. Each is there as often as it is not, or the word would tell the answer:
        those that are absent more often than not are drawn always where they are there, and at times where not.
        """
        drawn = []
        for word in self.only:
            missing = _missing(self.words, self.scene.set)[word]
            there = 1 - missing
            if rng.random() < (missing / there if word in self.named else there / missing):
                drawn.append(word)
        rng.shuffle(drawn)
        return drawn


def _presence(view: _View, rng: random.Random, wanted: int) -> list[Question]:
    drawn = view.draw(rng)
    there, absent = ([word for word in drawn if (word in view.named) == named] for named in (True, False))
    # By turns, so that a few questions have both answers.
    words = [word for pair in zip_longest(there, absent) for word in pair if word is not None][:wanted]
    return [
        Question(
            "presence",
            f"Is there {with_article(word)}?",
            "yes" if word in view.named else "no",
            YES_NO,
            tuple(view.named.get(word, view.asked)),
        )
        for word in words
    ]


def _cell(view: _View, rng: random.Random, wanted: int) -> list[Question]:
    cells = defaultdict(list)
    for number, thing in view.asked.items():
        column, row = (min(int(place // CELL), 2) for place in thing.center)
        cells[row, column].append(number)
    found = []
    for (row, column), numbers in sorted(cells.items()):
        center = view.asked[numbers[0]].center
        clear = min(abs(place - border) for place in center for border in (CELL, 2 * CELL)) >= CELL_MARGIN
        if len(numbers) == 1 and clear:
            where = "center" if row == column == 1 else f"{ROWS[row]} {COLUMNS[column]}"
            answer = view.word(view.asked[numbers[0]])
            question = f"Which {NOUN[view.words]} is at the {where}?"
            found.append(Question("cell", question, answer, WORDS[view.words], (numbers[0],)))
    return rng.sample(found, min(wanted, len(found)))


def _largest(view: _View, rng: random.Random, wanted: int) -> list[Question]:
    first, second = sorted(view.asked, key=lambda number: -view.asked[number].area)[:2]
    if not wanted or view.asked[first].area <= LARGER * view.asked[second].area:
        return []
    answer = view.word(view.asked[first])
    return [Question("largest", f"Which {NOUN[view.words]} is largest?", answer, WORDS[view.words], (first,))]


def _count(view: _View, rng: random.Random, wanted: int) -> list[Question]:
    """Twos and threes where there are any, as many zeros and ones, and one more: half of the scenes have a kind that
    stands twice or three times, so that all answers are about equally frequent.
    """
    times = {word: len(view.named.get(word, ())) for word in view.only}
    words = [word for word in view.only if 1 < times[word] < len(NUMBERS)]
    rng.shuffle(words)
    words = words[:wanted]
    few = sorted((word for word in view.draw(rng) if times[word] < 2), key=lambda word: times[word])
    for _ in range(min(wanted - len(words), len(words) + 1, len(few))):
        words.append(few.pop(rng.choice((0, -1))))  # a zero or a one where both are left
    return [
        Question(
            "count",
            f"How many {plural(word)} are there?",
            NUMBERS[times[word]],
            NUMBERS,
            tuple(view.named.get(word, view.asked)),
        )
        for word in words
    ]


def _side(view: _View, rng: random.Random, wanted: int) -> list[Question]:
    found = []
    for word, numbers in view.named.items():
        across, down = view.asked[numbers[0]].center
        if len(numbers) == 1 and word in view.only:
            for place, choices, form in (
                (across, ("left", "right"), "Is the {} on the left or right?"),
                (down, ("top", "bottom"), "Is the {} at the top or bottom?"),
            ):
                if abs(place - SIDE / 2) > SIDE_MARGIN:
                    answer = choices[place > SIDE / 2]
                    found.append(Question("side", form.format(word), answer, choices, (numbers[0],)))
    return rng.sample(found, min(wanted, len(found)))


# A kind is left out by leaving it out of what is wanted.
ASKERS = {"presence": _presence, "cell": _cell, "largest": _largest, "count": _count, "side": _side}


def questions(
    scene: Scene,
    rng: random.Random,
    *,
    words: str,
    wanted: dict[str, int],
    only: Iterable[str] | None = None,
) -> list[Question]:
    """Questions of a scene, in no telling order and none twice; fewer than wanted where the scene allows no more.

    Args:
        scene ([`Scene`]): Pictures are not needed.
        rng (`random.Random`): Chooses among the questions.
        words (`str`): `"fine"` or `"merged"`: which names questions and answers use.
        wanted (`dict`): Kind to number.
        only (*optional*): Words that presence, count and side ask about; all by default.

    Raises:
        `ValueError`: for unknown words or kinds.
    """
    if words not in WORDS or not wanted.keys() <= ASKERS.keys():
        raise ValueError(f"The words are one of {list(WORDS)}, the kinds {list(ASKERS)}; got {words!r}, {wanted}.")
    view = _View(scene, words, only)
    found = [question for kind, number in wanted.items() for question in ASKERS[kind](view, rng, number)]
    rng.shuffle(found)
    return found


def training_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Questions with both lists of words, none twice: a word of both lists is asked about with the fine ones."""
    merged = [word for word in MERGED if word not in FINE]
    asked = questions(scene, rng, words="fine", wanted=TRAINING["fine"])
    asked += questions(scene, rng, words="merged", wanted=TRAINING["merged"], only=merged)
    rng.shuffle(asked)
    return asked


def test_questions(scene: Scene, rng: random.Random, words: str) -> list[Question]:
    """Questions to measure with: fine words for sets of seen stamps, merged ones for set "b"."""
    return questions(scene, rng, words=words, wanted=TEST)


def commonest(scene: Scene, words: str) -> tuple[str, ...]:
    """The kinds that stand most often in a scene: what one would guess who saw the objects but not where they are."""
    named = _View(scene, words).named
    most = max(map(len, named.values()))
    return tuple(word for word, numbers in named.items() if len(numbers) == most)


def statistics(asked: Iterable[tuple[Scene, list[Question]]], words: str) -> dict[str, dict]:
    """Of each kind of question: how many, the answers, and the baselines' accuracy.

    Returns:
        `dict`: kind -> `{"questions": int, "answers": {word: int}, "majority": float, "commonest": float or None}`.
        `majority` is the accuracy of the commonest answer to the questions that have the same choices.
        `commonest` guesses evenly among the kinds that stand most often; it is for questions that names answer.
    """
    answers, hits = defaultdict(lambda: defaultdict(Counter)), Counter()
    for scene, found in asked:
        guesses = commonest(scene, words)
        for one in found:
            answers[one.kind][one.choices][one.answer] += 1
            hits[one.kind] += (one.answer in guesses) / len(guesses)
    found = {}
    for kind, counted in answers.items():
        total = sum(each.total() for each in counted.values())
        # Who knows the answers' distribution knows, too, whether left or right is asked, or top or bottom.
        majority = sum(max(each.values()) for each in counted.values()) / total
        found[kind] = {
            "questions": total,
            "answers": dict(sum(counted.values(), Counter()).most_common()),
            "majority": majority,
            "commonest": hits[kind] / total if kind in ("cell", "largest") else None,
        }
    return found


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Answers and baselines of the questions.")
    parser.add_argument(
        "--packages", type=Path, help="folder of packages.py; otherwise PHOTO_VQA_PACKAGES or the system"
    )
    parser.add_argument("--fold", type=int, choices=range(FOLDS), default=0)
    parser.add_argument("--set", choices=sorted(SETS), default="a")
    parser.add_argument("--scenes", type=positive, default=300)
    arguments = parser.parse_args(argv)
    words = "merged" if arguments.set == "b" else "fine"
    try:
        packages = find(arguments.packages)
        scenes = [make_scene(packages, arguments.fold, arguments.set, number) for number in range(arguments.scenes)]
    except (OSError, ValueError) as error:
        print(f"questions: {error}", file=sys.stderr)
        return 2
    found = statistics(((scene, test_questions(scene, random_of(scene), words)) for scene in scenes), words)
    for kind, row in found.items():
        guess = "" if row["commonest"] is None else f", commonest there {row['commonest']:.3f}"
        print(f"{kind}: {row['questions']} questions, majority {row['majority']:.3f}{guess}; {row['answers']}")
    print(f"{sum(row['questions'] for row in found.values())} questions of {len(scenes)} scenes")
    return 0


def random_of(scene: Scene) -> random.Random:
    """The generator that chooses a scene's test questions: the same ones in every run."""
    return random.Random(f"photo questions, fold {scene.fold}, set {scene.set}, number {scene.number}")


if __name__ == "__main__":
    sys.exit(main())
