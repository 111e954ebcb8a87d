"""The photo bench (examples/photo_vqa): what methods and pruners are worth on photographs.

    python benchmarks/photo.py --base CHECKPOINT --features FOLDER --rows FOLDER --runs runs/photo --only conditions
    python benchmarks/photo.py --into examples/photo_vqa/RESULTS.md        # the tables alone

Parts: `conditions` is what the bench must show before it may judge, on the set "a", `trials` are pruners among which a
setting is chosen, on the set "validation". CHECKPOINT is that of build.py; the folder of features holds those of
features.py, one folder a set; that of rows is pruner_data.py's, and beside it stands one of the same name and
`-presence`, made with `--kinds presence`. What is there already is not done again, so that a killed study goes on, and
several processes may share the work: each takes what no other has begun. Records: benchmarks/results/photo/.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
import yaml
from tqdm import tqdm

from learnpruner.hub_cards.records import read_result
from learnpruner.methods import METHODS as REGISTRY
from learnpruner_commands.arguments import Parser, positive

import accuracy
import render_accuracy
from claims import claimed
from paired import paired_interval
from selections import Selected

HERE = Path(__file__).parents[1]
RESULTS = HERE / "benchmarks" / "results" / "photo"
CONFIG = HERE / "training" / "configs" / "photo-llava.yaml"
TOKENS = 576
# Where conditions are judged and settings are chosen.
JUDGED = (32, 16)
SEEDS = (0, 1, 2)
UNTRAINED = {"pruner_trained": True}
PLAIN = {"pruner_diversity": 0.0}
TRAINING_FREE = ("uniform", "cls_attention", "visionzip", "vispruner", "divprune", "hawk")


@dataclass(frozen=True)
class Training:
    """One kind of pruner.

    Attributes:
        name (`str`): In tables.
        settings (`tuple[str, ...]`): Of its training, beside those of the file.
        presence (`bool`): On questions of that kind alone.
        second_cut (`bool`): The second cut takes part (benchmarks/second_cut.py).
        labels (`bool`): By patch labels (examples/photo_vqa/label_pruner.py), in place of the model's own answers.
    """

    name: str
    settings: tuple[str, ...] = ()
    presence: bool = False
    second_cut: bool = False
    labels: bool = False

    @property
    def slug(self) -> str:
        return self.name.replace(", ", "-").replace(" ", "-")


@dataclass(frozen=True)
class Asked:
    """A method, with a pruner or without, at one mean number of tokens.

    Attributes:
        label (`str`): Its name in tables.
        method (`str`): Of the registry, or "none".
        tokens (`int`): Mean over the decoder's layers.
        pruner (`Training`, *optional*): Without it the base's own, which is new.
        fields (`dict`): Settings of the checkpoint or the method.
        seeds: Of the pruner's training, or of the method's chance.
        other (`bool`): With the picture of the next scene.
    """

    label: str
    method: str
    tokens: int = TOKENS
    pruner: Training | None = None
    fields: dict = field(default_factory=dict, hash=False)
    seeds: tuple[int, ...] = (0,)
    other: bool = False

    def file(self, level: str, seed: int) -> Path:
        name = "".join(letter if letter.isalnum() else "_" for letter in self.label)
        return RESULTS / level / f"{name}-{self.tokens}-{seed}.json"


def at_budgets(label: str, method: str, budgets: Iterable[int] = JUDGED, **options) -> list[Asked]:
    return [Asked(label, method, tokens, **options) for tokens in budgets]


def of_pruner(label: str, pruner: Training | None, seeds: tuple[int, ...], fields: dict | None = None) -> list[Asked]:
    """A module's first cut alone, plain and with the tenth of its budget for diversity."""
    options = {"pruner": pruner, "seeds": seeds}
    return [
        *at_budgets(f"{label}, top-k", "stage_1", **options, fields={**(fields or {}), **PLAIN}),
        *at_budgets(f"{label}, diversity .1", "stage_1", **options, fields={**(fields or {}), "pruner_diversity": 0.1}),
    ]


UNPRUNED = Asked("unpruned", "none")
CONTROLS = [
    *at_budgets("random", "random", (64, *JUDGED), seeds=SEEDS),
    *(asked for name in TRAINING_FREE for asked in at_budgets(name, name)),
    *at_budgets("training-free first cut", "stage_1"),
    *of_pruner("random weights", None, SEEDS, UNTRAINED),
    *at_budgets("oracle: boxes of what is asked", "oracle_boxes"),
]
LABELS = Training("labels", labels=True)
LABELLED = of_pruner("patch labels", LABELS, SEEDS)
CONDITIONS = [UNPRUNED, Asked("unpruned, another picture", "none", other=True), *CONTROLS, *LABELLED]

OBJECTIVE = ("--objective", "hard")
SOFT_START = ("--temperature", "1.0")
HARD = Training("hard", OBJECTIVE)
SOFT = Training("soft", ("--objective", "default", *SOFT_START))
PRUNERS = (
    HARD,
    SOFT,
    Training("hard in the last third", (*OBJECTIVE, *SOFT_START, "--hard_from", "0.667")),
    Training("hard, budgets of the default", (*OBJECTIVE, "--budgets", "0.3333", "0.2222", "0.1111", "0.0556")),
    Training(
        "hard, small budgets twice as often",
        (*OBJECTIVE, "--budgets", "0.0642", "0.0321", "0.0321", "0.0161", "0.0161"),
    ),
    Training("hard, no distillation", (*OBJECTIVE, "--distillation", "0")),
    Training("hard, second cut in training", OBJECTIVE, second_cut=True),
    Training("hard, presence alone", OBJECTIVE, presence=True),
)
# How many tokens each cut gets, and where the second falls, with the module of one training.
STAGES = {
    "R1:R2 = 3, k = 11": {"pruner_stage_ratio": 3, "pruner_layer": 11},
    "R1:R2 = 2, k = 11": {"pruner_stage_ratio": 2, "pruner_layer": 11},
    "R1:R2 = 1.5, k = 11": {"pruner_stage_ratio": 1.5, "pruner_layer": 11},
    "R1:R2 = 3, k = 18": {"pruner_stage_ratio": 3, "pruner_layer": 18},
    "R1:R2 = 1.5, k = 18": {"pruner_stage_ratio": 1.5, "pruner_layer": 18},
}
SELECTED = [("marginal", weight) for weight in (0.3, 0.5, 0.7)] + [("facility", weight) for weight in (0.2, 0.5)]
RIVALS = ("cls_attention", "vispruner", "divprune", "training-free first cut")
TRIALS = [
    *(asked for asked in CONTROLS if asked.label in RIVALS),
    *(asked for pruner in PRUNERS for asked in of_pruner(pruner.name, pruner, (0,))),
    *(
        asked
        for pruner in (HARD, SOFT)
        for selection, weight in SELECTED
        for asked in at_budgets(
            f"{pruner.name}, {selection} {weight}",
            "selected",
            pruner=pruner,
            fields={"selection": selection, "weight": weight},
        )
    ),
    *(
        asked
        for selection, weight in SELECTED
        for asked in at_budgets(
            f"cls_attention, {selection} {weight}",
            "selected",
            fields={"by": "cls", "selection": selection, "weight": weight},
        )
    ),
    *(
        asked
        for name, fields in STAGES.items()
        for asked in at_budgets(f"hard, {name}", "learnpruner", pruner=HARD, fields={**PLAIN, **fields})
    ),
]
PARTS = {
    "conditions": ("a", CONDITIONS),
    "trials": ("validation", [UNPRUNED, *TRIALS]),
}


def train(training: Training, seed: int, base: Path, rows: Path, features: Path, runs: Path) -> Path:
    """The folder of a pruner, trained now where it is not there; its record goes to the results."""
    folder = runs / f"{training.slug}-{seed}"
    record = RESULTS / "trainings" / f"{folder.name}.json"
    if not (folder / "training.json").exists():
        runs.mkdir(parents=True, exist_ok=True)
        if training.labels:
            command = [HERE / "examples" / "photo_vqa" / "label_pruner.py", "--base", base, "--output", folder]
            command += ["--features", features / "train", "--seed", seed]
        else:
            settings = yaml.safe_load(CONFIG.read_text())
            data = rows.with_name(f"{rows.name}-presence") if training.presence else rows
            settings |= {"model_name_or_path": str(base), "train_data": str(data / "train.jsonl")}
            config = runs / f"{folder.name}.yaml"
            config.write_text(yaml.safe_dump({**settings, "output_dir": str(folder), "seed": seed}))
            program = [HERE / "benchmarks" / "second_cut.py"] if training.second_cut else ["-m", "learnpruner", "train"]
            command = [*program, config, *training.settings]
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        subprocess.run([sys.executable, *map(str, command)], check=True, env={**os.environ, **threads})
    known = json.loads((folder / "training.json").read_text())
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({**known, "base": base.name}, indent=1) + "\n")
    return folder


def pruner_of(training: Training, seed: int, base: Path, rows: Path, features: Path, runs: Path) -> Path | None:
    """The folder of a pruner; `None` while another process trains it, which then asks it, too."""
    with claimed(runs / "locks" / f"{training.slug}-{seed}") as mine:
        return train(training, seed, base, rows, features, runs) if mine else None


def ask(asked: Asked, seed: int, model: Path, features: Path, path: Path, limit: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["--model", str(model), "--method", asked.method, "--name", asked.label, "--seed", str(seed)]
    command += ["--photo", str(features), "--dtype", "bfloat16", "--limit", str(limit), "--output", f"{path}.part"]
    command += ["--ratio", f"{asked.tokens}/{TOKENS}"] if asked.method != "none" else []
    command += ["--other-picture"] if asked.other else []
    command += [part for name, value in asked.fields.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    # A trial's selection is no method of the registry.
    with patch.dict(REGISTRY, selected=Selected):
        status = accuracy.main([*command, "--threads", str(torch.get_num_threads())])
    if status != 0:
        raise RuntimeError(f"{asked.label} was not measured; its message stands above.")
    os.replace(f"{path}.part", path)


def level_of(set_: str, fold: int) -> str:
    return f"photo-{set_}-{fold}"


def measure(part: str, base: Path, features: Path, rows: Path, runs: Path, fold: int, limit: int) -> None:
    set_, wanted = PARTS[part]
    level = level_of(set_, fold)
    todo = [(asked, seed) for asked in wanted for seed in asked.seeds]
    for asked, seed in tqdm(todo, desc=part):
        path = asked.file(level, seed)
        with claimed(runs / "locks" / level / path.name) as mine:
            if not mine or path.exists():
                continue
            model = pruner_of(asked.pruner, seed, base, rows, features, runs) if asked.pruner else base
            if model is not None:
                ask(asked, seed, model, features / set_, path, limit)


def records(asked: Asked, level: str) -> list[dict]:
    files = [asked.file(level, seed) for seed in asked.seeds]
    return [read_result(file) for file in files if file.exists()]


def table(part: str, fold: int) -> str:
    """Markdown: a row for each method and budget. The last column is the difference to the unpruned model, with its
    paired 95 % interval over scenes."""
    set_, wanted = PARTS[part]
    level = level_of(set_, fold)
    unpruned = records(UNPRUNED, level)
    if not unpruned:
        return "Not measured."
    kinds = sorted(unpruned[0]["by_kind"])
    head = ["budget", "method", "after each cut", "runs", "accuracy", *kinds, "asked objects seen", "minus unpruned"]
    lines, missing = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)], []
    for asked in sorted(wanted, key=lambda asked: -asked.tokens):
        found = records(asked, level)
        if len(found) < len(asked.seeds):
            missing.append(f"{asked.label} at {asked.tokens}")
        if not found:
            continue
        cuts = " -> ".join(map(str, found[0]["tokens"]["after_cuts"])) or "none"
        cells = [str(asked.tokens), asked.label, cuts, str(len(found))]
        cells += [render_accuracy.spread([one["accuracy"] for one in found])]
        cells += [render_accuracy.spread([one["by_kind"][kind]["accuracy"] for one in found]) for kind in kinds]
        seen = [one["tokens"]["objects_seen"][-1] for one in found if one["tokens"]["objects_seen"]]
        cells.append(render_accuracy.spread(seen) if seen else "")
        if asked == UNPRUNED or asked.other:
            cells.append("")
        else:
            cells.append("{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * v for v in paired_interval(found, unpruned))))
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Percent; {unpruned[0]['n']} questions of the set {set_!r}, fold {fold}; differences in points."]
    if missing:
        lines += ["", f"Not measured: {'; '.join(missing)}."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, help="output of examples/photo_vqa/build.py; without it nothing is asked")
    parser.add_argument("--features", type=Path, help="folder with the features of each set")
    parser.add_argument("--rows", type=Path, help="output of examples/photo_vqa/pruner_data.py")
    parser.add_argument("--runs", type=Path, default=Path("runs/photo"), help="folder for the pruners")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--limit", type=positive, default=2500, help="questions")
    parser.add_argument("--threads", type=positive, default=os.cpu_count())
    parser.add_argument("--into", type=Path, help="Markdown file with a pair of marks for each part")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        for part in arguments.only if arguments.base else []:
            folders = (arguments.base, arguments.features, arguments.rows, arguments.runs)
            measure(part, *folders, arguments.fold, arguments.limit)
        if arguments.into:
            text = arguments.into.read_text()
            for part in arguments.only:
                text = render_accuracy.fill(text, part, table(part, arguments.fold))
            arguments.into.write_text(text)
    except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        print(f"photo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
