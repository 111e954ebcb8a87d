"""What each method costs: the prefill of a batch, its own part of that, and the cache, beside the unpruned model."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel

import learnpruner
from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.compare import build_prompt, load_processor
from learnpruner.compat_learnpruner import CACHE
from learnpruner.cuts_learnpruner import Cut, LearnedScore, TrainingFreeScore
from learnpruner.hub_cards.records import weights_digest
from learnpruner.methods import METHODS, Method
from learnpruner.plan_learnpruner import UNTRAINED_DIVERSITY

import accuracy
from asked import TOKENS, UNTRAINED, Run
from scenes import scene_dataset
from speed_measure import cache_bytes, timed


@contextmanager
def timed_selection(cuts: tuple[Cut, ...], device: torch.device) -> Iterator[tuple[tuple[Cut, ...], list[float]]]:
    """The cuts, and the seconds that their scores, selections and merges take, and what watching does."""
    seconds = []

    def clocked(function):
        def run(*arguments):
            spent, result = timed(lambda: function(*arguments), device)
            seconds.append(spent)
            return result

        return run

    class TimedScore:
        def __init__(self, score):
            self.score, self.select = score, clocked(score.select)

        def __call__(self, seen):
            return clocked(self.score)(seen)

        @contextmanager
        def watch(self, seen):
            # What it does before and after the layer; its hooks in between take down what they see, no more.
            inner = self.score.watch(seen)
            clocked(inner.__enter__)()
            yield
            clocked(inner.__exit__)(None, None, None)

    shared = {id(cut.score): TimedScore(cut.score) for cut in cuts}
    yield (
        tuple(
            replace(cut, score=shared[id(cut.score)], merge=None if cut.merge is None else clocked(cut.merge))
            for cut in cuts
        ),
        seconds,
    )


def cuts_of(method: Method, model: PreTrainedModel, untrained: bool) -> tuple[Cut, ...]:
    """The method's cuts; `untrained`, with what chooses before a pruner is trained, which clocks would hide."""
    free = TrainingFreeScore(UNTRAINED_DIVERSITY)
    return tuple(
        replace(cut, score=free) if untrained and isinstance(cut.score, LearnedScore) else cut
        for cut in method.cuts(model.model)
    )


@torch.no_grad()
def measure_cost(runs: list[Run], model_path: Path, batch_size: int, repeats: int) -> dict:
    """Prefill of one batch with each method, in turn with the unpruned model: medians."""
    model = LearnPrunerForConditionalGeneration.from_pretrained(model_path).eval()
    processor = load_processor(str(model_path))
    data = scene_dataset("test", batch_size, per_scene=1)
    rows = list(data)
    inputs = processor(
        images=[row["image"] for row in rows],
        text=[build_prompt(processor, row["question"]) for row in rows],
        padding=True,
        return_tensors="pt",
    ).to(model.device)

    def prefill(schedule) -> tuple[float, int]:
        call = partial(model, **inputs, schedule=schedule, logits_to_keep=1, use_cache=True)
        seconds, outputs = timed(call, model.device)
        return seconds, cache_bytes(outputs[CACHE])

    unique = {run.costs_as: run for run in runs}
    found = []
    for (name, tokens, accounting, variant), run in tqdm(unique.items(), desc="cost"):
        method = METHODS[name](tokens / TOKENS, accounting=accounting, **run.fields)
        method = accuracy.for_batch(method, 0, rows, list(range(batch_size)))
        make = partial(cuts_of, method, model, variant == UNTRAINED)
        prefill(()), prefill(make())
        stock, pruned, selection = [], [], []
        for _ in range(repeats):
            (seconds, whole), (other, held) = prefill(()), prefill(make())
            stock.append(seconds)
            pruned.append(other)
            with timed_selection(make(), model.device) as (cuts, spent):
                prefill(cuts)
            selection.append(sum(spent))
        found.append(
            {
                "method": name,
                "tokens": tokens,
                "accounting": accounting,
                **({"variant": variant} if variant else {}),
                "after_cuts": [cut.keep(TOKENS) for cut in make()],
                "prefill_ms": 1000 * statistics.median(pruned),
                "prefill_speedup": statistics.median(one / other for one, other in zip(stock, pruned)),
                "selection_ms": 1000 * statistics.median(selection),
                "kv_bytes": held // batch_size,
                "kv_bytes_unpruned": whole // batch_size,
            }
        )
    return {
        "model": model_path.name,
        "base_sha256": weights_digest(model),
        "batch_size": batch_size,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {
            "learnpruner": learnpruner.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        "costs": found,
    }
