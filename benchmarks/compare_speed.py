"""Two results of benchmarks/speed.py side by side: the same point by two versions of the code.

    python benchmarks/compare_speed.py BEFORE.json AFTER.json --into benchmarks/SPEED.md

Only ratios are compared, each taken inside its own process against the stock model: times of two runs are not.
"""

import sys
from pathlib import Path

from learnpruner.hub_cards.records import read_result
from learnpruner_commands.arguments import Parser

from render_accuracy import fill

MARK = "engine"
SAME = ("device", "ratio", "settings")
FIGURES = {
    "prefill, share of the ceiling": "prefill_share_of_ceiling",
    "whole answer, speedup": "end_to_end_speedup",
    "ratio 1 / stock": "overhead_at_ratio_one",
    "scoring and selection / pruned prefill": "scoring_and_selection_share",
}


def table(before: dict, after: dict) -> str:
    """Markdown: medians with their intervals.

    Raises:
        `ValueError`: where the results are of different points, devices or settings.
    """
    if other := [name for name in SAME if before[name] != after[name]]:
        raise ValueError(f"The results differ in {', '.join(other)}: measure the same point on the same machine.")
    sides = (before, after)
    lines = [f"| code | {' | '.join(side['code_sha256'][:12] for side in sides)} |", "|---|---|---|"]
    lines.append(f"| transformers | {' | '.join(side['versions']['transformers'] for side in sides)} |")
    for label, name in FIGURES.items():
        cells = ("{median:.3f} ({low:.3f}-{high:.3f})".format(**side["intervals"][name]) for side in sides)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    settings, confidence = before["settings"], before["intervals"]["overhead_at_ratio_one"]["confidence"]
    lines += ["", f"Medians of {settings['rounds']} rounds, in brackets the {100 * confidence:.0f} % interval."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs=2, metavar="FILE.json", help="before and after")
    parser.add_argument("--into", type=Path, help=f"Markdown file with the marks <!-- {MARK} -->")
    arguments = parser.parse_args(argv)
    try:
        text = table(*(read_result(path, speed=True) for path in arguments.results))
        if arguments.into:
            arguments.into.write_text(fill(arguments.into.read_text(), MARK, text))
        else:
            print(text)
    except (OSError, ValueError) as error:
        print(f"compare_speed: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
