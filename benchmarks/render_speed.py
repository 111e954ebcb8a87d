"""Tables and plot from the JSON files of benchmarks/speed.py.

    python benchmarks/render_speed.py benchmarks/results/speed --into benchmarks/SPEED.md --plot FILE.png

`--into` fills the parts of a Markdown file between `<!-- speed -->` and `<!-- /speed -->`, and those called `bars`,
`costs` and `growth`; without it they are printed. A preset or a bar without a result is a row that says so, and what
was measured with other counts than today's formula gives is marked.
"""

import re
import sys
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy

from learnpruner.hub_cards.recorded_counts import MARK, is_marked, note
from learnpruner.hub_cards.records import read_result
from learnpruner_commands.arguments import Parser

from render_accuracy import MISSING, explain_marks, fill, mark_point
from speed_measure import CONFIDENCE
from speed_presets import PRESETS

SETTINGS = ("preset", "batch_size", "text_tokens", "new_tokens", "backend")
SHOWN = ("preset", "batch", "text", "answer", "backend", "tokens kept")


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What a figure is to reach, with prompts of 64 text tokens and an interval of 95 % confidence or more. Where
    several results are of this kind, the worst median counts.

    Attributes:
        tokens, image (`int`): Mean tokens kept, of how many.
        batch (`int`): Samples; that many or more where `more` is set.
        answer (`int`): Tokens of the answer, or fewer.
        device_type (`str`): As the result has it.
        device (`str`, *optional*): Regular expression of the device's name. Defaults to any.
        backend (`str`, *optional*): Of attention. Defaults to any, and the result says which.
    """

    preset: str
    tokens: int
    image: int
    figure: str
    at_least: float | None = None
    at_most: float | None = None
    batch: int
    more: bool = False
    answer: int
    device_type: str
    device: str = ""
    dtype: str
    backend: str | None = None

    def verdict(self, interval: dict) -> str:
        """`met` where the unfavourable end of the interval meets the bar, too."""
        if not self._holds(interval["median"]):
            return "missed"
        unfavourable = interval["low"] if self.at_most is None else interval["high"]
        return "met" if self._holds(unfavourable) else "met by the median"

    def _holds(self, value: float) -> bool:
        return value >= self.at_least if self.at_most is None else value <= self.at_most

    def worst(self, results: list[dict]) -> dict | None:
        """The result with the worst median."""
        found = [result for result in results if self._fits(result)]
        median = lambda result: result["intervals"][self.figure]["median"]  # noqa: E731
        return (min if self.at_most is None else max)(found, key=median, default=None)

    def _fits(self, result: dict) -> bool:
        settings, tokens, batch = result["settings"], result["tokens"], result["settings"]["batch_size"]
        return (
            (settings["preset"], settings["dtype"], settings["text_tokens"]) == (self.preset, self.dtype, TEXT)
            and (round(tokens["mean"]), tokens["image"]) == (self.tokens, self.image)
            and (batch >= self.batch if self.more else batch == self.batch)
            and settings["new_tokens"] <= self.answer
            and self.backend in (None, settings["backend"])
            and result["device_type"] == self.device_type
            and re.search(self.device, result["device"]) is not None
            and result["intervals"][self.figure]["confidence"] >= CONFIDENCE
        )

    @property
    def cells(self) -> list[str]:
        more = " or more" if self.more else ""
        wanted = f">= {self.at_least:g}" if self.at_most is None else f"<= {self.at_most:g}"
        backend = f", {self.backend}" if self.backend else ""
        place = f"{self.preset}, {self.tokens} of {self.image} tokens, batch {self.batch}{more}, {self.dtype}{backend}"
        return [place, f"{self.figure} {wanted}"]


# Text tokens of a bar's prompt.
TEXT = 64
CPU = {"device_type": "cpu", "dtype": "float32", "backend": "sdpa"}
SMALL = {"preset": "cpu-small", "tokens": 32, "image": 576, "batch": 4, "answer": 8, **CPU}
HOPPER = {"device_type": "cuda", "device": "H100|H200", "dtype": "bfloat16"}
GPU = {"batch": 8, "more": True, "answer": 2, **HOPPER}
NEXT = {"preset": "llava-next-7b", "tokens": 160, "image": 2928, **GPU}
LLAVA = {"preset": "llava-1.5-7b", "tokens": 32, "image": 576, **GPU}
QWEN = {"preset": "qwen2.5-vl-7b-4k", "tokens": 450, "image": 4096, **GPU}
BARS = (
    Bar(**SMALL, figure="prefill_share_of_ceiling", at_least=0.9),
    Bar(**SMALL, figure="overhead_at_ratio_one", at_most=1.01),
    Bar(**SMALL, figure="scoring_and_selection_share", at_most=0.02),
    Bar(**NEXT, figure="prefill_speedup", at_least=6),
    Bar(**NEXT, figure="end_to_end_speedup", at_least=3.2),
    Bar(**LLAVA, figure="prefill_speedup", at_least=2.3),
    Bar(**LLAVA, figure="end_to_end_speedup", at_least=1.5),
    Bar(**QWEN, figure="end_to_end_speedup", at_least=1.34),
)


def bar_table(results: list[dict]) -> str:
    rows = []
    for bar in BARS:
        result, verdict = bar.worst(results), [MISSING, ""]
        if result is not None:
            settings = result["settings"]
            place = "" if bar.backend else f", batch {settings['batch_size']}, {settings['backend']}"
            measured = f"{_interval(result, bar.figure, digits=4)}{place}{_mark(result)}"
            verdict = [measured, bar.verdict(result["intervals"][bar.figure])]
        rows.append([*bar.cells, *verdict])
    return _explained(_table(["of", "bar", "measured", ""], rows), results)


def read_folder(folder: Path) -> list[dict]:
    """All results in a folder and those below, in the order of the presets. Raises `ValueError` where a file is none,
    is of no known preset, or of the same point as another."""
    files = {path: read_result(path, speed=True) for path in sorted(folder.rglob("*.json"))}
    unknown = {result["settings"]["preset"] for result in files.values()} - set(PRESETS)
    if unknown:
        raise ValueError(f"{folder} has results of presets that are not there: {', '.join(sorted(unknown))}.")
    first = {}
    for path, result in files.items():
        point = (frozenset(result["settings"].items()), result["ratio"], result["device"])
        if point in first:
            raise ValueError(f"{first[point]} and {path} are of one point on one device: remove one.")
        first[point] = path
    order = list(PRESETS)
    return sorted(
        files.values(),
        key=lambda r: (r["device"], order.index(r["settings"]["preset"]), *_settings(r)[1:4], r["ratio"]),
    )


def _settings(result: dict) -> tuple:
    return tuple(result["settings"][name] for name in SETTINGS)


def _first_cells(result: dict) -> list[str]:
    tokens = result["tokens"]
    return [*map(str, _settings(result)), f"{tokens['mean']:.0f} of {tokens['image']}{_mark(result)}"]


def _mark(result: dict) -> str:
    return f" {MARK}" if is_marked(result) else ""


def _explained(table: str, results: list[dict]) -> str:
    """The table, and what the mark means where it has one."""
    explained = note(results) if MARK in table else ""
    return f"{table}\n\n{explained}" if explained else table


def _interval(result: dict, name: str, digits: int = 2) -> str:
    """Blank where the result has no such figure: with one new token nothing is decoded."""
    interval = result["intervals"].get(name)
    if interval is None:
        return ""
    return f"{interval['median']:.{digits}f} ({interval['low']:.{digits}f}-{interval['high']:.{digits}f})"


def _median(result: dict, name: str, digits: int = 2) -> str:
    return f"{result['intervals'][name]['median']:.{digits}f}" if name in result["intervals"] else ""


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
        "decode speedup",
        "end-to-end speedup",
        "ceiling",
        "ratio 1 / stock",
        "the same of first token, later ones",
        "scoring and selection / prefill",
    ]
    rows = []
    for result in results:
        cells = _first_cells(result)
        arrow = " -> ".join
        cells.append(arrow(_seconds(result, who, "prefill") for who in ("stock", "pruned")))
        cells += [_interval(result, "prefill_speedup"), _median(result, "prefill_ceiling")]
        cells.append(_interval(result, "prefill_share_of_ceiling", 3))
        for what in ("time_to_first_token", "decode_token"):
            cells.append(arrow(filter(None, (_seconds(result, f"{who} answer", what) for who in ("stock", "pruned")))))
        cells.append(_interval(result, "decode_speedup"))
        cells += [_interval(result, "end_to_end_speedup"), _interval(result, "end_to_end_ceiling")]
        cells.append(_interval(result, "overhead_at_ratio_one", 3))
        overheads = (_median(result, f"{part}_overhead_at_ratio_one", 3) for part in ("prefill", "decode"))
        cells += [", ".join(filter(None, overheads)), _median(result, "scoring_and_selection_share", 4)]
        rows.append(cells)
    table = _explained(_table(head, _with_missing(rows, results, len(head))), results)
    return "\n".join([table, "", *_conditions(results)])


def _conditions(results: list[dict]) -> list[str]:
    """A line for each set of conditions, with the load that its results were taken under."""
    loads = defaultdict(list)
    for result in results:
        settings, confidence = result["settings"], result["intervals"]["prefill_speedup"]["confidence"]
        line = (
            f"{result['device']}, {settings['dtype']}, {settings['rounds']} rounds, in brackets intervals of "
            f"{100 * confidence:.1f} % confidence; torch {result['versions']['torch']}, transformers "
            f"{result['versions']['transformers']}, code {result['code_sha256'][:8]}; load average before each point"
        )
        loads[line].append(result["conditions"]["load_average"])
    return [f"{line} {min(found):.2f} to {max(found):.2f}." for line, found in sorted(loads.items())]


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
    return _explained(_table(head, _with_missing(rows, results, len(head))), results)


def sweeps(results: list[dict]) -> list[tuple[str, list[tuple[float, float]], list[float]]]:
    """What is the same in all of them, (mean tokens kept, milliseconds of the pruned prefill), and milliseconds of the
    stock prefill beside them: of results that differ by their ratio and the answer's length alone, where there are
    three ratios or more."""
    groups = defaultdict(list)
    for result in results:
        fixed = {name: value for name, value in result["settings"].items() if name != "new_tokens"}
        versions = frozenset(result["versions"].items())
        alike = (frozenset(fixed.items()), versions, result["device"], result["code_sha256"])
        groups[alike].append(result)
    found = []
    for group in groups.values():
        stock, pruned = (
            [1000 * result["seconds"][who]["prefill"]["median"] for result in group] for who in ("stock", "pruned")
        )
        points = sorted(zip([result["tokens"]["mean"] for result in group], pruned))
        if len({tokens for tokens, _ in points}) > 2:
            found.append((_place(group[0]), points, stock))
    return found


def _place(result: dict) -> str:
    preset, batch, text, _, backend = _settings(result)
    versions = result["versions"]
    return (
        f"{preset}, batch {batch}, {text} text tokens, {backend}, {result['settings']['dtype']}, {result['device']}, "
        f"torch {versions['torch']}, transformers {versions['transformers']}"
    )


def fit(points: list[tuple[float, float]]) -> tuple[float, float, float | None]:
    """Least squares: milliseconds per token, milliseconds at none, and the share of the variance explained (R2), which
    is `None` where there is no variance."""
    tokens, times = numpy.array(points).T
    slope, start = numpy.polyfit(tokens, times, 1)
    left = times - (slope * tokens + start)
    varies = times.max() > times.min()
    return slope, start, 1 - (left**2).sum() / ((times - times.mean()) ** 2).sum() if varies else None


def marks_by_tokens(results: list[dict]) -> dict[float, str]:
    """The mark of the results that kept so many tokens in the mean, or nothing."""
    return {result["tokens"]["mean"]: _mark(result) for result in results}


def growth_table(results: list[dict]) -> str:
    rows, marks = [], marks_by_tokens(results)
    for place, points, stock in sweeps(results):
        slope, start, explained = fit(points)
        measured = ", ".join(f"{time:.0f} at {tokens:.0f}{marks[tokens]}" for tokens, time in points)
        line = f"{start:.0f} + {slope:.2f} x tokens"
        beside = f"{min(stock):.0f} to {max(stock):.0f}"
        rows.append([place, measured, line, "" if explained is None else f"{explained:.4f}", beside])
    head = ["prefill", "ms at mean tokens kept", "fitted line, ms", "R2", "stock beside them, ms"]
    return _explained(_table(head, rows), results) if rows else MISSING


def save_plot(results: list[dict], path: Path) -> None:
    """Prefill against mean tokens kept, with the fitted line. Points whose counts are not those of today's formula are
    marked, and a caption says what changed."""
    from matplotlib import pyplot

    found = sweeps(results)
    if not found:
        raise ValueError("No three results differ by their ratio alone: there is no line to plot.")
    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    marks = marks_by_tokens(results)
    for place, points, _ in found:
        tokens, times = zip(*points)
        slope, start, _ = fit(points)
        (dots,) = axis.plot(tokens, times, "o", label=textwrap.fill(place, 60))
        for x, y in points:
            if marks[x]:
                mark_point(axis, x, y, dots.get_color())
        ends = (0, max(tokens))
        axis.plot(ends, [start + slope * end for end in ends], color=dots.get_color(), linewidth=1)
    axis.set(xlabel="vision tokens kept, mean over the decoder's layers", ylabel="prefill, ms", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.tight_layout()
    shown = {tokens for _, points, _ in found for tokens, _ in points}
    explain_marks(figure, [result for result in results if result["tokens"]["mean"] in shown])
    figure.savefig(path, dpi=110, bbox_inches="tight")
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
