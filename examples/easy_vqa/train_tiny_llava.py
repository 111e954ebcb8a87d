"""Trains the small LLaVA of this folder from scratch, in the usual stages, on scenes of easy-vqa images.

    python examples/easy_vqa/train_tiny_llava.py --output runs/tiny-llava [--seed 0]

Only transformers' own classes, and never with tokens dropped: robustness to pruning is not trained in.

1. `vision`: the vision tower, on the class of the object under each patch and on where its middle is, read from the
   very layer that LLaVA reads; its [CLS] token on which classes the scene holds. The tower is frozen from then on, as
   LLaVA's is, so that a patch goes on telling what it shows and not what was asked of the whole.
2. `align`: projector and language model, on scenes of 2 x 2 cells (128 x 128 pixels, 256 tokens), which are cheap;
   longer than its steps if need be, until nine of ten answers are right.
3. `answer`: the same on scenes of 3 x 3 cells.
4. `sizes`: the same on scenes of one to three rows and columns, whose cells are cut closer to their shapes as well, so
   that a number is not read off the share that ground has of the image.

Every question of a scene is answered in one sequence: it sees the image and itself, not its neighbours (a
block-causal mask), at the positions it has alone. Matrices of the layers are trained with Muon, in bfloat16 autocast.

A checkpoint is written every `--save-every` steps; the same command goes on from it.
"""

import json
import math
import pickle
import platform
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from learnpruner_commands.arguments import Parser, positive

from scenes import CELL, GRID, KINDS, OBJECTS, Scene, ask, make_scene, sources
from tiny_llava import (
    PATCH,
    VisionHeads,
    build_model,
    build_processor,
    pack_questions,
    patch_classes,
    patch_middles,
    pixels_of,
)

STAGES = ("vision", "align", "answer", "sizes")
STEPS = (2500, 1800, 1500, 1200)
# Muon's, for the matrices of layers and projector; AdamW's, for all else.
LEARNING_RATE = {"vision": 2e-2, "align": 1e-2, "answer": 1e-2, "sizes": 1e-2}
ADAMW_LEARNING_RATE = 2e-3
LOG_EVERY = 50
# Which word asks for which patches is found all at once, sooner or later: the text aligns until it answers that many.
ALIGNED = 0.9


@dataclass(frozen=True)
class Plan:
    """One step: how many scenes, their grid of (rows, columns) cells, how many objects (least, most) they may hold,
    pixels of a cell's side; and how many questions a scene, of which kinds, and whether no two may be alike."""

    scenes: int
    grid: tuple[int, int]
    objects: tuple[int, int]
    cell: int = CELL
    questions: int = 24
    kinds: tuple[str, ...] = KINDS
    distinct: bool = False

    @property
    def tokens(self) -> int:
        """Of one scene."""
        return self.grid[0] * self.grid[1] * (self.cell // PATCH) ** 2


def plan_step(stage: str, step: int, progress: float, rng: random.Random) -> Plan:
    full = (GRID, GRID)
    if stage == "vision":
        scenes, grid = (4, full) if step % 3 == 2 else (8, (2, 2))
        return Plan(scenes, grid, (1, grid[0] * grid[1]))
    if stage == "align":
        return Plan(4, (2, 2), (1, min(4, 2 + int(10 * progress))))
    objects = rng.choice(((1, 3), OBJECTS["standard"], OBJECTS["hard"]))
    if stage == "answer":
        return Plan(4, full, objects)
    if rng.random() < 0.4:
        plan = Plan(6, full, objects)
    else:
        grid, cell = (rng.randint(1, GRID), rng.randint(1, GRID)), rng.choice((24, 32, 40, 48, 64, 64))
        plan = Plan(1, grid, (1, min(grid[0] * grid[1], OBJECTS["hard"][1])), cell)
        # Small scenes are cheap: more of them.
        plan = replace(plan, scenes=max(4, min(16, 4 * Plan(1, full, objects).tokens // plan.tokens)))
    # Numbers are learned last, and from many scenes, each of which has few to ask for.
    return replace(plan, questions=12, kinds=("color", "shape", "presence", "presence", *4 * ("count",)), distinct=True)


def questions_about(scene: Scene, plan: Plan, rng: random.Random) -> list[tuple[str, str]]:
    questions = []
    while len(questions) < plan.questions:
        question = ask(rng, scene, rng.choice(plan.kinds))
        if question is not None and not (plan.distinct and question in questions):
            questions.append(question)
    return questions


def rate_at(stage: str, progress: float, step: int) -> float:
    """Share of the learning rate: a warm-up; then half a cosine for the tower; for the text, constant while it
    aligns and falling to nothing while it learns to answer."""
    falling = 1 - progress
    shares = {"vision": 0.5 * (1 + math.cos(math.pi * progress)), "align": 1.0, "answer": falling, "sizes": falling}
    return min(1.0, (step + 1) / 50) * max(0.02, shares[stage])


CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
---

# A small LLaVA for scenes of easy-vqa images

CLIP tower, two-layer projector, Llama text model: LLaVA-1.5's anatomy with {parameters:.1f} M parameters and 576 vision
tokens. It answers questions by color, shape, presence and count about scenes of up to six shapes, and nothing else: a
bench for token pruning. Trained by `examples/easy_vqa/train_tiny_llava.py --seed {seed}` on train images of
[easy-vqa](https://pypi.org/project/easy-vqa/), never with tokens dropped. Weights are stored in float16 and load as
float32.

| stage | steps | loss | accuracy on its training batches | minutes |
|---|---|---|---|---|
{stages}

{threads} thread(s), {machine}; torch {torch}, transformers {transformers}. `log.json` has every {every} steps.
"""


def stage_rows(log: dict) -> str:
    """A table's row for each stage, from a run's log."""
    rows = []
    for stage in log["steps"]:
        entries = [entry for entry in log["log"] if entry["stage"] == stage]
        if entries:
            starts = [0] + [entry["step"] for entry in entries]
            steps = [entry["step"] - start for entry, start in zip(entries, starts)]
            minutes = sum(entry["seconds_per_step"] * count for entry, count in zip(entries, steps)) / 60
            last = entries[-1]
            rows.append(f"| {stage} | {last['step']} | {last['loss']:.3f} | {last['accuracy']:.3f} | {minutes:.0f} |")
    return "\n".join(rows)


def model_card(card: str, parameters: int, log: dict) -> str:
    """The model's README, from its log."""
    return card.format(parameters=parameters / 1e6, stages=stage_rows(log), every=LOG_EVERY, **log, **log["versions"])


class Run:
    """A training that can be cut off at any step and go on. Subclasses train other models on the same scenes."""

    learning_rate = LEARNING_RATE
    card = CARD
    # Parts of the names of the layers' matrices, which Muon trains.
    layers = (".layers.", "projector.")

    def __init__(self, folder: Path, seed: int, steps: dict[str, int]):
        self.folder, self.seed, self.steps = folder, seed, steps
        torch.manual_seed(seed)
        self.build()
        self.stage, self.step, self.log = self.stages[0], 0, []
        self.images = sources("train")
        self.optimizers = self._optimizers()
        if (folder / "run.pt").exists():
            self._resume()

    def build(self) -> None:
        """Sets the processor, the model, and heads that train it and are not part of it."""
        self.processor = build_processor()
        self.model = build_model(self.processor)
        # With a mask of its own for each scene, plain attention took less time than sdpa on the CPU it was tried on.
        self.model.set_attn_implementation("eager")
        self.heads = VisionHeads(self.model.config.vision_config.hidden_size)

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(self.steps)

    def modules(self) -> dict[str, nn.Module]:
        """What the present stage trains."""
        tower = self.model.model.vision_tower
        if self.stage == "vision":
            return {"tower": tower, "heads": self.heads}
        return {
            "projector": self.model.model.multi_modal_projector,
            "language_model": self.model.model.language_model,
            "lm_head": self.model.lm_head,
        }

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {f"{part}.{name}": p for part, module in self.modules().items() for name, p in module.named_parameters()}

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        def is_matrix(name: str, parameter: nn.Parameter) -> bool:
            return parameter.ndim == 2 and any(part in name for part in self.layers)

        named = self._parameters().items()
        matrices = [parameter for name, parameter in named if is_matrix(name, parameter)]
        others = [parameter for name, parameter in named if not is_matrix(name, parameter)]
        return [
            torch.optim.Muon(matrices, lr=self.learning_rate[self.stage], weight_decay=0.01),
            torch.optim.AdamW(others, lr=ADAMW_LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98)),
        ]

    def _resume(self) -> None:
        try:
            state = torch.load(self.folder / "run.pt", weights_only=True)
            mismatch = state["seed"] != self.seed or state["steps"] != self.steps
            self.model.load_state_dict(state["model"])
            self.heads.load_state_dict(state["heads"])
        except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{self.folder}/run.pt is damaged or of another model: choose another --output."
            ) from error
        if mismatch:
            raise ValueError(f"{self.folder} holds a run of another seed or length: choose another --output.")
        self.stage, self.step, self.log = state["stage"], state["step"], state["log"]
        self.optimizers = self._optimizers()
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {"seed": self.seed, "steps": self.steps, "stage": self.stage, "step": self.step, "log": self.log}
        state |= {"model": self.model.state_dict(), "heads": self.heads.state_dict()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save(state, self.folder / "run.tmp")
        # Renamed when whole: a run that is killed while it writes keeps its last checkpoint.
        (self.folder / "run.tmp").rename(self.folder / "run.pt")

    def export(self) -> None:
        """Writes model, processor and log. Half the bytes, but the configuration still says float32, so that the
        weights are loaded as what most machines compute fastest and most exactly."""
        weights = {name: tensor.half() for name, tensor in self.model.state_dict().items()}
        self.model.save_pretrained(self.folder, state_dict=weights)
        self.processor.save_pretrained(self.folder)
        about = {
            "seed": self.seed,
            "steps": self.steps,
            "threads": torch.get_num_threads(),
            "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        log = {**about, "log": self.log}
        (self.folder / "log.json").write_text(json.dumps(log, indent=1) + "\n")
        (self.folder / "README.md").write_text(model_card(self.card, self.model.num_parameters(), log))

    def make_scenes(self, plan: Plan, rng: random.Random) -> list[Scene]:
        return [make_scene(rng, self.images, plan.objects, grid=plan.grid, cell=plan.cell) for _ in range(plan.scenes)]

    def loss(self) -> tuple[torch.Tensor, float]:
        """Loss of one fresh batch, made from the seed and the step alone, and the accuracy that shows progress."""
        rng = random.Random(f"{self.seed} {self.stage} {self.step}")
        plan = plan_step(self.stage, self.step, self.step / self.steps[self.stage], rng)
        scenes = self.make_scenes(plan, rng)
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(self.stage == "vision"):
            tower = self.model.model.vision_tower(
                pixels_of(scenes, self.processor), output_hidden_states=True, interpolate_pos_encoding=True
            )
        layer = tower.hidden_states[self.model.config.vision_feature_layer]
        if self.stage == "vision":
            classes, middles = (
                torch.from_numpy(np.stack([f(s) for s in scenes])) for f in (patch_classes, patch_middles)
            )
            return self.heads(layer.float(), tower.pooler_output.float(), classes, middles)
        asked = [questions_about(scene, plan, rng) for scene in scenes]
        batch = pack_questions(asked, self.processor, plan.tokens)
        labels, ids = batch.pop("labels"), batch.pop("input_ids")
        with torch.autocast("cpu", torch.bfloat16):
            features = self.model.model.multi_modal_projector(layer[:, 1:])
            words = self.model.get_input_embeddings()(ids)
            embeds = torch.cat([words[:, :1], features.to(words.dtype), words[:, 1 + plan.tokens :]], dim=1)
            hidden = self.model.model.language_model(inputs_embeds=embeds, **batch, use_cache=False).last_hidden_state
        return self.answer_loss(hidden, labels)

    def answer_loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Cross-entropy of the replies, and how many of their words, their end left out, are right."""
        supervised = labels[:, 1:] != -100
        logits, targets = self.model.lm_head(hidden[:, :-1][supervised].float()), labels[:, 1:][supervised]
        answers = targets != self.processor.tokenizer.eos_token_id
        right = (logits.argmax(-1) == targets)[answers].float().mean().item()
        return F.cross_entropy(logits, targets), right

    def _stage_is_over(self) -> bool:
        if self.step < self.steps[self.stage]:
            return False
        if self.stage != "align" or self.step == 0:
            return True
        return self.log[-1]["accuracy"] >= ALIGNED or self.step >= 4 * self.steps[self.stage]

    def begin(self, stage: str) -> None:
        self.stage, self.step = stage, 0
        self.optimizers = self._optimizers()

    def train(self, save_every: int) -> None:
        for stage in self.stages[self.stages.index(self.stage) :]:
            if stage != self.stage:
                self.begin(stage)
            self._train_stage(save_every)
        self.save()

    def _train_stage(self, save_every: int) -> None:
        total, parameters = self.steps[self.stage], list(self._parameters().values())
        recent, start = [], time.perf_counter()
        bar = tqdm(desc=self.stage, initial=self.step, total=total, mininterval=10)
        while not self._stage_is_over():
            share = rate_at(self.stage, self.step / total, self.step)
            for optimizer, rate in zip(self.optimizers, (self.learning_rate[self.stage], ADAMW_LEARNING_RATE)):
                for group in optimizer.param_groups:
                    group["lr"] = rate * share
            loss, accuracy = self.loss()
            self.model.zero_grad()
            self.heads.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.step += 1
            bar.update()
            recent.append((loss.item(), accuracy))
            if self.step % LOG_EVERY == 0 or self.step == total:
                mean_loss, mean_accuracy = np.mean(recent, axis=0).round(4).tolist()
                seconds = round((time.perf_counter() - start) / len(recent), 3)
                entry = {"stage": self.stage, "step": self.step, "loss": mean_loss, "accuracy": mean_accuracy}
                self.log.append({**entry, "seconds_per_step": seconds})
                bar.set_postfix(loss=mean_loss, accuracy=mean_accuracy)
                recent, start = [], time.perf_counter()
            if self.step % save_every == 0:
                self.save()
        bar.close()


def run_command(kind: type[Run], description: str, steps: dict[str, int], argv: list[str] | None) -> int:
    """The command of a training script."""
    parser = Parser(description=description)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=len(steps), default=list(steps.values()), metavar=tuple(steps))
    parser.add_argument("--save-every", type=positive, default=200)
    parser.add_argument("--threads", type=positive, default=2)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        run = kind(arguments.output, arguments.seed, dict(zip(steps, arguments.steps)))
    except (ImportError, OSError, ValueError) as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        return 2
    run.train(arguments.save_every)
    run.export()
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(Run, __doc__.splitlines()[0], dict(zip(STAGES, STEPS)), argv)


if __name__ == "__main__":
    sys.exit(main())
