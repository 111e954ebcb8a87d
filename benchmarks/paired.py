"""Interval of the difference in accuracy of runs that were asked the same questions, paired, over scenes.

    python benchmarks/paired.py learnpruner-0.json learnpruner-1.json --against divprune.json

Several files of a side are seeds of one method: a question counts with the mean over them. Scenes are drawn with
replacement, each with all its questions, since the questions of a scene are not independent of one another. The files
are records of benchmarks/accuracy.py that hold the answer to each question.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from learnpruner.hub_cards.records import check_comparable, read_result
from learnpruner.training.metrics import normalize_answer
from learnpruner_commands.arguments import Parser, positive

RESAMPLES = 10_000
# Rows of draws held at a time: bounds the memory of many scenes.
ROWS_AT_A_TIME = 500


class Interval(NamedTuple):
    """A difference of accuracies, each from 0 to 1, and a percentile interval of it."""

    difference: float
    low: float
    high: float


def rightness(record: Mapping) -> np.ndarray:
    """Whether each question was answered exactly, as VQA reads answers: `(questions,)` float64, 0 or 1."""
    read = lru_cache(normalize_answer)  # there are few different answers
    answers = record["answers"]
    return np.array([float(read(one) == read(other)) for one, other in zip(answers["given"], answers["expected"])])


def check_paired(records: Sequence[Mapping]) -> None:
    """Raises `ValueError` where one of the records lacks its answers, or was asked other questions, of other pixels or
    another model, than the first."""
    first = records[0]
    for record in records:
        if missing := [name for name in ("answers", "pixels_sha256") if not record.get(name)]:
            raise ValueError(f"A run of {record['name']} recorded no {missing[0]}: measure it again.")
        check_comparable(record, first, "A paired interval")
        asked, of_first = ({**r["answers"], "given": None} for r in (record, first))
        if record["pixels_sha256"] != first["pixels_sha256"] or asked != of_first:
            raise ValueError(
                f"Runs of {first['name']} and {record['name']} were not asked the same, in the same order."
            )


@lru_cache(maxsize=2)
def times_drawn(scenes: int, resamples: int, seed: int) -> np.ndarray:
    """How often each scene is in each resample: `(resamples, scenes)` uint16. The same for all intervals of a table,
    which takes seconds so, in place of minutes."""
    rng, rows = np.random.default_rng(seed), []
    for start in range(0, resamples, ROWS_AT_A_TIME):
        number = min(ROWS_AT_A_TIME, resamples - start)
        places = rng.integers(scenes, size=(number, scenes)) + scenes * np.arange(number)[:, None]
        counts = np.bincount(places.ravel(), minlength=number * scenes)
        rows.append(counts.reshape(number, scenes).astype(np.uint16))
    return np.concatenate(rows)


def paired_interval(
    ones: Sequence[Mapping],
    others: Sequence[Mapping],
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Accuracy of the first runs minus that of the others, and its interval by a bootstrap over scenes.

    Args:
        ones, others (`Sequence[Mapping]`): Records, one or more of each side.
        confidence (`float`): Share of the resamples between `low` and `high`.

    Raises:
        `ValueError`: as [`check_paired`], or for a confidence that is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is a share between 0 and 1, got {confidence}.")
    check_paired([*ones, *others])
    gained = np.mean([rightness(r) for r in ones], axis=0) - np.mean([rightness(r) for r in others], axis=0)
    _, scenes = np.unique(ones[0]["answers"]["scene"], return_inverse=True)
    sums = np.stack([np.bincount(scenes, weights=gained), np.bincount(scenes)], axis=1)
    drawn = times_drawn(len(sums), resamples, seed)
    totals = np.concatenate([drawn[at : at + ROWS_AT_A_TIME] @ sums for at in range(0, resamples, ROWS_AT_A_TIME)])
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(totals[:, 0] / totals[:, 1], ends)
    return Interval(float(gained.mean()), float(low), float(high))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of benchmarks/accuracy.py: seeds of a method")
    parser.add_argument("--against", type=Path, nargs="+", required=True, help="those of another")
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--resamples", type=positive, default=RESAMPLES)
    parser.add_argument("--seed", type=int, default=0, help="of the draws of scenes")
    arguments = parser.parse_args(argv)
    try:
        ones, others = ([read_result(path) for path in side] for side in (arguments.results, arguments.against))
        found = paired_interval(ones, others, arguments.confidence, arguments.resamples, arguments.seed)
    except ValueError as error:
        print(f"paired: {error}", file=sys.stderr)
        return 2
    low, high = (f"{100 * value:+.2f}" for value in (found.low, found.high))
    print(f"{100 * found.difference:+.2f} points ({low} to {high}, {100 * arguments.confidence:g} %, over scenes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
