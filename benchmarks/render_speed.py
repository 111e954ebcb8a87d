"""Tables and plot from the JSON files of benchmarks/speed.py.

    python benchmarks/render_speed.py benchmarks/results/speed --into benchmarks/SPEED.md --plot FILE.png

`--into` fills the parts of a Markdown file between `<!-- speed -->` and `<!-- /speed -->`, and those called `bars`,
`costs` and `growth`; without it they are printed. A preset or a bar without a result is a row that says so.
"""

import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy

from learnpruner.cli import Parser
from learnpruner.hub_cards.records import read_result

from render_accuracy import MISSING, fill
from speed_presets import PRESETS

SETTINGS = ("preset", "batch_size", "text_tokens", "new_tokens", "backend")
SHOWN = ("preset", "batch", "text", "answer", "backend", "tokens kept")


CPU, GPU = "", "H100|H200"


@dataclass(frozen=True)
class Bar:
    """What a figure is to reach, on average tokens kept, at a batch of so many or more and an answer of so many tokens
    or fewer. Where several results are of this kind, the worst counts.

    Attributes:
        device (`str`): Regular expression of its name.
    """

    preset: str
    tokens: int
    image: int
    batch: int
    answer: int
    device: str
    figure: str
    at_least: float | None = None
    at_most: float | None = None

    def holds(self, value: float) -> bool:
        return value >= self.at_least if self.at_most is None else value <= self.at_most

    def worst(self, results: list[dict]) -> dict | None:
        """The result with the worst figure."""
        found = [result for result in results if self._fits(result)]
        return (min if self.at_most is None else max)(found, key=lambda result: result[self.figure], default=None)

    def _fits(self, result: dict) -> bool:
        settings, tokens = result["settings"], result["tokens"]
        return (
            settings["preset"] == self.preset
            and (round(tokens["mean"]), tokens["image"]) == (self.tokens, self.image)
            and settings["batch_size"] >= self.batch
            and settings["new_tokens"] <= self.answer
            and re.search(self.device, result["device"]) is not None
        )

    @property
    def cells(self) -> list[str]:
        more = " or more" if self.device == GPU else ""
        wanted = f">= {self.at_least:g}" if self.at_most is None else f"<= {self.at_most:g}"
        place = f"{self.preset}, {self.tokens} of {self.image} tokens, batch {self.batch}{more}"
        return [place, f"{self.figure} {wanted}"]


SMALL = ("cpu-small", 32, 576, 4, 8, CPU)
NEXT = ("llava-next-7b", 160, 2928, 8, 2, GPU)
LLAVA = ("llava-1.5-7b", 32, 576, 8, 2, GPU)
BARS = (
    Bar(*SMALL, "prefill_share_of_ceiling", at_least=0.9),
    Bar(*SMALL, "overhead_at_ratio_one", at_most=1.01),
    Bar(*SMALL, "scoring_and_selection_share", at_most=0.02),
    Bar(*NEXT, "prefill_speedup", at_least=6),
    Bar(*NEXT, "end_to_end_speedup", at_least=3.2),
    Bar(*LLAVA, "prefill_speedup", at_least=2.3),
    Bar(*LLAVA, "end_to_end_speedup", at_least=1.5),
    Bar("qwen2.5-vl-7b-4k", 450, 4096, 8, 2, GPU, "end_to_end_speedup", at_least=1.34),
)


def bar_table(results: list[dict]) -> str:
    rows = []
    for bar in BARS:
        result, verdict = bar.worst(results), [MISSING, ""]
        if result is not None:
            met = bar.holds(result[bar.figure])
            verdict = [_interval(result, bar.figure, digits=4), "met" if met else "missed"]
        rows.append([*bar.cells, *verdict])
    return _table(["of", "bar", "measured", ""], rows)


def read_folder(folder: Path) -> list[dict]:
    """All results in a folder and those below, in the order of the presets. Raises `ValueError` where a file is none,
    or of no known preset."""
    results = [read_result(path, speed=True) for path in sorted(folder.rglob("*.json"))]
    unknown = {result["settings"]["preset"] for result in results} - set(PRESETS)
    if unknown:
        raise ValueError(f"{folder} has results of presets that are not there: {', '.join(sorted(unknown))}.")
    order = list(PRESETS)
    return sorted(
        results,
        key=lambda r: (r["device"], order.index(r["settings"]["preset"]), *_settings(r)[1:4], r["ratio"]),
    )


def _settings(result: dict) -> tuple:
    return tuple(result["settings"][name] for name in SETTINGS)


def _first_cells(result: dict) -> list[str]:
    tokens = result["tokens"]
    return [*map(str, _settings(result)), f"{tokens['mean']:.0f} of {tokens['image']}"]


def _interval(result: dict, name: str, digits: int = 2) -> str:
    interval = result["intervals"][name]
    return f"{result[name]:.{digits}f} ({interval['low']:.{digits}f}-{interval['high']:.{digits}f})"


def _seconds(result: dict, who: str, what: str) -> str:
    times = result["seconds"][who]
    return f"{1000 * times[what]['median']:.0f}" if what in times else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _with_missing(rows: list[list[str]], results: list[dict], width: int) -> list[list[str]]:
    measured = {result["settings"]["preset"] for result in results}
    return rows + [[name, MISSING, *[""] * (width - 2)] for name in PRESETS if name not in measured]


def speed_table(results: list[dict]) -> str:
    """Times in milliseconds, stock -> pruned; ratios with their interval."""
    head = [
        *SHOWN,
        "prefill, ms",
        "prefill speedup",
        "ceiling",
        "share of it reached",
        "first token, ms",
        "per token, ms",
        "end-to-end speedup",
        "ceiling",
        "ratio 1 / stock",
        "scoring and selection / prefill",
    ]
    rows = []
    for result in results:
        cells = _first_cells(result)
        arrow = " -> ".join
        cells.append(arrow(_seconds(result, who, "prefill") for who in ("stock", "pruned")))
        cells += [_interval(result, "prefill_speedup"), f"{result['prefill_ceiling']:.2f}"]
        cells.append(_interval(result, "prefill_share_of_ceiling", 3))
        for what in ("time_to_first_token", "decode_token"):
            cells.append(arrow(filter(None, (_seconds(result, f"{who} answer", what) for who in ("stock", "pruned")))))
        cells += [_interval(result, "end_to_end_speedup"), f"{result['end_to_end_ceiling']:.2f}"]
        cells += [_interval(result, "overhead_at_ratio_one", 3), f"{result['scoring_and_selection_share']:.4f}"]
        rows.append(cells)
    notes = sorted({_conditions(result) for result in results})
    return "\n".join([_table(head, _with_missing(rows, results, len(head))), "", *notes])


def _conditions(result: dict) -> str:
    settings, confidence = result["settings"], result["intervals"]["prefill_speedup"]["confidence"]
    return (
        f"{result['device']}, {settings['dtype']}, {settings['rounds']} rounds, in brackets intervals of "
        f"{100 * confidence:.1f} % confidence; torch {result['versions']['torch']}, transformers "
        f"{result['versions']['transformers']}."
    )


def cost_table(results: list[dict]) -> str:
    """Stock -> pruned: parts of the prefill, bytes and operations."""
    head = [*SHOWN, "vision, ms", "the rest, ms", "cache, MB", "peak memory, MB", "prefill, TFLOP", "token, GFLOP"]
    rows = []
    for result in results:
        cells = [*_first_cells(result), _seconds(result, "parts", "vision")]
        both = ("stock", "pruned")
        cells.append(" -> ".join(_seconds(result, who, "decoder_prefill") for who in both))
        cells.append(" -> ".join(f"{result['kv_bytes'][who] / 1e6:.1f}" for who in both))
        peaks = [result["peak_memory_bytes"][who] for who in both]
        cells.append(MISSING if None in peaks else " -> ".join(f"{peak / 1e6:.0f}" for peak in peaks))
        cells.append(" -> ".join(f"{result['flops'][who]['prefill'] / 1e12:.2f}" for who in both))
        cells.append(" -> ".join(f"{result['flops'][who]['decode_token'] / 1e9:.1f}" for who in both))
        rows.append(cells)
    return _table(head, _with_missing(rows, results, len(head)))


def sweeps(results: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """(mean tokens kept, milliseconds of the pruned prefill) of results whose prompts differ by their ratio alone,
    where there are three ratios or more."""
    groups = defaultdict(list)
    for result in results:
        preset, batch, text, _, backend = _settings(result)
        place = f"{preset}, batch {batch}, {text} text tokens, {backend}, {result['device']}"
        seconds = result["seconds"]["pruned"]["prefill"]["median"]
        groups[place].append((result["tokens"]["mean"], 1000 * seconds))
    return {place: sorted(points) for place, points in groups.items() if len({tokens for tokens, _ in points}) > 2}


def fit(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Least squares: milliseconds per token, milliseconds at none, and the share of the variance explained (R2)."""
    tokens, times = numpy.array(points).T
    slope, start = numpy.polyfit(tokens, times, 1)
    left = times - (slope * tokens + start)
    return slope, start, 1 - (left**2).sum() / ((times - times.mean()) ** 2).sum()


def growth_table(results: list[dict]) -> str:
    rows = []
    for place, points in sweeps(results).items():
        slope, start, explained = fit(points)
        measured = ", ".join(f"{time:.0f} at {tokens:.0f}" for tokens, time in points)
        rows.append([place, measured, f"{start:.0f} + {slope:.2f} x tokens", f"{explained:.4f}"])
    return _table(["prefill", "ms at mean tokens kept", "fitted line, ms", "R2"], rows) if rows else MISSING


def save_plot(results: list[dict], path: Path) -> None:
    """Prefill against mean tokens kept, with the fitted line."""
    from matplotlib import pyplot

    found = sweeps(results)
    if not found:
        raise ValueError("No three results differ by their ratio alone: there is no line to plot.")
    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    for place, points in found.items():
        tokens, times = zip(*points)
        slope, start, _ = fit(points)
        (marks,) = axis.plot(tokens, times, "o", label=place)
        ends = (0, max(tokens))
        axis.plot(ends, [start + slope * end for end in ends], color=marks.get_color(), linewidth=1)
    axis.set(xlabel="vision tokens kept, mean over the decoder's layers", ylabel="prefill, ms", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder of JSON files of benchmarks/speed.py")
    parser.add_argument("--into", type=Path, help="Markdown file with the marks")
    parser.add_argument("--plot", type=Path, help="PNG")
    arguments = parser.parse_args(argv)
    try:
        if not arguments.results.is_dir():
            raise ValueError(f"{arguments.results} is no folder.")
        results = read_folder(arguments.results)
        tables = {
            "bars": bar_table(results),
            "speed": speed_table(results),
            "costs": cost_table(results),
            "growth": growth_table(results),
        }
        if arguments.into:
            page = arguments.into.read_text()
            for mark, text in tables.items():
                page = fill(page, mark, text)
            arguments.into.write_text(page)
        else:
            print("\n\n".join(tables.values()))
        if arguments.plot:
            save_plot(results, arguments.plot)
    except (ImportError, OSError, ValueError) as error:
        print(f"render_speed: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
