"""Table and plot from the JSON files of benchmarks/accuracy.py.

    python benchmarks/render_accuracy.py benchmarks/results/accuracy/*.json --into README.md --plot accuracy.png

`--into` fills the part of a Markdown file between `<!-- accuracy -->` and `<!-- /accuracy -->`, or between marks of
another name; without it the table is printed. Runs of one name at one budget that differ by their seed alone (of the
method's chance, or of the pruner's training) are one row: mean and, in brackets, the lowest and highest. Pruned runs
are set beside the unpruned run of the same model and questions among the files.
"""

import sys
import textwrap
from collections import defaultdict
from pathlib import Path

from learnpruner.hub_cards.recorded_counts import MARK, arrows, is_marked, note
from learnpruner.hub_cards.records import read_result, relative_accuracy
from learnpruner_commands.arguments import Parser

from asked import MISSING, STANDARD, Scenes

DIFFERENCE = "minus learnpruner"
# Of the points of two methods at one budget: their places on the axis are so many times apart.
BESIDE = 1.06
MARKERS = "osD^vP*X"
# Wrong answers at which the plot has a line, in percent.
WRONG = (1, 2, 5, 10, 20, 50, 100)


def group_runs(results: list[dict]) -> dict[tuple, list[dict]]:
    """Runs that differ by their seed alone, by (scenes, name, mean tokens); each has `relative_accuracy`, or `None`
    where the unpruned run is not among them.
    """
    unpruned = {(r["base_sha256"], r["level"], r["data"]): r for r in results if r["method"] == "none"}
    if len({r["base_sha256"] for r in results}) > 1:
        raise ValueError("The files are of several base models: render one model's at a time.")
    groups = defaultdict(list)
    for result in sorted(results, key=lambda r: (Scenes.of(r) != STANDARD, -r["tokens"]["mean"], r["name"])):
        base = unpruned.get((result["base_sha256"], result["level"], result["data"]))
        relative = relative_accuracy(result, base) if base else None
        groups[str(Scenes.of(result)), result["name"], result["tokens"]["mean"]].append(
            {**result, "relative_accuracy": relative}
        )
    for (scenes, name, mean), runs in groups.items():
        what = f"runs of {name} on {scenes} scenes at {mean:.1f} tokens"
        if len({(run["data"], run["method"]) for run in runs}) > 1:
            raise ValueError(f"The {what} are of several sets of questions, or of several methods: render one's.")
        if len({run["seed"] for run in runs}) < len(runs):
            raise ValueError(f"Two {what} have the same seed.")
        if runs[0]["pruner_sha256"] and len({run["pruner_sha256"] for run in runs}) < len(runs):
            raise ValueError(f"Two {what} are of one pruner: the seed makes no difference.")
    return dict(groups)


def spread(values: list[float | None]) -> str:
    if None in values:
        return MISSING
    mean = f"{100 * sum(values) / len(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.1f}-{100 * max(values):.1f})"


def _left(run: dict) -> tuple[float, float]:
    """Objects of which any token is left after the last cut, and foreground recall after the first."""
    return run["tokens"]["objects_seen"][-1], run["tokens"]["foreground_recall"][0]


def table(groups: dict[tuple, list[dict]]) -> str:
    """Markdown, in percent. "Boxes kept" is foreground recall: the share of the patches in objects' boxes. Rows whose
    cuts are not those that the method makes today are marked. Runs may bring their row's `difference`."""
    kinds = sorted({kind for runs in groups.values() for run in runs for kind in run["by_kind"]})
    head = [
        "scenes",
        "method",
        "mean tokens",
        "after each cut",
        "runs",
        "accuracy",
        "RelAcc",
        *kinds,
        "objects seen",
        "boxes kept by cut 1",
    ]
    compared = any("difference" in run for runs in groups.values() for run in runs)
    if compared:
        head.insert(head.index("RelAcc"), DIFFERENCE)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (scenes, name, mean), runs in groups.items():
        cuts = arrows(runs[0]["tokens"]["after_cuts"]) or "none"
        mark = f" {MARK}" if any(map(is_marked, runs)) else ""
        cells = [scenes, name, f"{mean:.1f}", f"{cuts}{mark}", str(len(runs))]
        cells.append(spread([run["accuracy"] for run in runs]))
        cells += [runs[0]["difference"]] if compared else []
        cells.append(spread([run["relative_accuracy"] for run in runs]))
        cells += [spread([run["by_kind"][kind]["accuracy"] for run in runs]) for kind in kinds]
        for values in ([], []) if cuts == "none" else zip(*(_left(run) for run in runs)):
            cells.append(spread(values) if values else "")
        lines.append("| " + " | ".join(cells) + " |")
    questions = sorted({run["n"] for runs in groups.values() for run in runs})
    versions = sorted({f"transformers {r['versions']['transformers']}" for runs in groups.values() for r in runs})
    lines += ["", f"Percent; {' or '.join(map(str, questions))} test questions a run; {', '.join(versions)}."]
    if explained := note(run for runs in groups.values() for run in runs):
        lines += ["", explained]
    return "\n".join(lines)


def save_plot(groups: dict[tuple, list[dict]], path: Path) -> None:
    """Wrong answers against mean tokens, both on log axes, so that methods that are nearly always right are told apart:
    a panel for each set of scenes, a line for each method. Error bars are the lowest and highest run, and each method
    stands a little beside the others. Points whose cuts are not those that the method makes today are marked, and a
    caption says what changed."""
    from matplotlib import pyplot

    panels = list(dict.fromkeys(scenes for scenes, _, _ in groups))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6.5 * len(panels), 5), sharey=True, squeeze=False)
    for axis, panel in zip(axes[0], panels):
        methods = list(dict.fromkeys(method for place, method, _ in groups if place == panel))
        drawn = [method for method in methods if method != "none"]
        for method in methods:
            points = sorted(
                (mean, [100 - 100 * run["accuracy"] for run in runs], any(map(is_marked, runs)))
                for (place, name, mean), runs in groups.items()
                if (place, name) == (panel, method)
            )
            if method == "none":
                axis.axhline(sum(points[0][1]) / len(points[0][1]), color="black", linestyle=":", label="unpruned")
                continue
            number = drawn.index(method)
            places = [mean * BESIDE ** (number - (len(drawn) - 1) / 2) for mean, _, _ in points]
            means = [sum(values) / len(values) for _, values, _ in points]
            low = [mean - min(values) for mean, (_, values, _) in zip(means, points)]
            high = [max(values) - mean for mean, (_, values, _) in zip(means, points)]
            marker = MARKERS[number % len(MARKERS)]
            line = axis.errorbar(places, means, yerr=[low, high], marker=marker, markersize=5, capsize=3, label=method)
            for x, mean, (_, _, marked) in zip(places, means, points):
                if marked:
                    mark_point(axis, x, mean, line.lines[0].get_color())
        axis.set(title=f"{panel} scenes", xlabel="vision tokens, mean over the decoder's layers", xscale="log")
        axis.set_yscale("log", nonpositive="clip")
        ticks = sorted({round(mean) for place, _, mean in groups if place == panel})
        axis.set_xticks(ticks, ticks)
        axis.set_yticks(WRONG, WRONG)
        axis.set_xlim(0.7 * min(round(mean) for _, _, mean in groups), 1.2 * max(mean for _, _, mean in groups))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0][0].set_ylabel("wrong answers, % (exact match)")
    figure.tight_layout()
    explain_marks(figure, [run for runs in groups.values() for run in runs])
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def mark_point(axis, x: float, y: float, color: str) -> None:
    """Marks a point of a plot, in its line's colour, as measured with other cuts than today's."""
    axis.annotate(MARK, (x, y), xytext=(4, -14), textcoords="offset points", color=color)


def explain_marks(figure, results: list[dict]) -> None:
    """Writes below a figure what the marks in it mean, where it has any. To be saved with `bbox_inches="tight"`."""
    width = round(16 * figure.get_figwidth())
    figure.text(0.5, 0, textwrap.fill(note(results), width), ha="center", va="top", fontsize=7)


def fill(page: str, mark: str, text: str) -> str:
    """The page with `text` between the two comments of a mark. Raises `ValueError` where they are not there."""
    opening, closing = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, start, rest = page.partition(opening)
    _, end, after = rest.partition(closing)
    if not start or not end:
        raise ValueError(f"The page has no {opening} ... {closing} to fill.")
    return f"{before}{opening}\n{text}\n{closing}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of benchmarks/accuracy.py")
    parser.add_argument("--into", type=Path, help="Markdown file with the two marks")
    parser.add_argument("--mark", default="accuracy", help="name of the marks")
    parser.add_argument("--plot", type=Path, help="PNG")
    arguments = parser.parse_args(argv)
    try:
        groups = group_runs([read_result(path) for path in arguments.results])
        text = table(groups)
        if arguments.into:
            arguments.into.write_text(fill(arguments.into.read_text(), arguments.mark, text))
        else:
            print(text)
        if arguments.plot:
            save_plot(groups, arguments.plot)
    except (OSError, ValueError, ImportError) as error:
        print(f"render_accuracy: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
