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
import subprocess
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel

import learnpruner_commands
from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.accounting import mean_tokens
from learnpruner.budget_learnpruner import half_up
from learnpruner.hub_cards.recorded_counts import MARK, arrows, is_marked, note
from learnpruner.hub_cards.records import relative_accuracy
from learnpruner.methods import METHODS
from learnpruner_commands.arguments import Parser, positive

import ablations
import render_accuracy
from ablations import EASY_VQA
from asked import (
    BEFORE,
    DEFAULT,
    INSIDE,
    MISSING,
    RESULTS,
    SCENES,
    SEEDS,
    TOKENS,
    Run,
    Scenes,
    difference,
    missing,
    unpruned,
)
from method_costs import measure_cost

COST = RESULTS / "methods" / "cost.json"
# Training-free methods that are asked with LearnPruner's stage 2 behind them, too.
WITH_STAGE_2 = ("cls_attention", "divprune", "vispruner")
# HAWK's own budgets are 40, 20 and 10 % of the tokens (arXiv 2604.07812), its heads weighed on train questions.
HAWK_SHARES = (0.4, 0.2, 0.1)
HAWK_WEIGHTS = RESULTS / "methods" / "hawk_weights.json"
HAWK_QUESTIONS = 200


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


def runs_at(tokens: int, at: Scenes, model: PreTrainedModel) -> list[Run]:
    """Every method at one budget, on one set of scenes."""
    own = [
        Run("learnpruner", "learnpruner", tokens, DEFAULT, scenes=at, seeds=SEEDS),
        Run("learnpruner, untrained", "learnpruner", tokens, scenes=at),
    ]
    before = [
        Run(name, name, tokens, scenes=at, seeds=SEEDS if name == "random" else (0,))
        for name in (*BEFORE, "oracle_boxes")
    ]
    composed = [
        Run(f"{name}, then stage 2", "composed", tokens, fields={"first": name}, scenes=at) for name in WITH_STAGE_2
    ]
    inside = [
        Run(name, name, tokens, scenes=at)
        if reachable(name, tokens, model)
        else Run(f"{name}, cap", name, tokens, cap=tokens, scenes=at)
        for name in INSIDE
    ]
    return [*own, *before, *composed, *inside]


def runs_of(model: PreTrainedModel) -> list[Run]:
    """Every run of the tables, for the depth of a model."""
    runs = [run for at, budgets in SCENES.items() for tokens in budgets for run in runs_at(tokens, at, model)]
    # What others leave behind their last cut, for those who compare caps.
    runs.append(Run("learnpruner, cap", "learnpruner", 64, DEFAULT, cap=64, seeds=SEEDS))
    weights = {"head_weights": os.path.relpath(HAWK_WEIGHTS)}
    runs += [
        Run("hawk, heads calibrated, its paper's budgets", "hawk", round(share * TOKENS), fields=weights)
        for share in HAWK_SHARES
    ]
    return [*runs, Run("transprune, its paper's schedule", "transprune", paper_tokens("transprune", model))]


def calibrate_hawk(model: Path, folder: Path) -> None:
    data = ablations.make_scenes(folder) / "train.jsonl"
    command = ["calibrate-hawk", "--model", str(model), "--data", str(data), "--limit", str(HAWK_QUESTIONS)]
    if learnpruner_commands.main([*command, "--output", str(HAWK_WEIGHTS)]) != 0:
        raise RuntimeError("HAWK's heads were not calibrated; the message stands above.")


def table(runs: list[Run], costs: dict | None) -> str:
    """Markdown: a row for each method at each budget, the best first; what has not been measured is named, and rows
    whose cuts are not those that the method makes today are marked."""
    spread = render_accuracy.spread
    spent = {
        (cost["method"], cost["tokens"], cost["accounting"], cost.get("variant", "")): cost
        for cost in (costs or {}).get("costs", ())
    }
    levels = list(dict.fromkeys(run.scenes for run in runs))
    whole = {at: record for at in levels for record in unpruned(at).records()}
    kinds = sorted({kind for record in whole.values() for kind in record["by_kind"]})
    head = ["scenes", "budget", "method", "mean tokens", "left at the end", "after each cut", "runs", "accuracy"]
    head += [render_accuracy.DIFFERENCE, "RelAcc", *kinds, "prefill, ms", "x stock", "selection, ms", "KV, kB"]
    rows, shown = [], []
    for run in runs:
        results = run.records()
        if not results:
            continue
        shown += results
        base, tokens = whole.get(run.scenes), results[0]["tokens"]
        relative = [relative_accuracy(result, base) if base else None for result in results]
        mark = f" {MARK}" if any(map(is_marked, results)) else ""
        cells = [str(run.scenes), str(run.tokens), run.label, f"{tokens['mean']:.0f}", str(tokens["after_cuts"][-1])]
        cells += [arrows(tokens["after_cuts"]) + mark, str(len(results))]
        cells += [spread([result["accuracy"] for result in results]), difference(run), spread(relative)]
        cells += [spread([result["by_kind"][kind]["accuracy"] for result in results]) for kind in kinds]
        cost = spent.get(run.costs_as)
        # The cost of other counts is not this row's. Until version 0.2 the counts were not recorded.
        if cost and cost.get("after_cuts", tokens["after_cuts"]) != tokens["after_cuts"]:
            cost = None
        names = ("prefill_ms", "prefill_speedup", "selection_ms")
        cells += [f"{cost[name]:.3g}" for name in names] if cost else [MISSING] * 3
        cells.append(f"{cost['kv_bytes'] / 1e3:.0f}" if cost else MISSING)
        right = sum(result["accuracy"] for result in results) / len(results)
        rows.append(((levels.index(run.scenes), -run.tokens, run.cap is not None, -right), cells))
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cells) + " |" for _, cells in sorted(rows)]
    if costs:
        what = f"{costs['threads']} CPU thread(s)" if costs["device"] == "cpu" else costs["device"]
        lines += ["", f"Cost: batch {costs['batch_size']}, {what}, {costs['dtype']}, median of {costs['repeats']}."]
    for sentence in filter(None, (note(shown), missing(runs))):
        lines += ["", sentence]
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
        COST.parent.mkdir(parents=True, exist_ok=True)
        if arguments.runs:
            if not HAWK_WEIGHTS.exists() and any("head_weights" in run.fields for run in runs):
                calibrate_hawk(arguments.base, arguments.runs)
            ablations.measure(runs, arguments.base, arguments.runs, arguments.limit, arguments.threads)
        if arguments.cost and not HAWK_WEIGHTS.exists() and any("head_weights" in run.fields for run in runs):
            raise ValueError(f"{HAWK_WEIGHTS} is not there yet: measure accuracy first, with --runs.")
        if arguments.cost:
            costs = measure_cost(runs, arguments.pruned, arguments.batch_size, arguments.repeats)
            COST.write_text(json.dumps(costs, indent=1) + "\n")
        if arguments.into:
            costs = json.loads(COST.read_text()) if COST.exists() else None
            text = table(runs, costs)
            arguments.into.write_text(render_accuracy.fill(arguments.into.read_text(), "methods", text))
    except (ImportError, OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        print(f"compare_methods: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
