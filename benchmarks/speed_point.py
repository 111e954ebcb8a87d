"""One point of benchmarks/speed.py: what it runs, what it costs, and the figures that come of it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PreTrainedModel

from learnpruner.accounting import mean_tokens
from learnpruner.compat_learnpruner import CACHE
from learnpruner.cuts_learnpruner import learnpruner_schedule

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
from speed_presets import build_inputs

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
        self.models = {"stock": (stock, {}), "pruned": (pruned, {"pruner_ratio": point.ratio})}
        self.parts = StockParts(stock, inputs, self.spans["pruned"])

    def contestants(self) -> dict[str, Callable[[], dict[str, float]]]:
        """By name, what a round runs, in this order: prefills that are compared stand together, as answers do."""
        new_tokens = self.point.new_tokens
        return {
            "stock": self._stock_prefill,
            "pruned": self._pruned_prefill,
            "ideal": self._ideal_prefill,
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
        token, _ = timed(lambda: self.parts.run_token(outputs[CACHE]), self.device)
        return {"prefill": seconds, "token": token}

    def _pruned_prefill(self) -> dict[str, float]:
        call = lambda: prefill(self.pruned, self.inputs, pruner_ratio=self.point.ratio)  # noqa: E731
        return {"prefill": timed(call, self.device)[0]}

    def _ideal_prefill(self) -> dict[str, float]:
        return {"prefill": timed(self.parts.prefill, self.device)[0]}

    def _cut_times(self) -> dict[str, float]:
        cuts = tuple(replace(cut, score=TimedScore(cut.score, self.device)) for cut in self.schedule)
        prefill(self.pruned, self.inputs, schedule=cuts)
        return {part: sum(cut.score.seconds[part] for cut in cuts) for part in ("scoring", "selection")}

    def costs(self) -> dict:
        """Bytes and operations, of the stock model and of the pruned one."""
        return {"kv_bytes": self._kv_bytes(), "peak_memory_bytes": self._peak_memory(), "flops": self._flops()}

    def _kv_bytes(self) -> dict[str, int]:
        """Measured. Raises `RuntimeError` where a cache is not what the formula says."""
        measured = {}
        for name, (model, arguments) in self.models.items():
            held = cache_bytes(prefill(model, self.inputs, **arguments)[CACHE])
            formula = speed_formulas.kv_bytes(model.config, self.spans[name], self.point.batch_size, model.dtype)
            if held != formula:
                raise RuntimeError(f"The {name} cache holds {held} bytes, and the formula says {formula}.")
            measured[name] = held
        return measured

    def _peak_memory(self) -> dict[str, int | None]:
        """Of one answer of each, after one that does not count: what is allocated at first use falls on nobody."""
        calls = {
            name: partial(generation_times, model, self.inputs, self.point.new_tokens, **arguments)
            for name, (model, arguments) in self.models.items()
        }
        for call in calls.values():
            call()
        return {name: peak_memory(call, self.device) for name, call in calls.items()}

    def _flops(self) -> dict:
        config, batch, text = self.stock.config, self.point.batch_size, self.point.text_tokens
        grids = self.inputs["image_grid_thw"].tolist() if "image_grid_thw" in self.inputs else None
        vision = speed_formulas.vision_flops(config, self.inputs["pixel_values"].shape, grids)
        head = speed_formulas.head_flops(config, batch)
        width = self.pruned.model.encoder_width(self.pruned.config)
        cutting = speed_formulas.pruner_flops(self.pruned.config, self.schedule, width, self.tokens, text, batch)
        flops = {"vision": vision, "pruner": cutting}
        for name, spans in self.spans.items():
            layers = speed_formulas.decoder_flops(config, spans, batch)
            flops[name] = {
                "prefill": vision + layers + head + (cutting if name == "pruned" else 0),
                "decode_token": speed_formulas.decoder_flops(config, spans, batch, queries=1) + head,
            }
        return flops

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
    stock, pruned, ideal, parts, cuts = (times[name] for name in ("stock", "pruned", "ideal", "parts", "cuts"))
    answer, pruned_answer, ratio_one = (times[f"{name} answer"] for name in ("stock", "pruned", "ratio one"))
    saved = stock["prefill"] - ideal["prefill"] + (new_tokens - 1) * (stock["token"] - parts["token"])
    ideal_answer = answer["end_to_end"] - saved
    ratios = {
        "prefill_speedup": stock["prefill"] / pruned["prefill"],
        "prefill_ceiling": stock["prefill"] / ideal["prefill"],
        "prefill_share_of_ceiling": ideal["prefill"] / pruned["prefill"],
        "end_to_end_speedup": answer["end_to_end"] / pruned_answer["end_to_end"],
        "end_to_end_ceiling": answer["end_to_end"] / ideal_answer,
        "end_to_end_share_of_ceiling": ideal_answer / pruned_answer["end_to_end"],
        "overhead_at_ratio_one": ratio_one["end_to_end"] / answer["end_to_end"],
        "prefill_overhead_at_ratio_one": ratio_one["time_to_first_token"] / answer["time_to_first_token"],
        "scoring_and_selection_share": (cuts["scoring"] + cuts["selection"]) / pruned["prefill"],
    }
    if new_tokens > 1:
        ratios["decode_speedup"] = answer["decode_token"] / pruned_answer["decode_token"]
        ratios["decode_overhead_at_ratio_one"] = ratio_one["decode_token"] / answer["decode_token"]
    return ratios


def _digits(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _rounded(values):
    if isinstance(values, dict):
        return {name: _rounded(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return _digits(values)


def measure(
    stock: PreTrainedModel,
    pruned: PreTrainedModel,
    point: Point,
    image: tuple[int, int],
    rounds: int,
    warmup: int,
    label: str,
) -> dict:
    """Everything that is measured of one point, with images of that height and width in pixels."""
    for model in (stock, pruned):
        model.set_attn_implementation(point.backend)
    inputs = build_inputs(stock.config, image, point.batch_size, point.text_tokens, stock.device, stock.dtype)
    measurement = Measurement(stock, pruned, inputs, point)
    costs = measurement.costs()
    samples = interleave(measurement.contestants(), rounds, warmup, label)
    return {**figures(samples, point.new_tokens), **costs, "tokens": measurement.about()}
