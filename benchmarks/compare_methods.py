"""Every method of the registry on the small VLM, on the same questions, budgets and rails: accuracy, cost, one table.

    python benchmarks/compare_methods.py --runs runs/ablations         # all that is missing: accuracy
    python benchmarks/compare_methods.py --cost                        # prefill, selection and cache, anew
    python benchmarks/compare_methods.py --into methods/RESULTS.md     # the tables alone

Budgets are means over the decoder's layers. Methods that cut inside the decoder alone see the whole image before, and
cannot reach the small ones: they are asked at what they leave behind their last cut, too (cap), where their mean is
higher than the others'. Pruners are those of benchmarks/ablations.py, and runs that it has made are not made again.
What is there already is not done again, so that a killed study goes on, and several processes may share the work.
Results: benchmarks/results/methods/.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel

import learnpruner
import learnpruner_commands
from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.accounting import mean_tokens
from learnpruner.budget_learnpruner import half_up
from learnpruner.compare import build_prompt, load_processor
from learnpruner.compat_learnpruner import CACHE
from learnpruner.cuts_learnpruner import Cut
from learnpruner.hub_cards.recorded_counts import MARK, arrows, is_marked, note
from learnpruner.hub_cards.records import weights_digest
from learnpruner.methods import METHODS, Method
from learnpruner_commands.arguments import Parser, positive

import ablations
import accuracy
import render_accuracy
from ablations import EASY_VQA, TOKENS, Asked
from scenes import scene_dataset
from speed_measure import cache_bytes, timed

RESULTS = Path(__file__).parent / "results" / "methods"
COST = RESULTS / "cost.json"
BUDGETS = (192, 128, 64, 32)
BEFORE = ("random", "uniform", "downsample", "pool", "cls_attention", "visionzip", "divprune", "vispruner", "hawk")
INSIDE = ("fastv", "pyramiddrop", "sparsevlm", "dart", "transprune")
# HAWK's own budgets are 40, 20 and 10 % of the tokens (arXiv 2604.07812), its heads weighed on train questions.
HAWK_SHARES = (0.4, 0.2, 0.1)
HAWK_WEIGHTS = RESULTS / "hawk_weights.json"
HAWK_QUESTIONS = 200


@dataclass(frozen=True)
class Run(Asked):
    """One method at one budget. `tokens` is a mean over the layers, or with `cap` what the last cut leaves."""

    def file(self, seed: int) -> Path:
        level = "" if self.level == "standard" else f"{self.level}-"
        plain = self.cap is None and not self.fields and not level
        if plain and (known := super().file(seed)).exists():
            return known
        accounting = "" if self.cap is None else "-cap"
        return RESULTS / f"{level}{self.method}-{self.tokens}{accounting}-{seed}.json"


def reachable(method: str, tokens: int, model: PreTrainedModel) -> bool:
    """Whether a method can have so many tokens on average."""
    try:
        [cut.keep(TOKENS) for cut in METHODS[method](tokens / TOKENS).cuts(model.model)]
    except ValueError:
        return False
    return True


def paper_tokens(method: str, model: PreTrainedModel) -> int:
    """Mean tokens at the weights of a method's own places, where the paper gives them as shares of the image."""
    places, depth = METHODS[method]().places(model.model), model.config.text_config.num_hidden_layers
    counts = [half_up(place.weight * TOKENS) for place in places]
    return half_up(mean_tokens(counts, [place.layer for place in places], TOKENS, depth))


def runs_of(model: PreTrainedModel) -> list[Run]:
    """Every run of the tables, for the depth of a model."""
    runs = [
        Run(name, name, tokens, ablations.DEFAULT if name == "learnpruner" else None)
        for tokens in BUDGETS
        for name in (*BEFORE, "oracle_boxes", "learnpruner")
    ]
    runs += [
        Run(name, name, tokens) if reachable(name, tokens, model) else Run(f"{name}, cap", name, tokens, cap=tokens)
        for name in INSIDE
        for tokens in BUDGETS
    ]
    # What others leave behind their last cut, for those who compare caps.
    runs.append(Run("learnpruner, cap", "learnpruner", 64, ablations.DEFAULT, cap=64))
    # Where the best are close, on scenes of more and smaller objects.
    runs += [
        Run(name, name, 32, ablations.DEFAULT if name == "learnpruner" else None, level="hard")
        for name in ("visionzip", "divprune", "vispruner", "learnpruner")
    ]
    weights = {"head_weights": os.path.relpath(HAWK_WEIGHTS)}
    runs += [
        Run("hawk, heads calibrated, its paper's budgets", "hawk", round(share * TOKENS), fields=weights)
        for share in HAWK_SHARES
    ]
    return [*runs, Run("transprune, its paper's schedule", "transprune", paper_tokens("transprune", model))]


def measure(runs: list[Run], model: Path, folder: Path, limit: int, threads: int) -> None:
    if any(run.fields for run in runs) and not HAWK_WEIGHTS.exists():
        calibrate_hawk(model, folder)
    todo = [(run, seed) for run in runs for seed in run.seeds]
    for run, seed in tqdm(todo, desc="methods"):
        if run.file(seed).exists():
            continue
        with ablations.claimed(folder / "locks" / run.file(seed).name) as mine:
            if not mine or run.file(seed).exists():
                continue
            pruned = ablations.train_pruner(run.training, seed, model, folder, threads) if run.training else model
            ablations.ask(run, seed, pruned, limit)


def calibrate_hawk(model: Path, folder: Path) -> None:
    data = ablations.make_scenes(folder) / "train.jsonl"
    command = ["calibrate-hawk", "--model", str(model), "--data", str(data), "--limit", str(HAWK_QUESTIONS)]
    if learnpruner_commands.main([*command, "--output", str(HAWK_WEIGHTS)]) != 0:
        raise RuntimeError("HAWK's heads were not calibrated; the message stands above.")


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

    unique = {(run.method, run.tokens, run.cap): run for run in runs}
    found = []
    for run in tqdm(unique.values(), desc="cost"):
        accounting = "mean" if run.cap is None else "cap"
        method = METHODS[run.method](run.tokens / TOKENS, accounting=accounting, **run.fields)
        method: Method = accuracy.for_batch(method, 0, rows, list(range(batch_size)))
        prefill(()), prefill(method)
        stock, pruned, selection = [], [], []
        for _ in range(repeats):
            (seconds, whole), (other, held) = prefill(()), prefill(method)
            stock.append(seconds)
            pruned.append(other)
            with timed_selection(method.cuts(model.model), model.device) as (cuts, spent):
                prefill(cuts)
            selection.append(sum(spent))
        found.append(
            {
                "method": run.method,
                "tokens": run.tokens,
                "accounting": method.accounting,
                "after_cuts": [cut.keep(TOKENS) for cut in method.cuts(model.model)],
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


def read_unpruned() -> dict[str, dict]:
    """Level of the scenes -> what `make accuracy` has of the unpruned model."""
    folder = RESULTS.parent / "accuracy"
    return {level: accuracy.read_result(folder / f"{level}-none.json") for level in ("standard", "hard")}


def table(runs: list[Run], unpruned: dict[str, dict], costs: dict | None) -> str:
    """Markdown: a row for each method at each budget, the best first; what has not been measured is named, and rows
    whose cuts are not those that the method makes today are marked.

    Args:
        unpruned: Level of the scenes -> the unpruned run.
    """
    cost = {(c["method"], c["tokens"], c["accounting"]): c for c in (costs or {"costs": []})["costs"]}
    kinds = sorted(unpruned["standard"]["by_kind"])
    head = ["scenes", "budget", "method", "mean tokens", "left at the end", "after each cut", "runs", "RelAcc", *kinds]
    head += ["prefill, ms", "x stock", "selection, ms", "KV, kB"]
    lines, missing = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)], []
    rows, shown = [], []
    for run in runs:
        files = [run.file(seed) for seed in run.seeds if run.file(seed).exists()]
        missing += [
            f"{run.label} at {run.tokens} ({run.level}), seed {s}" for s in run.seeds if not run.file(s).exists()
        ]
        if not files:
            continue
        results = [accuracy.read_result(file) for file in files]
        relative = [accuracy.relative_accuracy(result, unpruned[run.level]) for result in results]
        tokens = results[0]["tokens"]
        spent = cost.get((run.method, run.tokens, "mean" if run.cap is None else "cap"))
        # The cost of other counts is not this row's. Until version 0.2 the counts were not recorded.
        if spent and spent.get("after_cuts", tokens["after_cuts"]) != tokens["after_cuts"]:
            spent = None
        cells = [run.level, str(run.tokens), run.label, f"{tokens['mean']:.0f}", str(tokens["after_cuts"][-1])]
        shown += results
        cells.append(arrows(tokens["after_cuts"]) + (f" {MARK}" if any(map(is_marked, results)) else ""))
        cells += [str(len(results)), render_accuracy.spread(relative)]
        cells += [render_accuracy.spread([r["by_kind"][kind]["accuracy"] for r in results]) for kind in kinds]
        names = ("prefill_ms", "prefill_speedup", "selection_ms")
        cells += [f"{spent[name]:.3g}" for name in names] if spent else [render_accuracy.MISSING] * 3
        cells.append(f"{spent['kv_bytes'] / 1e3:.0f}" if spent else render_accuracy.MISSING)
        order = (run.level != "standard", -run.tokens, run.cap is not None, -sum(relative) / len(relative))
        rows.append((order, cells))
    lines += ["| " + " | ".join(cells) + " |" for _, cells in sorted(rows)]
    if costs:
        what = f"{costs['threads']} CPU thread(s)" if costs["device"] == "cpu" else costs["device"]
        lines += ["", f"Cost: batch {costs['batch_size']}, {what}, {costs['dtype']}, median of {costs['repeats']}."]
    if explained := note(shown):
        lines += ["", explained]
    if missing:
        lines += ["", f"Not measured: {'; '.join(missing)}."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=EASY_VQA / "tiny-llava")
    parser.add_argument("--pruned", type=Path, default=EASY_VQA / "learnpruner-tiny-llava", help="for --cost")
    parser.add_argument("--runs", type=Path, help="folder of the pruners; without it no accuracy is measured")
    parser.add_argument("--only", choices=METHODS, nargs="+", help="methods, by default all")
    parser.add_argument("--cost", action="store_true", help="measure prefill, selection and cache")
    parser.add_argument("--limit", type=positive, default=2000, help="questions")
    parser.add_argument("--batch-size", type=positive, default=8, help="of --cost")
    parser.add_argument("--repeats", type=positive, default=7, help="of --cost")
    parser.add_argument("--threads", type=positive, default=os.cpu_count())
    parser.add_argument("--into", type=Path, help="Markdown file with the marks <!-- methods -->")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        model = LearnPrunerForConditionalGeneration.from_pretrained(arguments.pruned)
        runs = [run for run in runs_of(model) if not arguments.only or run.method in arguments.only]
        RESULTS.mkdir(parents=True, exist_ok=True)
        if arguments.runs:
            measure(runs, arguments.base, arguments.runs, arguments.limit, arguments.threads)
        if arguments.cost and not HAWK_WEIGHTS.exists() and any(run.fields for run in runs):
            raise ValueError(f"{HAWK_WEIGHTS} is not there yet: measure accuracy first, with --runs.")
        if arguments.cost:
            costs = measure_cost(runs, arguments.pruned, arguments.batch_size, arguments.repeats)
            COST.write_text(json.dumps(costs, indent=1) + "\n")
        if arguments.into:
            costs = json.loads(COST.read_text()) if COST.exists() else None
            text = table(runs, read_unpruned(), costs)
            arguments.into.write_text(render_accuracy.fill(arguments.into.read_text(), "methods", text))
    except (ImportError, OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        print(f"compare_methods: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
