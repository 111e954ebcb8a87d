"""Trains the small LLaVA of this folder from scratch, in the usual stages, on scenes of easy-vqa images.

    python examples/easy_vqa/train_tiny_llava.py --output runs/tiny-llava [--seed 0]

Only transformers' own classes, and never with tokens dropped: robustness to pruning is not trained in.

1. `vision`: the vision tower, on the class of the object under each patch and on where its middle is, read from the
   very layer that LLaVA reads; its [CLS] token on which classes the scene holds. The tower is frozen from then on, as
   LLaVA's is, so that a patch goes on telling what it shows and not what was asked of the whole.
2. `align`: projector and language model, on scenes of 2 x 2 cells (128 x 128 pixels, 256 tokens), which are cheap;
   longer than its steps if need be, until nine of ten answers are right.
3. `answer`: the same on scenes of 3 x 3 cells.

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
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from learnpruner.cli import Parser, positive

from scenes import CELL, COLORS, GRID, KINDS, OBJECTS, SHAPES, SIDE, Scene, ask, covered, make_scene, sources

PATCH = 8
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
STAGES = ("vision", "align", "answer")
# Muon's, for the matrices of layers and projector; AdamW's, for all else.
LEARNING_RATE = {"vision": 2e-2, "align": 1e-2, "answer": 1e-2}
ADAMW_LEARNING_RATE = 2e-3
QUESTIONS = 24  # a scene
LOG_EVERY = 50
# A question follows its image at once, an answer its question after a space, and ends the text.
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>"
    "{% elif message['role'] == 'assistant' %} {{ part['text'] }}</s>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
# Which word asks for which patches is found all at once, sooner or later: the text aligns until it answers that many.
ALIGNED = 0.9
WORDS = (
    *SHAPES,
    *(f"{shape}s" for shape in SHAPES),
    *COLORS,
    *map(str, range(OBJECTS["hard"][1] + 1)),
    *[
        "?",
        "a",
        "are",
        "color",
        "contain",
        "does",
        "how",
        "image",
        "is",
        "many",
        "of",
        "present",
        "shape",
        "shapes",
        "the",
        "there",
        "what",
        "yes",
        "no",
    ],
)


def build_processor() -> LlavaProcessor:
    """Every word of the questions and answers is a token of its own."""
    names = [*SPECIAL.values(), "<image>", *WORDS]
    backend = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = Sequence([WhitespaceSplit(), Split("?", "isolated")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left", additional_special_tokens=["<image>"], **SPECIAL
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """About 5 M parameters, LLaVA-1.5's anatomy: CLIP tower, two-layer projector, Llama."""
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=SIDE,
            patch_size=PATCH,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            # A text model this narrow stays at chance for long with the library's 0.02.
            initializer_range=0.08,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    model = LlavaForConditionalGeneration(config)
    tower = model.model.vision_tower
    embeddings = next(weight for name, weight in tower.named_parameters() if name.endswith("position_embedding.weight"))
    with torch.no_grad():
        embeddings[1:] = 0.3 * grid_waves(SIDE // PATCH, embeddings.shape[1])
    return model


def grid_waves(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column `(side * side, width)`: position embeddings that start out smooth can be
    interpolated to smaller scenes from the first step."""
    angles = torch.arange(side).unsqueeze(1) * 30.0 ** (-torch.arange(width // 4) / (width // 4))
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows, columns = waves.unsqueeze(1).expand(-1, side, -1), waves.unsqueeze(0).expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, width)


def patch_classes(scene: Scene) -> np.ndarray:
    """For each patch 0 for ground, else 1 + the class (shape and color) of the object that covers an eighth of it."""
    side = scene.image.width // PATCH
    pixels, classes = np.asarray(scene.image), np.zeros((side, side), dtype=np.int64)
    for source, (left, top, right, bottom) in zip(scene.objects, scene.boxes):
        shape = np.zeros(pixels.shape[:2], dtype=bool)
        shape[top:bottom, left:right] = covered(pixels[top:bottom, left:right], source.ground)
        share = shape.reshape(side, PATCH, side, PATCH).mean((1, 3))
        classes[share >= min(1 / 8, share.max())] = (
            1 + SHAPES.index(source.shape) * len(COLORS) + COLORS.index(source.color)
        )
    return classes.reshape(-1)


def patch_middles(scene: Scene) -> np.ndarray:
    """True for each patch that holds the middle of an object's box."""
    side = scene.image.width // PATCH
    middles = np.zeros((side, side), dtype=bool)
    for left, top, right, bottom in scene.boxes:
        middles[(top + bottom) // 2 // PATCH, (left + right) // 2 // PATCH] = True
    return middles.reshape(-1)


def pixels_of(scenes: list[Scene], processor: LlavaProcessor) -> torch.Tensor:
    """`(scenes, 3, side, side)`, as the processor would make them (a scene needs no resizing)."""
    image = processor.image_processor
    values = torch.from_numpy(np.stack([np.asarray(scene.image) for scene in scenes])).float() / 255
    return ((values - torch.tensor(image.image_mean)) / torch.tensor(image.image_std)).permute(0, 3, 1, 2)


def pack_questions(
    asked: list[list[tuple[str, str]]], processor: LlavaProcessor, tokens: int
) -> dict[str, torch.Tensor]:
    """One row for each scene: the image of `tokens` tokens, then its questions with their answers side by side.

    Returns input_ids, position_ids, labels `(scenes, length)` and a 4D mask `(scenes, 1, length, length)`, in which a
    question sees the image and itself.
    """
    tokenizer = processor.tokenizer
    image = tokenizer.convert_tokens_to_ids("<image>")
    prefix = [tokenizer.bos_token_id] + [image] * tokens
    rows = []
    for questions in asked:
        ids, positions, labels, block = list(prefix), list(range(len(prefix))), [-100] * len(prefix), [0] * len(prefix)
        for number, (question, answer) in enumerate(questions, 1):
            words = tokenizer(question, add_special_tokens=False).input_ids
            reply = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            ids += words + reply
            labels += [-100] * len(words) + reply
            positions += range(len(prefix), len(prefix) + len(words) + len(reply))
            block += [number] * (len(words) + len(reply))
        rows.append((ids, positions, labels, block))
    length = max(len(ids) for ids, *_ in rows)
    fill = (tokenizer.pad_token_id, 0, -100, -1)
    ids, positions, labels, block = (
        torch.tensor([row[part] + [fill[part]] * (length - len(row[part])) for row in rows]) for part in range(4)
    )
    sees = (block.unsqueeze(2) == block.unsqueeze(1)) | (block.unsqueeze(1) == 0)
    mask = sees & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min).unsqueeze(1)
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "attention_mask": mask}


class VisionHeads(nn.Module):
    """What the first stage reads off the tower: each patch's shape, its color and whether it is an object's middle;
    off [CLS] in that layer and in the last, the classes of the scene.

    Shape and color have a head each: one direction for all that is round, whatever its color, is what a text model
    can read soon. A head for their 24 pairs leaves it a table to learn by heart.
    """

    def __init__(self, width: int):
        super().__init__()
        self.shape = nn.Linear(width, 1 + len(SHAPES))
        self.color = nn.Linear(width, 1 + len(COLORS))
        self.middle = nn.Linear(width, 1)
        self.scene = nn.ModuleList(nn.Linear(width, 1 + len(SHAPES) * len(COLORS)) for _ in range(2))

    def forward(self, layer, pooled, classes, middles) -> tuple[torch.Tensor, float]:
        """Loss, and the share of foreground patches whose shape and color are both right.

        Args:
            layer (`torch.FloatTensor` of shape `(scenes, 1 + patches, width)`): Hidden states that LLaVA reads.
            pooled (`torch.FloatTensor` of shape `(scenes, width)`): [CLS] after the last layer.
            classes (`torch.LongTensor` of shape `(scenes, patches)`): Of [`patch_classes`].
            middles (`torch.BoolTensor` of shape `(scenes, patches)`): Of [`patch_middles`].
        """
        patches, front = layer[:, 1:], classes > 0
        right, loss = front, 0.0
        shapes, colors = (classes - 1) // len(COLORS) + 1, (classes - 1) % len(COLORS) + 1
        for head, target in ((self.shape, shapes), (self.color, colors)):
            logits, target = head(patches), target * front
            weight = torch.ones(logits.shape[-1])
            weight[0] = 0.1  # most patches are ground
            loss = loss + F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight=weight)
            right = right & (logits.argmax(-1) == target)
        middle = self.middle(patches).squeeze(-1)
        loss = loss + F.binary_cross_entropy_with_logits(middle, middles.float(), pos_weight=torch.tensor(10.0))
        there = F.one_hot(classes, self.scene[0].out_features).amax(1).float()
        for head, token in zip(self.scene, (layer[:, 0], pooled)):
            loss = loss + 0.5 * F.binary_cross_entropy_with_logits(head(token), there)
        return loss, (right.sum() / front.sum()).item()


def plan_step(stage: str, step: int, progress: float, rng: random.Random) -> tuple[int, int, tuple[int, int]]:
    """How many scenes a step has, the side of their grid of cells, and how many objects (least, most) they may hold."""
    if stage == "vision":
        scenes, grid = (4, GRID) if step % 3 == 2 else (8, 2)
        return scenes, grid, (1, grid**2)
    if stage == "align":
        return 4, 2, (1, min(4, 2 + int(10 * progress)))
    return 4, GRID, rng.choice(((1, 3), OBJECTS["standard"], OBJECTS["hard"]))


def rate_at(stage: str, progress: float, step: int) -> float:
    """Share of the learning rate: a warm-up; then half a cosine for the tower; for the text, constant while it
    aligns and falling to nothing while it learns to answer."""
    shares = {"vision": 0.5 * (1 + math.cos(math.pi * progress)), "align": 1.0, "answer": 1 - progress}
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


def model_card(parameters: int, log: dict) -> str:
    """The model's README, from its log."""
    rows = []
    for stage in STAGES:
        entries = [entry for entry in log["log"] if entry["stage"] == stage]
        if entries:
            starts = [0] + [entry["step"] for entry in entries]
            steps = [entry["step"] - start for entry, start in zip(entries, starts)]
            minutes = sum(entry["seconds_per_step"] * count for entry, count in zip(entries, steps)) / 60
            last = entries[-1]
            rows.append(f"| {stage} | {last['step']} | {last['loss']:.3f} | {last['accuracy']:.3f} | {minutes:.0f} |")
    return CARD.format(parameters=parameters / 1e6, stages="\n".join(rows), every=LOG_EVERY, **log, **log["versions"])


class Run:
    """A training that can be cut off at any step and go on."""

    def __init__(self, folder: Path, seed: int, steps: dict[str, int]):
        self.folder, self.seed, self.steps = folder, seed, steps
        torch.manual_seed(seed)
        self.processor = build_processor()
        self.model = build_model(self.processor)
        # With a mask of its own for each scene, plain attention took less time than sdpa on the CPU it was tried on.
        self.model.set_attn_implementation("eager")
        self.heads = VisionHeads(self.model.config.vision_config.hidden_size)
        self.stage, self.step, self.log = STAGES[0], 0, []
        self.images = sources("train")
        self.optimizers = self._optimizers()
        if (folder / "run.pt").exists():
            self._resume()

    def _parameters(self) -> dict[str, nn.Parameter]:
        tower = self.model.model.vision_tower
        modules = {"tower": tower, "heads": self.heads}
        if self.stage != "vision":
            modules = {
                "projector": self.model.model.multi_modal_projector,
                "language_model": self.model.model.language_model,
                "lm_head": self.model.lm_head,
            }
        return {f"{part}.{name}": p for part, module in modules.items() for name, p in module.named_parameters()}

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        def is_matrix(name: str, parameter: nn.Parameter) -> bool:
            return parameter.ndim == 2 and (".layers." in name or name.startswith("projector."))

        named = self._parameters().items()
        matrices = [parameter for name, parameter in named if is_matrix(name, parameter)]
        others = [parameter for name, parameter in named if not is_matrix(name, parameter)]
        return [
            torch.optim.Muon(matrices, lr=LEARNING_RATE[self.stage], weight_decay=0.01),
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
        (self.folder / "README.md").write_text(model_card(self.model.num_parameters(), log))

    def loss(self) -> tuple[torch.Tensor, float]:
        """Loss of one fresh batch, made from the seed and the step alone, and the accuracy that shows progress."""
        rng = random.Random(f"{self.seed} {self.stage} {self.step}")
        number, grid, objects = plan_step(self.stage, self.step, self.step / self.steps[self.stage], rng)
        scenes = [make_scene(rng, self.images, objects, grid=grid) for _ in range(number)]
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
        asked = []
        for scene in scenes:
            questions = []
            while len(questions) < QUESTIONS:
                question = ask(rng, scene, rng.choice(KINDS))
                if question is not None:
                    questions.append(question)
            asked.append(questions)
        tokens = (grid * CELL // PATCH) ** 2
        batch = pack_questions(asked, self.processor, tokens)
        labels, ids = batch.pop("labels"), batch.pop("input_ids")
        with torch.autocast("cpu", torch.bfloat16):
            features = self.model.model.multi_modal_projector(layer[:, 1:])
            words = self.model.get_input_embeddings()(ids)
            embeds = torch.cat([words[:, :1], features.to(words.dtype), words[:, 1 + tokens :]], dim=1)
            hidden = self.model.model.language_model(inputs_embeds=embeds, **batch, use_cache=False).last_hidden_state
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

    def train(self, save_every: int) -> None:
        for stage in STAGES[STAGES.index(self.stage) :]:
            if stage != self.stage:
                self.stage, self.step = stage, 0
                self.optimizers = self._optimizers()
            self._train_stage(save_every)
        self.save()

    def _train_stage(self, save_every: int) -> None:
        total, parameters = self.steps[self.stage], list(self._parameters().values())
        recent, start = [], time.perf_counter()
        bar = tqdm(desc=self.stage, initial=self.step, total=total, mininterval=10)
        while not self._stage_is_over():
            share = rate_at(self.stage, self.step / total, self.step)
            for optimizer, rate in zip(self.optimizers, (LEARNING_RATE[self.stage], ADAMW_LEARNING_RATE)):
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


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=3, default=(2500, 1800, 1500), metavar=STAGES)
    parser.add_argument("--save-every", type=positive, default=200)
    parser.add_argument("--threads", type=positive, default=2)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        run = Run(arguments.output, arguments.seed, dict(zip(STAGES, arguments.steps)))
    except (ImportError, OSError, ValueError) as error:
        print(f"train_tiny_llava: {error}", file=sys.stderr)
        return 2
    run.train(arguments.save_every)
    run.export()
    return 0


if __name__ == "__main__":
    sys.exit(main())
