"""Trains the small LLaVA of this folder from scratch, in the usual stages, on scenes of easy-vqa images.

    python examples/easy_vqa/train_tiny_llava.py --output runs/tiny-llava [--seed 0] [--steps 1500 600 6000]

Only transformers' own classes, and never with tokens dropped: robustness to pruning is not trained in.

1. `vision`: the vision tower, on the class of the object under each patch, read from the very layer that LLaVA reads;
   its [CLS] token on which classes the scene holds.
2. `align`: projector and language model, the tower frozen, on scenes of one object, then more.
3. `answer`: all together.

Every question of a scene is answered in one sequence: it sees the image and itself, not its neighbours (a
block-causal mask), at the positions it has alone.

A checkpoint is written every `--save-every` steps; the same command goes on from it.
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
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

from scenes import COLORS, KINDS, OBJECTS, SHAPES, SIDE, Scene, ask, make_scene, sources

PATCH = 8
TOKENS = (SIDE // PATCH) ** 2
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
STAGES = ("vision", "align", "answer")
LEARNING_RATE = {"vision": 1e-3, "align": 1e-3, "answer": 6e-4}
SCENES, QUESTIONS = 8, 8  # a step
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
        chat_template="<s><image>{{ messages[0]['content'][1]['text'] }}",
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
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=1024,
            # A text model this narrow stays at chance for long with the library's 0.02.
            initializer_range=0.08,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=TOKENS,
    )
    return LlavaForConditionalGeneration(config)


def patch_classes(scene: Scene) -> np.ndarray:
    """For each patch 0 for ground, else 1 + the class (shape and color) of the object whose box covers its middle."""
    classes = np.zeros((SIDE // PATCH, SIDE // PATCH), dtype=np.int64)
    for source, (left, top, right, bottom) in zip(scene.objects, scene.boxes):
        number = 1 + SHAPES.index(source.shape) * len(COLORS) + COLORS.index(source.color)
        middle = (np.arange(SIDE // PATCH) + 0.5) * PATCH
        # A small shape may cover no patch's middle: the patches that it touches by half a side count.
        rows = (middle > top - PATCH / 2) & (middle < bottom + PATCH / 2)
        columns = (middle > left - PATCH / 2) & (middle < right + PATCH / 2)
        classes[np.ix_(rows, columns)] = number
    return classes.reshape(-1)


def pixels_of(scenes: list[Scene], processor: LlavaProcessor) -> torch.Tensor:
    """`(scenes, 3, 192, 192)`, as the processor would make them (a scene needs no resizing)."""
    image = processor.image_processor
    values = torch.from_numpy(np.stack([np.asarray(scene.image) for scene in scenes])).float() / 255
    return ((values - torch.tensor(image.image_mean)) / torch.tensor(image.image_std)).permute(0, 3, 1, 2)


def pack_questions(asked: list[list[tuple[str, str]]], processor: LlavaProcessor) -> dict[str, torch.Tensor]:
    """One row for each scene: the image, then its questions with their answers side by side.

    Returns input_ids, position_ids, labels `(scenes, length)` and a 4D mask `(scenes, 1, length, length)`, in which a
    question sees the image and itself.
    """
    tokenizer = processor.tokenizer
    image = tokenizer.convert_tokens_to_ids("<image>")
    prefix = [tokenizer.bos_token_id] + [image] * TOKENS
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
    """What the first stage reads off the tower: a class for each patch, and the classes of the scene."""

    def __init__(self, width: int):
        super().__init__()
        classes = len(SHAPES) * len(COLORS)
        self.patch = nn.Linear(width, 1 + classes)
        self.scene = nn.Linear(width, classes)

    def forward(self, hidden_states: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Loss and the share of foreground patches that are right."""
        logits = self.patch(hidden_states[:, 1:])
        weight = torch.ones(logits.shape[-1])
        weight[0] = 0.1  # most patches are ground
        loss = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), weight=weight)
        there = F.one_hot(classes, logits.shape[-1]).amax(1)[:, 1:].float()
        loss = loss + F.binary_cross_entropy_with_logits(self.scene(hidden_states[:, 0]), there)
        front = classes > 0
        return loss, (logits.argmax(-1) == classes)[front].float().mean().item()


def objects_at(stage: str, progress: float, rng: random.Random) -> tuple[int, int]:
    """The curriculum: how many objects (least, most) a scene may hold."""
    if stage == "vision":
        return 1, 6
    if stage == "align":
        return 1, 1 + int(progress * 3)
    return rng.choice(((1, 3), OBJECTS["standard"], OBJECTS["standard"], OBJECTS["hard"]))


class Run:
    """A training that can be cut off at any step and go on."""

    def __init__(self, folder: Path, seed: int, steps: dict[str, int]):
        self.folder, self.seed, self.steps = folder, seed, steps
        torch.manual_seed(seed)
        self.processor = build_processor()
        self.model = build_model(self.processor)
        self.heads = VisionHeads(self.model.config.vision_config.hidden_size)
        self.stage, self.step, self.log = STAGES[0], 0, []
        self.images = sources("train")
        self.optimizer = self._optimizer()
        if (folder / "run.pt").exists():
            self._resume()

    def _parameters(self) -> list[nn.Parameter]:
        tower = self.model.model.vision_tower
        if self.stage == "vision":
            return [*tower.parameters(), *self.heads.parameters()]
        frozen = set(tower.parameters()) if self.stage == "align" else set()
        return [parameter for parameter in self.model.parameters() if parameter not in frozen]

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self._parameters(), lr=LEARNING_RATE[self.stage], weight_decay=0.01, betas=(0.9, 0.98))

    def _resume(self) -> None:
        state = torch.load(self.folder / "run.pt", weights_only=True)
        if state["seed"] != self.seed or state["steps"] != self.steps:
            raise ValueError(f"{self.folder} holds a run of another seed or length; choose another --output.")
        self.stage, self.step, self.log = state["stage"], state["step"], state["log"]
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimizer = self._optimizer()
        self.optimizer.load_state_dict(state["optimizer"])

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {"seed": self.seed, "steps": self.steps, "stage": self.stage, "step": self.step, "log": self.log}
        state |= {"model": self.model.state_dict(), "heads": self.heads.state_dict()}
        # Renamed when whole: a run that is killed while it writes keeps its last checkpoint.
        torch.save({**state, "optimizer": self.optimizer.state_dict()}, self.folder / "run.tmp")
        (self.folder / "run.tmp").rename(self.folder / "run.pt")
        (self.folder / "log.json").write_text(json.dumps(self.log, indent=1))

    def loss(self) -> tuple[torch.Tensor, float]:
        """Loss of one fresh batch, made from the seed and the step alone, and the accuracy that shows progress."""
        progress = self.step / self.steps[self.stage]
        rng = random.Random(f"{self.seed} {self.stage} {self.step}")
        scenes = [make_scene(rng, self.images, objects_at(self.stage, progress, rng)) for _ in range(SCENES)]
        pixels = pixels_of(scenes, self.processor)
        if self.stage == "vision":
            classes = torch.from_numpy(np.stack([patch_classes(scene) for scene in scenes]))
            tower = self.model.model.vision_tower(pixels, output_hidden_states=True)
            return self.heads(tower.hidden_states[self.model.config.vision_feature_layer], classes)
        asked = []
        for scene in scenes:
            tries = (ask(rng, scene, rng.choice(KINDS)) for _ in iter(int, 1))
            questions = (question for question in tries if question is not None)
            asked.append([next(questions) for _ in range(QUESTIONS)])
        batch = pack_questions(asked, self.processor)
        labels = batch.pop("labels")
        supervised = labels[:, 1:] != -100
        hidden = self.model.model(pixel_values=pixels, **batch, use_cache=False).last_hidden_state[:, :-1][supervised]
        logits, targets = self.model.lm_head(hidden), labels[:, 1:][supervised]
        answers = targets != self.processor.tokenizer.eos_token_id
        right = (logits.argmax(-1) == targets)[answers].float().mean().item()
        return F.cross_entropy(logits, targets), right

    def train(self, save_every: int) -> None:
        while True:
            total, parameters = self.steps[self.stage], self._parameters()
            self.model.requires_grad_(False)
            for parameter in parameters:
                parameter.requires_grad_(True)
            self.model.train()
            recent, start = [], time.perf_counter()
            bar = tqdm(range(self.step, total), desc=self.stage, initial=self.step, total=total, mininterval=10)
            for step in bar:
                self.step = step
                warm, left = min(1.0, (step + 1) / 100), 0.5 * (1 + math.cos(math.pi * step / total))
                for group in self.optimizer.param_groups:
                    group["lr"] = LEARNING_RATE[self.stage] * warm * max(left, 0.05)
                loss, accuracy = self.loss()
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                self.optimizer.step()
                recent.append((loss.item(), accuracy))
                if (step + 1) % 50 == 0:
                    mean_loss, mean_accuracy = np.mean(recent, axis=0).round(4).tolist()
                    seconds = round((time.perf_counter() - start) / len(recent), 3)
                    entry = {"stage": self.stage, "step": step + 1, "loss": mean_loss, "accuracy": mean_accuracy}
                    self.log.append({**entry, "seconds_per_step": seconds})
                    bar.set_postfix(loss=mean_loss, accuracy=mean_accuracy)
                    recent, start = [], time.perf_counter()
                if (step + 1) % save_every == 0:
                    self.step = step + 1
                    self.save()
            if self.stage == STAGES[-1]:
                self.step = total
                return
            self.stage, self.step = STAGES[STAGES.index(self.stage) + 1], 0
            self.optimizer = self._optimizer()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=3, default=(1500, 600, 6000), metavar=STAGES)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        run = Run(arguments.output, arguments.seed, dict(zip(STAGES, arguments.steps)))
    except (ImportError, ValueError) as error:
        print(f"train_tiny_llava: {error}", file=sys.stderr)
        return 2
    run.train(arguments.save_every)
    run.model.save_pretrained(arguments.output)
    run.processor.save_pretrained(arguments.output)
    (arguments.output / "log.json").write_text(json.dumps(run.log, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
