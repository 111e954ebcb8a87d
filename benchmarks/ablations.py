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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from learnpruner.training.command import RECORD
from learnpruner_commands.arguments import Parser, positive

import accuracy
import render_accuracy
import scenes  # found because accuracy.py has looked for it

HERE = Path(__file__).parents[1]
EASY_VQA = HERE / "examples" / "easy_vqa"
RESULTS = HERE / "benchmarks" / "results" / "ablations"
CONFIG = HERE / "training" / "configs" / "tiny-llava.yaml"
SEEDS = (0, 1, 2)
TOKENS = 576
# The budget at which methods differ most.
SMALLEST = 32


@dataclass(frozen=True)
class Training:
    """Settings of one kind of pruner, beside those of the file."""

    name: str
    settings: tuple[str, ...] = ()


DEFAULT = Training("default")
PAPER = Training("paper", ("--objective", "paper", "--pruner_ratio", str(SMALLEST / TOKENS)))
THIRD = Training("third", ("--data_share", str(1 / 3)))
TENTH = Training("tenth", ("--data_share", "0.1"))
# What the small model's configuration says, so that the default setting is asked once for all tables.
FIELDS = {"pruner_diversity": 0.1, "pruner_stage_ratio": 3, "pruner_layer": 3}


@dataclass(frozen=True)
class Asked:
    """One row of a table: a method, or a kind of pruner, at one mean number of tokens."""

    label: str
    method: str
    tokens: int = SMALLEST
    training: Training | None = None
    fields: dict = field(default_factory=dict, hash=False)
    # Tokens behind the last cut, whatever the mean is, in place of a mean of `tokens`.
    cap: int | None = None
    level: str = "standard"

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the pruner's training, or of the method's chance; other methods leave nothing to it."""
        return SEEDS if self.training or self.method == "random" else (0,)

    def file(self, seed: int) -> Path:
        parts = [self.method, *([self.training.name] if self.training else []), str(self.tokens), str(seed)]
        parts += [f"{name}={value}" for name, value in self.fields.items() if value != FIELDS[name]]
        return RESULTS / ("-".join(parts) + ".json")


def learned(
    label: str, training: Training | None = None, method: str = "learnpruner", tokens: int = SMALLEST, **fields
):
    return Asked(label, method, tokens, training or DEFAULT, fields)


BOTH = learned("learnpruner")
TABLES: dict[str, list[Asked]] = {
    "budgets": [
        asked
        for tokens in (128, 64, 32)
        for asked in (
            *(Asked(m, m, tokens) for m in ("random", "uniform", "cls_attention", "oracle_boxes")),
            learned("learnpruner", tokens=tokens),
        )
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


@contextmanager
def claimed(lock: Path) -> Iterator[bool]:
    """Whether this is the process that works on what `lock` stands for. The claim ends with the process."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


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
    record = RESULTS / "trainings" / f"{training.name}-{seed}.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads((folder / RECORD).read_text())
    known["base"] = base.name
    record.write_text(json.dumps(known, indent=1) + "\n")
    return folder


def make_scenes(runs: Path) -> Path:
    """The folder of train scenes; whoever comes second waits until they are whole."""
    folder = runs / "scenes"
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / "scenes.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "eval.jsonl").exists() and scenes.main(["--output", str(folder)]) != 0:
            raise RuntimeError("The train scenes were not made; the message stands above.")
    return folder


def ask(asked: Asked, seed: int, model: Path, limit: int) -> None:
    path = asked.file(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["--model", str(model), "--method", asked.method, "--name", asked.label, "--seed", str(seed)]
    accounting, tokens = ("mean", asked.tokens) if asked.cap is None else ("cap", asked.cap)
    command += ["--ratio", f"{tokens}/{TOKENS}", "--accounting", accounting, "--limit", str(limit)]
    command += ["--level", asked.level, "--output", f"{path}.part"]
    command += [part for name, value in asked.fields.items() for part in ("--set", f"{name}={value}")]
    if accuracy.main([*command, "--threads", str(torch.get_num_threads())]) != 0:
        raise RuntimeError(f"{asked.label} was not measured; its message stands above.")
    os.replace(f"{path}.part", path)


def groups_of(name: str, unpruned: dict) -> dict[tuple, list[dict]]:
    """What has been measured of a table, in its order."""
    rows = TABLES[name]
    results = [
        {**accuracy.read_result(asked.file(seed)), "name": asked.label}
        for asked in rows
        for seed in asked.seeds
        if asked.file(seed).exists()
    ]
    groups = render_accuracy.group_runs([unpruned, *results])
    order = {(asked.label, asked.tokens): place for place, asked in enumerate(rows)}
    return dict(sorted(groups.items(), key=lambda item: order.get((item[0][1], round(item[0][2])), -1)))


def tables(unpruned: dict) -> dict[str, str]:
    """Markdown of each table, and what of it has not been measured."""
    found = {}
    for name, rows in TABLES.items():
        missing = [
            f"{asked.label} at {asked.tokens}, seed {seed}"
            for asked in rows
            for seed in asked.seeds
            if not asked.file(seed).exists()
        ]
        note = f"\n\nNot measured: {'; '.join(missing)}." if missing else ""
        found[name] = render_accuracy.table(groups_of(name, unpruned)) + note
    return found


def cost_table() -> str:
    lines = [
        "| pruner | runs | samples | steps | parameters | minutes | peak memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for training in (DEFAULT, PAPER, THIRD, TENTH):
        paths = [RESULTS / "trainings" / f"{training.name}-{seed}.json" for seed in SEEDS]
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
    parser.add_argument("--unpruned", type=Path, default=RESULTS.parent / "accuracy" / "standard-none.json")
    parser.add_argument("--into", type=Path, help="Markdown file with a pair of marks for each table, and for cost")
    parser.add_argument("--plot", type=Path, help="PNG of accuracy against the budget")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        wanted = [(asked, seed) for name in arguments.only for asked in TABLES[name] for seed in asked.seeds]
        for asked, seed in tqdm(wanted if arguments.runs else [], desc="ablations"):
            if asked.file(seed).exists():
                continue
            model = arguments.base
            if asked.training:
                with claimed(arguments.runs / "locks" / f"{asked.training.name}-{seed}") as mine:
                    if not mine:
                        continue
                    model = train_pruner(asked.training, seed, arguments.base, arguments.runs, arguments.threads)
            with claimed(arguments.runs / "locks" / asked.file(seed).name) as mine:
                if mine and not asked.file(seed).exists():
                    ask(asked, seed, model, arguments.limit)
        unpruned = accuracy.read_result(arguments.unpruned) if arguments.into or arguments.plot else None
        if arguments.plot:
            render_accuracy.save_plot(groups_of("budgets", unpruned), arguments.plot)
        if arguments.into:
            text = arguments.into.read_text()
            for name, table in {**tables(unpruned), "cost": cost_table()}.items():
                text = render_accuracy.fill(text, name, table)
            arguments.into.write_text(text)
    except (ImportError, OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        print(f"ablations: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
