"""How benchmarks/speed.py measures: contestants in turn, parts of the stock model, memory, medians with intervals."""

import ctypes
import math
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.generation import StoppingCriteria, StoppingCriteriaList
from transformers.masking_utils import create_causal_mask

from learnpruner.compat_learnpruner import CACHE

CONFIDENCE = 0.95


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Wall-clock seconds until the device is done, and what `call` returned."""
    synchronise(device)
    start = time.perf_counter()
    result = call()
    synchronise(device)
    return time.perf_counter() - start, result


def interleave(
    contestants: dict[str, Callable[[], dict[str, float]]], rounds: int, warmup: int, label: str
) -> dict[str, dict[str, list[float]]]:
    """Runs all contestants in turn, so that what slows the machine for a while slows them alike, and every other round
    in the reverse order, A B C, C B A, so that one that becomes slower (or faster) all the time favours nobody.

    Args:
        contestants: Name -> call that returns named seconds.
        rounds, warmup (`int`): How often; rounds that count come after those that do not.

    Returns:
        Name of the contestant -> name of the quantity -> its value in each round.
    """
    samples = {name: defaultdict(list) for name in contestants}
    for number in tqdm(range(warmup + rounds), desc=label, unit="round"):
        for name in list(contestants) if number % 2 == 0 else reversed(contestants):
            for quantity, value in contestants[name]().items():
                if number >= warmup:
                    samples[name][quantity].append(value)
    return {name: dict(quantities) for name, quantities in samples.items()}


def summarise(samples: list[float]) -> dict[str, float]:
    """Median and the interval between two order statistics that covers the true median with the stated confidence.

    Whatever the distribution, the median lies outside the j-th smallest and j-th largest of n with the probability
    2 P(B < j), B binomial (n, 1/2). j is the largest for which at least 0.95 is left; below 6 samples none is, and the
    interval is from the smallest to the largest, with the confidence that it has.
    """
    ordered, count = sorted(samples), len(samples)
    outside = [2 * sum(math.comb(count, i) for i in range(j)) / 2**count for j in range(count // 2 + 1)]
    j = max([j for j, share in enumerate(outside) if j >= 1 and 1 - share >= CONFIDENCE], default=1)
    confidence = 1 - outside[j] if count > 1 else 0.0
    return {
        "median": statistics.median(ordered),
        "low": ordered[j - 1],
        "high": ordered[count - j],
        "confidence": round(confidence, 4),
    }


class FirstToken(StoppingCriteria):
    """Notes when the first token of `generate` is there; stops nothing."""

    def __init__(self, device: torch.device):
        self.device, self.at = device, None

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        if self.at is None:
            synchronise(self.device)
            self.at = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generation_times(model: PreTrainedModel, inputs: dict, new_tokens: int, **kwargs) -> dict[str, float]:
    """One greedy answer: seconds to its first token, from one token to the next after that (where there is more than
    one), and to its end."""
    first = FirstToken(model.device)
    start = time.perf_counter()
    end_to_end, answer = timed(
        lambda: model.generate(
            **inputs,
            **kwargs,
            do_sample=False,
            max_new_tokens=new_tokens,
            stopping_criteria=StoppingCriteriaList([first]),
        ),
        model.device,
    )
    if answer.shape[1] != inputs["input_ids"].shape[1] + new_tokens:
        raise RuntimeError(f"generate stopped after {answer.shape[1] - inputs['input_ids'].shape[1]} tokens.")
    to_first = first.at - start
    times = {"time_to_first_token": to_first, "end_to_end": end_to_end}
    if new_tokens > 1:
        times["decode_token"] = (end_to_end - to_first) / (new_tokens - 1)
    return times


def prefill(model: PreTrainedModel, inputs: dict, **kwargs) -> Any:
    """The prompt, pixels included, to the logits of its last row, as `generate` asks for them."""
    return model(**inputs, **kwargs, use_cache=True, logits_to_keep=1)


class StockParts:
    """The stock model's own modules, on as many rows as pruning leaves: what a prompt and a token cost if scoring,
    selecting and dropping cost nothing.

    Args:
        model ([`PreTrainedModel`]): The stock model.
        inputs: Of its forward.
        spans (`list[tuple[int, int]]`): Runs of decoder layers, and the rows of one sample that each sees.
    """

    def __init__(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], spans: list[tuple[int, int]]):
        self.model, self.inputs, self.device = model, inputs, model.device
        self.text: nn.Module = model.model.language_model
        self.batch = len(inputs["input_ids"])
        of_text = ("input_ids", "attention_mask", "mm_token_type_ids")
        self.images = {name: value for name, value in inputs.items() if name not in of_text}
        if "image_sizes" in self.images:
            # As the pruned model passes them: in a tensor, the stock model waits for each image's sizes. Qwen's tower
            # takes a tensor alone, and waits for it in the stock model, the pruned one and here.
            self.images["image_sizes"] = inputs["image_sizes"].tolist()
        self.runs, start = [], 0
        for layers, rows in spans:
            states = self._states(rows)
            mask = create_causal_mask(
                config=self.text.config, inputs_embeds=states, attention_mask=None, **{CACHE: None}
            )
            self.runs.append((self.text.layers[start : start + layers], states, mask, self._rotary(states)))
            start += layers

    def _states(self, rows: int) -> torch.Tensor:
        shape = (self.batch, rows, self.text.config.hidden_size)
        return torch.randn(shape, dtype=self.model.dtype, device=self.device)

    def _rotary(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(states.shape[1], device=self.device).unsqueeze(0)
        if "mrope_section" in self.text.config.rope_parameters:
            positions = positions.expand(3, self.batch, -1)
        return self.text.rotary_emb(states, position_ids=positions)

    def encode_images(self) -> None:
        """Vision tower and projector."""
        self.model.get_image_features(**self.images)

    def embed(self) -> torch.Tensor:
        return self.model.get_input_embeddings()(self.inputs["input_ids"])

    def run_layers(self) -> DynamicCache:
        """All decoder layers, each on its rows; the cache they fill."""
        cache = DynamicCache(config=self.text.config)
        for layers, states, mask, rotary in self.runs:
            for layer in layers:
                states = layer(
                    states, attention_mask=mask, position_embeddings=rotary, **{CACHE: cache}, use_cache=True
                )
        return cache

    def head(self) -> torch.Tensor:
        """Final norm of the rows that are left, and the head on the last."""
        rows = self.runs[-1][1]
        return self.model.lm_head(self.text.norm(rows)[:, -1:])

    def prefill(self) -> None:
        """The ideal one: all parts, one after the other."""
        self.encode_images()
        self.embed()
        self.run_layers()
        self.head()

    def run_token(self, cache: DynamicCache) -> None:
        """All decoder layers on one more row, behind what the cache holds."""
        states = self.runs[0][1][:, :1]
        rotary = tuple(part[..., :1, :] for part in self.runs[0][3])
        for layer in self.text.layers:
            states = layer(states, attention_mask=None, position_embeddings=rotary, **{CACHE: cache}, use_cache=True)

    def times(self) -> dict[str, float]:
        """Seconds of each part. They add up to more than those of [`prefill`]: each waits for the device. `token` is
        one token through all layers."""
        parts = {
            name: timed(call, self.device)[0]
            for name, call in (("vision", self.encode_images), ("embedding", self.embed), ("head", self.head))
        }
        parts["layers"], cache = timed(self.run_layers, self.device)
        parts["token"], _ = timed(lambda: self.run_token(cache), self.device)
        return parts


class TimedScore:
    """A cut's score with a clock: what scoring takes, and what selecting takes."""

    def __init__(self, score, device: torch.device):
        self.score, self.device = score, device
        self.seconds = {"scoring": 0.0, "selection": 0.0}

    def __call__(self, state) -> torch.Tensor:
        self.seconds["scoring"], scores = timed(lambda: self.score(state), self.device)
        return scores

    def select(self, scores: torch.Tensor, state, counts) -> torch.Tensor:
        self.seconds["selection"], chosen = timed(lambda: self.score.select(scores, state, counts), self.device)
        return chosen


def cache_bytes(cache: DynamicCache) -> int:
    """Keys and values that a cache holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes held at the worst moment of a call, beyond those held before it.

    On CUDA those of tensors, on Linux those of the process; `None` elsewhere: not measured.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        timed(call, device)
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        return None
    # Freed memory that the allocator keeps would hide what the call needs.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _process_bytes("VmRSS")
    call()
    return _process_bytes("VmHWM") - before


def _process_bytes(name: str) -> int:
    return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)[1])
