"""Whether the photo bench may judge: what it must show before a method's accuracy on it means anything.

    python benchmarks/photo_conditions.py --features FOLDER/a            # what one has right without the picture
    python benchmarks/photo_conditions.py --into examples/photo_vqa/RESULTS.md

The first command records the commonest answers of each kind of question, and the commonest kind of thing in the scene,
for the questions of a set. The second judges the records of benchmarks/photo.py. Accuracies are shares.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

from learnpruner_commands.arguments import Parser

import render_accuracy
from benches import PHOTO_VQA
from paired import paired_interval
from photo import CONDITIONS, LABELLED, RESULTS, TRAINING_FREE, UNPRUNED, Asked, level_of, records

MARK = "verdict"


class Condition(NamedTuple):
    """What must hold, what was measured, and whether it holds."""

    name: str
    measured: str
    met: bool


def baselines(features: Path) -> tuple[str, dict]:
    """The level of a folder of features, and of each kind of question the accuracy without looking."""
    sys.path.insert(0, str(PHOTO_VQA))
    import questions
    import stored

    seen = stored.Features(features)
    words = "merged" if seen.made_of["set"] == "b" else "fine"
    scenes = [seen.scene(number) for number in range(len(seen))]
    asked = ((scene, questions.test_questions(scene, questions.random_of(scene), words)) for scene in scenes)
    return level_of(seen.made_of["set"], seen.made_of["fold"]), questions.statistics(asked, words)


def _only(label: str, tokens: int, level: str) -> list[dict]:
    (asked,) = (asked for asked in CONDITIONS if (asked.label, asked.tokens) == (label, tokens))
    return records(asked, level)


def _accuracy(found: list[dict]) -> float:
    return sum(one["accuracy"] for one in found) / len(found)


def _points(value: float) -> str:
    return f"{100 * value:.1f}"


def judge(level: str) -> list[Condition]:
    """The conditions, for a level whose records are complete.

    Raises:
        `OSError`, `ValueError`: where a record is missing.
    """
    whole = records(UNPRUNED, level)
    if missing := [asked for asked in CONDITIONS if len(records(asked, level)) < len(asked.seeds)]:
        raise ValueError(f"{level}: {missing[0].label} at {missing[0].tokens} was not measured.")
    without = json.loads((RESULTS / level / "baselines.json").read_text())
    unpruned = _accuracy(whole)
    found = [Condition("unpruned, right in 80 % or more", _points(unpruned), unpruned >= 0.8)]

    majority = sum(without[kind]["majority"] * row["n"] for kind, row in whole[0]["by_kind"].items()) / whole[0]["n"]
    other = _accuracy(_only("unpruned, another picture", UNPRUNED.tokens, level))
    measured = f"{_points(other)}, majority {_points(majority)}"
    found.append(
        Condition("with another picture no more than 2 points above the majority", measured, other <= majority + 0.02)
    )

    for kind, row in whole[0]["by_kind"].items():
        best = max(without[kind]["majority"], without[kind]["commonest"] or 0)
        measured = f"{_points(row['accuracy'])}, {_points(best)}"
        name = f"{kind}: 15 points above the majority and the commonest kind that is there"
        found.append(Condition(name, measured, row["accuracy"] >= best + 0.15))

    for tokens, loss in ((64, 0.10), (16, 0.25)):
        lost = unpruned - _accuracy(_only("random", tokens, level))
        found.append(Condition(f"random at {tokens} loses {100 * loss:.0f} points", _points(lost), lost >= loss))
    lost = unpruned - _accuracy(_only("oracle: boxes of what is asked", 32, level))
    found.append(Condition("boxes of what is asked at 32 lose 4 points at most", _points(lost), lost <= 0.04))
    return found + [_labels_win(asked, level) for asked in LABELLED if asked.tokens in (32, 16)]


def _labels_win(labelled: Asked, level: str) -> Condition:
    """Above the module with random weights and every training-free method; of these the one that comes nearest."""
    ours = records(labelled, level)
    rivals = [
        *TRAINING_FREE,
        "training-free first cut",
        *(a.label for a in CONDITIONS if a.label.startswith("random w")),
    ]
    gaps = {name: paired_interval(ours, _only(name, labelled.tokens, level)) for name in dict.fromkeys(rivals)}
    name, gap = min(gaps.items(), key=lambda item: item[1].low)
    measured = f"{100 * gap.difference:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f}) against {name}"
    return Condition(f"{labelled.label} at {labelled.tokens} above every method without labels", measured, gap.low > 0)


def table(level: str) -> str:
    lines = ["| condition | measured | met |", "|---|---|---|"]
    lines += [f"| {one.name} | {one.measured} | {'yes' if one.met else 'no'} |" for one in judge(level)]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=Path, help="folder of one set: records what one has right without looking")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--into", type=Path, help=f"Markdown file with the marks <!-- {MARK} -->")
    arguments = parser.parse_args(argv)
    try:
        if arguments.features:
            level, found = baselines(arguments.features)
            (RESULTS / level).mkdir(parents=True, exist_ok=True)
            (RESULTS / level / "baselines.json").write_text(json.dumps(found, indent=1) + "\n")
        if arguments.into:
            text = render_accuracy.fill(arguments.into.read_text(), MARK, table(level_of("a", arguments.fold)))
            arguments.into.write_text(text)
    except (OSError, ValueError) as error:
        print(f"photo_conditions: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
