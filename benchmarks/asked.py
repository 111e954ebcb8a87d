"""Rows of the accuracy tables on easy-VQA scenes: a method, or a kind of pruner, at one budget, and its records."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

from learnpruner.hub_cards.records import read_result

from paired import paired_interval

RESULTS = Path(__file__).parent / "results"
MISSING = "not measured"
TOKENS = 576
BUDGETS = (192, 128, 64, 32, 16, 8)
# Of tables that name no other.
USUAL = 32
SEEDS = (0, 1, 2)
# Controls differ more from seed to seed.
CONTROL_SEEDS = (0, 1, 2, 3, 4)
# What the small model's configuration says, so that the default setting is asked once for all tables.
FIELDS = {"pruner_diversity": 0.1, "pruner_stage_ratio": 3, "pruner_layer": 3, "pruner_trained": False}
BEFORE = ("random", "uniform", "downsample", "pool", "cls_attention", "visionzip", "divprune", "vispruner", "hawk")
INSIDE = ("fastv", "pyramiddrop", "sparsevlm", "dart", "transprune")


class Scenes(NamedTuple):
    """A level of the scenes, and the seed that draws them."""

    level: str = "standard"
    seed: int = 0

    @classmethod
    def of(cls, record: dict) -> "Scenes":
        return cls(record["level"], record.get("scene_seed", 0))

    def __str__(self) -> str:
        return f"{self.level}, seed {self.seed}" if self.seed else self.level

    @property
    def slug(self) -> str:
        return f"{self.level}-{self.seed}" if self.seed else self.level


STANDARD = Scenes()
# Where every method and every control is asked, and at which budgets; other scenes are another line.
SCENES = {
    STANDARD: BUDGETS,
    Scenes("hard"): (32, 16),
}


@dataclass(frozen=True)
class Training:
    """One kind of pruner.

    Attributes:
        name (`str`): Its name in files.
        settings (`tuple[str, ...]`): Of its training, beside those of the file.
        shuffles (`Training`, *optional*): It is not trained: it is this kind's pruner of seed 0, the values of each of
            its weights permuted by the seed.
    """

    name: str
    settings: tuple[str, ...] = ()
    shuffles: "Training | None" = None


DEFAULT = Training("default")
PAPER = Training("paper", ("--objective", "paper", "--pruner_ratio", str(USUAL / TOKENS)))
THIRD = Training("third", ("--data_share", str(1 / 3)))
TENTH = Training("tenth", ("--data_share", "0.1"))
SHUFFLED = Training("shuffled", shuffles=DEFAULT)
UNTRAINED = "untrained"


@dataclass(frozen=True)
class Asked:
    """One row of a table: a method, or a kind of pruner, at one mean number of tokens.

    Attributes:
        label (`str`): Its name in tables.
        method (`str`): Of the registry, or `"none"`.
        tokens (`int`): Mean over the decoder's layers.
        training (`Training`, *optional*): Of the pruner; without it the stock base is asked.
        fields (`dict`): Settings of the checkpoint or of the method.
        cap (`int`, *optional*): Tokens behind the last cut, whatever the mean is, in place of a mean of `tokens`.
        scenes (`Scenes`): What is asked about.
        seeds (`tuple[int, ...]`): Of the pruner's training, or of what is left to chance.
    """

    folder: ClassVar[str] = "ablations"
    label: str
    method: str
    tokens: int = USUAL
    training: Training | None = None
    fields: dict = field(default_factory=dict, hash=False)
    cap: int | None = None
    scenes: Scenes = STANDARD
    seeds: tuple[int, ...] = (0,)

    def file(self, seed: int) -> Path:
        """Where the record is, in whichever folder has it, or will be."""
        if self.method == "none":
            name, folders = f"{self.scenes.slug}-none.json", ("accuracy", self.folder)
        else:
            parts = [] if self.scenes == STANDARD else [self.scenes.slug]
            parts += [self.method, *([self.training.name] if self.training else [])]
            parts += [str(self.tokens)] if self.cap is None else [str(self.cap), "cap"]
            parts.append(str(seed))
            for setting, value in self.fields.items():
                if value != FIELDS.get(setting):
                    parts.append(f"{setting}={Path(value).stem if isinstance(value, str) else value}")
            name = "-".join(parts) + ".json"
            folders = ("ablations", "methods")
        known = [RESULTS / folder / name for folder in folders if (RESULTS / folder / name).exists()]
        return known[0] if known else RESULTS / self.folder / name

    def is_measured(self, seed: int) -> bool:
        """Whether the record is there, with the answers: those of version 0.1 lack them, and are measured again."""
        return self.file(seed).exists() and bool(read_result(self.file(seed)).get("answers"))

    def records(self) -> list[dict]:
        """What is there, also without answers."""
        found = (self.file(seed) for seed in self.seeds)
        return [{**read_result(file), "name": self.label} for file in found if file.exists()]


@dataclass(frozen=True)
class Run(Asked):
    """A row of the comparison of methods, which shows costs, too."""

    folder: ClassVar[str] = "methods"

    @property
    def costs_as(self) -> tuple[str, int, str, str]:
        """What tells its cost from that of others: method, tokens, accounting, and the variant, where there is one."""
        untrained = self.method == "learnpruner" and self.training is None
        variant = UNTRAINED if untrained else self.fields.get("first", "")
        return self.method, self.tokens, "mean" if self.cap is None else "cap", variant


def learned(label: str, training: Training = DEFAULT, method: str = "learnpruner", tokens: int = USUAL, **fields):
    """A trained pruner's row, on standard scenes."""
    return Asked(label, method, tokens, training, fields, seeds=SEEDS)


def unpruned(scenes: Scenes) -> Asked:
    return Asked("none", "none", TOKENS, scenes=scenes)


def reference(asked: Asked) -> Asked:
    """What a row is set against: LearnPruner as it is trained by default, at the same budget, on the same scenes."""
    return Asked("learnpruner", "learnpruner", asked.tokens, DEFAULT, scenes=asked.scenes, seeds=SEEDS)


def difference(asked: Asked) -> str:
    """The accuracy of a row minus that of its [`reference`], in points, seeds pooled, with the paired 95 % interval
    over scenes. Empty for the unpruned model, and at budgets that LearnPruner is not asked at."""
    against = reference(asked)
    if asked.method == "none" or asked.tokens not in BUDGETS:
        return ""
    if asked.file(asked.seeds[0]) == against.file(asked.seeds[0]):
        return "reference"
    ours, theirs = asked.records(), against.records()
    if not ours or not theirs or not all(record.get("answers") for record in (*ours, *theirs)):
        return MISSING
    found, low, high = (f"{round(100 * value, 1) + 0.0:.1f}" for value in paired_interval(ours, theirs))
    return f"{found} ({low} to {high})"


def missing(rows: Iterable[Asked]) -> str:
    """What of the rows has no record, in words; empty where all is there."""
    budgets, labels = defaultdict(list), defaultdict(list)
    for row in rows:
        seeds = [seed for seed in row.seeds if not row.file(seed).exists()]
        some = "" if len(seeds) == len(row.seeds) else f" (seed {' and '.join(map(str, seeds))})"
        if seeds:
            budgets[row.scenes, row.label + some].append(str(row.tokens))
    for (scenes, label), tokens in budgets.items():
        labels[f"Not measured on {scenes} scenes at {', '.join(tokens)}"].append(label)
    return " ".join(f"{where}: {'; '.join(names)}." for where, names in labels.items())
