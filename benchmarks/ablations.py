"""What each part of LearnPruner is worth on the small VLM: pruners trained, the benchmark's questions asked, tables.

    python benchmarks/ablations.py --runs runs/ablations            # all that is missing
    python benchmarks/ablations.py --runs runs/ablations --only "R1:R2"
    python benchmarks/ablations.py --into training/RESULTS.md --plot benchmarks/results/budgets.png     # tables alone

Pruners are trained by `learnpruner train` on the settings of training/configs/tiny-llava.yaml, with three seeds, and
asked by benchmarks/accuracy.py. What is there already is not done again, so that a killed study goes on, and several
processes may share the work: each takes what no other has begun. Results: benchmarks/results/ablations/, and of each
training its cost and log, trainings/ in there.
"""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from learnpruner.training.command import RECORD
from learnpruner_commands.arguments import Parser, positive

import accuracy
import asked
import render_accuracy
import scenes  # found because accuracy.py has looked for it
from asked import (
    BEFORE,
    BUDGETS,
    CONTROL_SEEDS,
    DEFAULT,
    INSIDE,
    PAPER,
    SCENES,
    SEEDS,
    SHUFFLED,
    TENTH,
    THIRD,
    TOKENS,
    Asked,
    Scenes,
    Training,
    difference,
    learned,
    missing,
    unpruned,
)
from claims import claimed
from shuffled_pruner import shuffle_pruner

HERE = Path(__file__).parents[1]
EASY_VQA = HERE / "examples" / "easy_vqa"
CONFIG = HERE / "training" / "configs" / "tiny-llava.yaml"
# At which the controls are asked, where the scenes have them.
CONTROL_BUDGETS = (64, 32, 16, 8)
RANDOM_WEIGHTS = {"pruner_trained": True}
NO_DIVERSITY = {"pruner_diversity": 0.0}


def controls(tokens: int, at: Scenes) -> list[Asked]:
    """LearnPruner, and what it is without its training."""

    def row(label, training=None, fields=None, seeds=SEEDS):
        return Asked(label, "learnpruner", tokens, training, fields or {}, scenes=at, seeds=seeds)

    return [
        row("learnpruner", DEFAULT),
        row("trained, diversity 0", DEFAULT, NO_DIVERSITY),
        row("untrained", seeds=(0,)),
        row("random weights", None, RANDOM_WEIGHTS, CONTROL_SEEDS),
        row("random weights, diversity 0", None, {**RANDOM_WEIGHTS, **NO_DIVERSITY}, CONTROL_SEEDS),
        row("shuffled weights", SHUFFLED, None, CONTROL_SEEDS),
        row("shuffled weights, diversity 0", SHUFFLED, NO_DIVERSITY, CONTROL_SEEDS),
    ]


BOTH = learned("learnpruner")
TABLES: dict[str, list[Asked]] = {
    "budgets": [
        asked
        for tokens in BUDGETS
        for asked in (
            Asked("random", "random", tokens, seeds=SEEDS),
            *(Asked(m, m, tokens) for m in ("uniform", "cls_attention", "oracle_boxes")),
            learned("learnpruner", tokens=tokens),
        )
    ],
    "controls": [
        asked
        for at, budgets in SCENES.items()
        for tokens in CONTROL_BUDGETS
        if tokens in budgets
        for asked in controls(tokens, at)
    ],
    "stages": [
        learned("stage 1 alone", method="stage_1"),
        # Down to as many as both stages leave; its first layers see the whole image.
        Asked("stage 2 alone", "stage_2", cap=18),
        BOTH,
        Asked("[CLS] attention in place of stage 1, alone", "cls_attention"),
    ],
    "objective": [BOTH, learned("objective: paper", PAPER)],
    "data": [learned("1/10 of the data", TENTH), learned("1/3 of the data", THIRD), BOTH],
    "diversity": [learned(f"diversity {share}", pruner_diversity=share / 100) for share in (0, 5, 10, 20)],
    "R1:R2": [learned(f"R1:R2 = {ratio}", pruner_stage_ratio=ratio) for ratio in (1, 2, 3, 4)],
    "k": [learned(f"k = {layer}", pruner_layer=layer) for layer in range(2, 8)],
}


def train_pruner(training: Training, seed: int, base: Path, runs: Path, threads: int) -> Path:
    """The pruner's folder, trained now where it is not there: in a process of its own, whose memory is the training's
    alone."""
    folder = runs / f"{training.name}-{seed}"
    if not (folder / RECORD).exists():
        # Evaluation would not change the weights, and what is measured here is asked elsewhere.
        settings = {k: v for k, v in yaml.safe_load(CONFIG.read_text()).items() if not k.startswith("eval_")}
        settings |= {"model_name_or_path": str(base), "train_data": str(make_scenes(runs) / "train.jsonl")}
        settings |= {"output_dir": str(folder), "seed": seed}
        config = runs / f"{training.name}-{seed}.yaml"
        config.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "learnpruner", "train", str(config), *training.settings]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    record = training_record(training, seed)
    record.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads((folder / RECORD).read_text())
    known["base"] = base.name
    record.write_text(json.dumps(known, indent=1) + "\n")
    return folder


def training_record(training: Training, seed: int) -> Path:
    return asked.RESULTS / "ablations" / "trainings" / f"{training.name}-{seed}.json"


def pruner_of(training: Training, seed: int, base: Path, runs: Path, threads: int) -> Path | None:
    """The folder of a pruner, made now where it is not there; `None` while another process makes it."""
    with claimed(runs / "locks" / f"{training.name}-{seed}") as mine:
        if not mine:
            return None
        if training.shuffles is None:
            return train_pruner(training, seed, base, runs, threads)
        folder, trained = runs / f"{training.name}-{seed}", pruner_of(training.shuffles, 0, base, runs, threads)
        return folder if folder.exists() or trained is None else shuffle_pruner(trained, seed, folder)


def make_scenes(runs: Path) -> Path:
    """The folder of train scenes; whoever comes second waits until they are whole."""
    folder = runs / "scenes"
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / "scenes.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "eval.jsonl").exists() and scenes.main(["--output", str(folder)]) != 0:
            raise RuntimeError("The train scenes were not made; the message stands above.")
    return folder


def ask(row: Asked, seed: int, model: Path, limit: int) -> None:
    path = row.file(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["--model", str(model), "--method", row.method, "--name", row.label, "--seed", str(seed)]
    if row.method != "none":
        accounting, tokens = ("mean", row.tokens) if row.cap is None else ("cap", row.cap)
        command += ["--ratio", f"{tokens}/{TOKENS}", "--accounting", accounting]
    command += ["--level", row.scenes.level, *(["--scene-seed", str(row.scenes.seed)] if row.scenes.seed else [])]
    command += [part for name, value in row.fields.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    command += ["--limit", str(limit), "--threads", str(torch.get_num_threads()), "--output", f"{path}.part"]
    if accuracy.main(command) != 0:
        raise RuntimeError(f"{row.label} was not measured; its message stands above.")
    os.replace(f"{path}.part", path)


def measure(rows: list[Asked], base: Path, runs: Path, limit: int, threads: int) -> None:
    """Asks what has not been asked, the unpruned model first."""
    whole = [unpruned(scenes) for scenes in dict.fromkeys(row.scenes for row in rows)]
    todo = [(row, seed) for row in (*whole, *rows) for seed in row.seeds]
    for row, seed in tqdm(todo, desc="runs"):
        if row.is_measured(seed):
            continue
        with claimed(runs / "locks" / row.file(seed).name) as mine:
            if not mine or row.is_measured(seed):
                continue
            model = pruner_of(row.training, seed, base, runs, threads) if row.training else base
            if model is not None:
                ask(row, seed, model, limit)


def groups_of(rows: list[Asked]) -> dict[tuple, list[dict]]:
    """As [`render_accuracy.group_runs`], of what has been measured of the rows, in their order, each with what
    [`difference`] says of it. The unpruned model comes before the rows of its scenes."""
    levels = dict.fromkeys(row.scenes for row in rows)
    rows = [row for at in levels for row in (unpruned(at), *(row for row in rows if row.scenes == at))]
    results = []
    for place, row in enumerate(rows):
        beside = {"place": place, "difference": difference(row)}
        results += [{**record, **beside} for record in row.records()]
    groups = render_accuracy.group_runs(results).items()
    return dict(sorted(groups, key=lambda group: group[1][0]["place"]))


def tables() -> dict[str, str]:
    """Markdown of each table, and what of it has not been measured."""
    return {
        name: "\n\n".join(filter(None, (render_accuracy.table(groups_of(rows)), missing(rows))))
        for name, rows in TABLES.items()
    }


def plotted() -> dict[tuple, list[dict]]:
    """Groups of the plot: LearnPruner, trained and not, between chance, the best other method and no pruning."""
    budgets = [tokens for tokens in BUDGETS if learned("learnpruner", tokens=tokens).records()]
    others = {}
    for name in (name for name in (*BEFORE, *INSIDE) if name != "random"):
        records = [Asked(name, name, tokens).records() for tokens in budgets]
        if records and all(records):
            others[name] = sum(runs[0]["accuracy"] for runs in records)
    best = sorted(others, key=others.get)[-1:]
    return groups_of(
        [
            row
            for tokens in BUDGETS
            for row in (
                learned("learnpruner", tokens=tokens),
                Asked("untrained", "learnpruner", tokens),
                *(Asked(f"{name}, the best other method", name, tokens) for name in best),
                Asked("random", "random", tokens, seeds=SEEDS),
            )
        ]
    )


def log_table() -> str:
    """Markdown: how steady the trainings were, from their logs."""
    lines = [
        "| pruner | runs | gradient norm, largest | loss, largest | keep rate | gate entropy at the end, bits |",
        "|---|---|---|---|---|---|",
    ]
    for training in (DEFAULT, PAPER, THIRD, TENTH):
        paths = [training_record(training, seed) for seed in SEEDS]
        logs = [json.loads(path.read_text())["log"] for path in paths if path.exists()]
        logs = [[step for step in log if "grad_norm" in step] for log in logs]
        if flat := [step for log in logs for step in log]:  # a training of a few steps logs none
            kept, ends = [step["keep_rate"] for step in flat], [log[-1]["gate_entropy"] for log in logs]
            cells = [training.name, str(len(logs)), f"{max(step['grad_norm'] for step in flat):.2g}"]
            cells += [f"{max(step['loss'] for step in flat):.2g}", f"{min(kept):.2f} to {max(kept):.2f}"]
            lines.append("| " + " | ".join([*cells, f"{min(ends):.2f} to {max(ends):.2f}"]) + " |")
    return "\n".join(lines)


def cost_table() -> str:
    lines = [
        "| pruner | runs | samples | steps | parameters | minutes | peak memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for training in (DEFAULT, PAPER, THIRD, TENTH):
        paths = [training_record(training, seed) for seed in SEEDS]
        records = [json.loads(path.read_text()) for path in paths if path.exists()]
        if records:
            minutes = [record["metrics"]["seconds"] / 60 for record in records]
            memory = max(record["metrics"]["peak_memory_bytes"] for record in records) / 1e6
            cells = [training.name, len(records), records[0]["samples"], records[0]["steps"]]
            cells.append(f"{records[0]['metrics']['trained_parameters']:,}")
            shortest, longest = f"{min(minutes):.0f}", f"{max(minutes):.0f}"
            cells += [shortest if shortest == longest else f"{shortest} to {longest}", f"{memory:.0f}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=EASY_VQA / "tiny-llava")
    parser.add_argument("--runs", type=Path, help="folder for the pruners; without it nothing is measured")
    parser.add_argument("--only", choices=TABLES, nargs="+", default=list(TABLES), help="tables")
    parser.add_argument("--limit", type=positive, default=2000, help="questions")
    parser.add_argument("--threads", type=positive, default=os.cpu_count())
    parser.add_argument("--into", type=Path, help="Markdown file with a pair of marks for each table, log and cost")
    parser.add_argument("--plot", type=Path, help="PNG of accuracy against the budget")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.runs:
            rows = [row for name in arguments.only for row in TABLES[name]]
            measure(rows, arguments.base, arguments.runs, arguments.limit, arguments.threads)
        if arguments.plot:
            render_accuracy.save_plot(plotted(), arguments.plot)
        if arguments.into:
            text = arguments.into.read_text()
            for name, table in {**tables(), "log": log_table(), "cost": cost_table()}.items():
                text = render_accuracy.fill(text, name, table)
            arguments.into.write_text(text)
    except (ImportError, OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        print(f"ablations: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
