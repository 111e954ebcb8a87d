"""Speed of pruning against the stock class: same process, same weights, same attention backend, in turn.

    python benchmarks/speed.py --preset cpu-small --batch 4 --ratio 0.0556 --new-tokens 8 --output FILE.json
    python benchmarks/speed.py --preset llava-1.5-7b --batch 1,4,16,32 --new-tokens 1,32 --output FOLDER

Lists make a sweep, one JSON file for each point, in a folder; a sweep that was killed goes on. Weights are random,
on the shapes of the published models: speed does not depend on values. Every time is wall clock, in seconds, of a
device that has finished; every figure is the median of the rounds, with an interval of order statistics
(speed_measure.summarise). A ratio of times is taken in each round, between neighbours, before the median.

    prefill             forward of the prompt, pixels included, to the logits of its last row
    decoder_prefill     the same without vision tower and projector: the prefill less their time in the same round
    time_to_first_token, decode_token, end_to_end       of `generate`, greedy
    prefill_speedup, end_to_end_speedup                 stock / pruned
    overhead_at_ratio_one                               `generate` at pruner_ratio=1.0 / of the stock class
    prefill_ceiling     Amdahl's: stock prefill / the stock parts of the same round: vision tower, projector and
                        embedding of all tokens, the stock decoder layers, each on as many rows as pruning leaves it,
                        norm and head. Scoring, selecting, dropping, masks and positions cost nothing there.
    end_to_end_ceiling  stock `generate` / the same, less what the stock layers save on fewer rows and keys: stock
                        prefill less those stock parts, and for each later token what one token saves in all layers
    scoring, selection  of both cuts, in place, in a run of its own with a clock around them
"""

import argparse
import json
import logging
import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

import learnpruner
from learnpruner.accounting import mean_tokens
from learnpruner.cli import Parser, positive, ratio
from learnpruner.cuts_learnpruner import learnpruner_schedule
from learnpruner.hub_cards.records import read_result, weights_digest

import speed_formulas
from speed_measure import (
    StockParts,
    TimedScore,
    cache_bytes,
    generation_times,
    interleave,
    peak_memory,
    prefill,
    summarise,
    timed,
)
from speed_presets import PRESETS, build_inputs, build_pair, check_fits, stock_model

BACKENDS = ("sdpa", "eager", "flash_attention_2", "flex_attention")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Significant digits of what is recorded.
DIGITS = 4


@dataclass(frozen=True)
class Point:
    """One measurement of a sweep. Tokens are those of one sample."""

    preset: str
    batch_size: int
    text_tokens: int
    new_tokens: int
    backend: str
    ratio: float

    @property
    def file(self) -> str:
        return (
            f"{self.preset}-batch{self.batch_size}-text{self.text_tokens}-new{self.new_tokens}-"
            f"ratio{self.ratio:.4g}-{self.backend}.json"
        )


class Measurement:
    """Everything that is measured of one point."""

    def __init__(self, stock: PreTrainedModel, pruned: PreTrainedModel, inputs: dict[str, torch.Tensor], point: Point):
        self.stock, self.pruned, self.inputs, self.point = stock, pruned, inputs, point
        self.device, config = stock.device, stock.config
        self.tokens = int((inputs["input_ids"][0] == config.image_token_id).sum())
        self.schedule = learnpruner_schedule(pruned.config, point.ratio)
        self.depth = config.text_config.num_hidden_layers
        self.spans = {
            name: speed_formulas.decoder_spans(schedule, self.tokens, point.text_tokens, self.depth)
            for name, schedule in (("stock", ()), ("pruned", self.schedule))
        }
        self.parts = StockParts(stock, inputs, self.spans["pruned"])

    def contestants(self) -> dict[str, Callable[[], dict[str, float]]]:
        """By name, what a round runs, in this order: what is set against another stands next to it."""
        new_tokens = self.point.new_tokens
        return {
            "stock": self._stock_prefill,
            "pruned": self._pruned_prefill,
            "parts": self.parts.times,
            "cuts": self._cut_times,
            "stock answer": lambda: generation_times(self.stock, self.inputs, new_tokens),
            "ratio one answer": lambda: generation_times(self.pruned, self.inputs, new_tokens, pruner_ratio=1.0),
            "pruned answer": lambda: generation_times(
                self.pruned, self.inputs, new_tokens, pruner_ratio=self.point.ratio
            ),
        }

    def _stock_prefill(self) -> dict[str, float]:
        seconds, outputs = timed(lambda: prefill(self.stock, self.inputs), self.device)
        token, _ = timed(lambda: self.parts.run_token(outputs.past_key_values), self.device)
        return {"prefill": seconds, "token": token}

    def _pruned_prefill(self) -> dict[str, float]:
        call = lambda: prefill(self.pruned, self.inputs, pruner_ratio=self.point.ratio)  # noqa: E731
        return {"prefill": timed(call, self.device)[0]}

    def _cut_times(self) -> dict[str, float]:
        cuts = tuple(replace(cut, score=TimedScore(cut.score, self.device)) for cut in self.schedule)
        prefill(self.pruned, self.inputs, schedule=cuts)
        return {part: sum(cut.score.seconds[part] for cut in cuts) for part in ("scoring", "selection")}

    def costs(self) -> dict:
        """Bytes and operations. Raises `RuntimeError` where the cache is not what the formula says."""
        config, batch, text = self.stock.config, self.point.batch_size, self.point.text_tokens
        grids = self.inputs["image_grid_thw"].tolist() if "image_grid_thw" in self.inputs else None
        vision = speed_formulas.vision_flops(config, self.inputs["pixel_values"].shape, grids)
        head = speed_formulas.head_flops(config, batch)
        width = self.pruned.model.encoder_width(self.pruned.config)
        cutting = speed_formulas.pruner_flops(self.pruned.config, self.schedule, width, self.tokens, text, batch)
        costs = {"kv_bytes": {}, "peak_memory_bytes": {}, "flops": {"vision": vision, "pruner": cutting}}
        for name, model, arguments in (
            ("stock", self.stock, {}),
            ("pruned", self.pruned, {"pruner_ratio": self.point.ratio}),
        ):
            spans = self.spans[name]
            held = cache_bytes(prefill(model, self.inputs, **arguments).past_key_values)
            formula = speed_formulas.kv_bytes(config, spans, batch, model.dtype)
            if held != formula:
                raise RuntimeError(f"The {name} cache holds {held} bytes, and the formula says {formula}.")
            costs["kv_bytes"][name] = held
            costs["peak_memory_bytes"][name] = peak_memory(
                lambda: generation_times(model, self.inputs, self.point.new_tokens, **arguments),  # noqa: B023
                self.device,
            )
            costs["flops"][name] = {
                "prefill": vision
                + speed_formulas.decoder_flops(config, spans, batch)
                + head
                + (cutting if name == "pruned" else 0),
                "decode_token": speed_formulas.decoder_flops(config, spans, batch, queries=1) + head,
            }
        return costs

    def about(self) -> dict:
        counts = speed_formulas.after_cuts(self.schedule, self.tokens)
        layers = tuple(cut.layer for cut in self.schedule)
        mean = mean_tokens(tuple(counts), layers, self.tokens, self.depth)
        return {"image": self.tokens, "after_cuts": counts, "cut_layers": list(layers), "mean": mean}


def figures(samples: dict[str, dict[str, list[float]]], new_tokens: int) -> dict:
    """What a point reports, from the seconds of each round.

    Args:
        samples: Of [`interleave`] over [`Measurement.contestants`].
    """
    each = [
        {name: {what: values[number] for what, values in times.items()} for name, times in samples.items()}
        for number in range(len(samples["stock"]["prefill"]))
    ]
    rounds = [_round(times, new_tokens) for times in each]
    ratios = {name: summarise([one[name] for one in rounds]) for name in rounds[0]}
    seconds = {name: {what: summarise(values) for what, values in times.items()} for name, times in samples.items()}
    for name in ("stock", "pruned"):
        without = [one[name]["prefill"] - one["parts"]["vision"] for one in each]
        seconds[name]["decoder_prefill"] = summarise(without)
    return {
        **{name: _digits(ratio["median"]) for name, ratio in ratios.items()},
        "intervals": _rounded(ratios),
        "seconds": _rounded(seconds),
        "samples": _rounded(samples),
    }


def _round(times: dict[str, dict[str, float]], new_tokens: int) -> dict[str, float]:
    """The ratios of one round."""
    stock, pruned, parts, cuts = (times[name] for name in ("stock", "pruned", "parts", "cuts"))
    answers = [times[f"{name} answer"]["end_to_end"] for name in ("stock", "pruned", "ratio one")]
    ideal = parts["vision"] + parts["embedding"] + parts["layers"] + parts["head"]
    saved = stock["prefill"] - ideal + (new_tokens - 1) * (stock["token"] - parts["token"])
    return {
        "prefill_speedup": stock["prefill"] / pruned["prefill"],
        "prefill_ceiling": stock["prefill"] / ideal,
        "prefill_share_of_ceiling": ideal / pruned["prefill"],
        "end_to_end_speedup": answers[0] / answers[1],
        "end_to_end_ceiling": answers[0] / (answers[0] - saved),
        "end_to_end_share_of_ceiling": (answers[0] - saved) / answers[1],
        "overhead_at_ratio_one": answers[2] / answers[0],
        "scoring_and_selection_share": (cuts["scoring"] + cuts["selection"]) / pruned["prefill"],
    }


def _digits(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _rounded(values):
    if isinstance(values, dict):
        return {name: _rounded(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return _digits(values)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    return f"{found[1] if found else platform.machine()}, {cores}"


def several(kind: Callable) -> Callable[[str], list]:
    """Comma-separated values of an argument."""

    def read(text: str) -> list:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))

    return read


def backend(text: str) -> str:
    if text not in BACKENDS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(BACKENDS)}")
    return text


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--batch", type=several(positive), default=[1], help="samples, of one image each")
    parser.add_argument("--text", type=several(positive), default=[64], help="text tokens of the prompt")
    parser.add_argument("--new-tokens", type=several(positive), default=[8], help="tokens of the answer")
    parser.add_argument("--ratio", type=several(ratio), default=[1 / 9], help="mean share of tokens kept")
    parser.add_argument("--backend", type=several(backend), default=["sdpa"], help=", ".join(BACKENDS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="by default bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--rounds", type=positive, default=9, help="that count; 6 make an interval of 95 %%")
    parser.add_argument("--warmup", type=positive, default=1, help="rounds before")
    parser.add_argument("--threads", type=positive, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--output", type=Path, required=True, help="a .json file, or a folder for a sweep")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    logging.getLogger("learnpruner").setLevel(logging.ERROR)  # that the pruner is untrained
    try:
        measure_all(arguments)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"speed: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


@torch.no_grad()
def measure_all(arguments: argparse.Namespace) -> None:
    grid = product(arguments.batch, arguments.text, arguments.new_tokens, arguments.backend, arguments.ratio)
    points = [Point(arguments.preset, *values) for values in grid]
    files = output_files(arguments.output, points)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, and torch finds no GPU: take --device cpu and a preset that fits it.")
    dtype = DTYPES[arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    preset = PRESETS[arguments.preset]
    config = preset.config()
    about = {
        "device": device_name(device),
        "rounds": arguments.rounds,
        "warmup": arguments.warmup,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": arguments.threads,
        "seed": arguments.seed,
    }
    missing = [(point, file) for point, file in zip(points, files) if not is_there(file, settings_of(point, about))]
    if not missing:
        return
    with torch.device("meta"):
        shapes = stock_model(config, dtype)
    for name in arguments.backend:
        shapes.set_attn_implementation(name)
    check_fits(shapes, device)
    files[0].parent.mkdir(parents=True, exist_ok=True)
    stock, pruned = build_pair(config, device, dtype, arguments.seed)
    digests = {"base_sha256": weights_digest(pruned), "pruner_sha256": weights_digest(pruned, pruner=True)}
    too_large = []
    for number, (point, file) in enumerate(missing, 1):
        for model in (stock, pruned):
            model.set_attn_implementation(point.backend)
        inputs = build_inputs(config, preset.image, point.batch_size, point.text_tokens, device, dtype)
        try:
            result = measure(stock, pruned, inputs, point, about, f"{number}/{len(missing)} {file.stem}")
        except torch.OutOfMemoryError:
            too_large.append(file.name)
            continue
        part = file.with_name(f"{file.name}.part")
        part.write_text(json.dumps({**result, **digests}, indent=1) + "\n")
        part.replace(file)
        shown = ("prefill_speedup", "prefill_ceiling", "end_to_end_speedup", "overhead_at_ratio_one")
        print(json.dumps({"output": str(file), **{name: result[name] for name in shown}}))
    if too_large:
        raise RuntimeError(f"{device} has too little memory for {', '.join(too_large)}: not measured.")


def output_files(output: Path, points: list[Point]) -> list[Path]:
    """A file for each point. Raises `ValueError` where `output` cannot hold them."""
    if output.suffix != ".json":
        return [output / point.file for point in points]
    if len(points) > 1:
        raise ValueError(f"{len(points)} points do not go into one file: --output takes a folder for them.")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder.")
    return [output]


def settings_of(point: Point, about: dict) -> dict[str, int | float | str]:
    settings = {name: value for name, value in {**asdict(point), **about}.items() if name not in ("ratio", "device")}
    return dict(sorted(settings.items()))


def is_there(file: Path, settings: dict) -> bool:
    """Whether a point was measured before. Raises `ValueError` where its file holds another one."""
    if not file.exists():
        return False
    found = read_result(file, speed=True)["settings"]
    other = sorted(name for name, value in settings.items() if found.get(name) != value)
    if other:
        raise ValueError(f"{file} holds a measurement with another {', '.join(other)}: give --output another place.")
    return True


def measure(
    stock: PreTrainedModel, pruned: PreTrainedModel, inputs: dict, point: Point, about: dict, label: str
) -> dict:
    """The record of one point, all but the weights' digests."""
    measurement = Measurement(stock, pruned, inputs, point)
    costs = measurement.costs()
    samples = interleave(measurement.contestants(), about["rounds"], about["warmup"], label)
    return {
        **figures(samples, point.new_tokens),
        **costs,
        "ratio": point.ratio,
        "tokens": measurement.about(),
        "device": about["device"],
        "settings": settings_of(point, about),
        "load_average": os.getloadavg()[0],
        "parameters": sum(weight.numel() for weight in stock.parameters()),
        "versions": {
            "learnpruner": learnpruner.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


if __name__ == "__main__":
    sys.exit(main())
