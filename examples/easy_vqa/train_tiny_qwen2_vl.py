"""Trains the small Qwen2-VL of this folder, on the scenes of the small LLaVA, from which its text model comes.

    python examples/easy_vqa/train_tiny_qwen2_vl.py --output runs/tiny-qwen2-vl [--seed 0]

Only transformers' own classes, and never with tokens dropped. Its tokens are as large as the small LLaVA's, 8 x 8
pixels, and its text model is the same but for biases and rotary positions. So it learns in two stages:

1. `vision`: the tower, on the class of the object under each token and on where its middle is; and, from what the tower
   tells, the merger, to make the tokens that the small LLaVA's tower and projector make of the scene.
2. `answer`: merger and language model, now with M-RoPE's positions, on scenes of one to three rows and one to four
   columns, whose cells are cut closer to their shapes as well. The tower is frozen from then on.

Every question of a scene is answered in one sequence, as in train_tiny_llava.py.
"""

import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, LlavaForConditionalGeneration

import tiny_llava
from scenes import CELL, GRID, OBJECTS, Scene, make_scene, sources
from tiny_llava import PatchHeads, patch_classes, patch_middles
from tiny_qwen2_vl import TOKEN, build_model, build_processor, pack_questions, pixels_of, start_from_llava
from train_tiny_llava import Plan, Run, questions_about, run_command

STEPS = {"vision": 1800, "answer": 900}
LLAVA = Path(__file__).parent / "tiny-llava"


def plan_step(stage: str, rng: random.Random) -> Plan:
    if stage == "vision":
        grid = rng.choice(((1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (3, 3)))
        return Plan(max(2, 16 // (grid[0] * grid[1])), grid, (1, min(grid[0] * grid[1], OBJECTS["hard"][1])))
    objects = rng.choice(((1, 3), OBJECTS["standard"], OBJECTS["hard"]))
    if rng.random() < 0.4:
        plan = Plan(4, (GRID, GRID), objects)
    else:
        grid, cell = (rng.randint(1, GRID), rng.randint(1, GRID + 1)), rng.choice((24, 32, 40, 48, CELL, CELL))
        plan = Plan(1, grid, (1, min(grid[0] * grid[1], OBJECTS["hard"][1])), cell)
        plan = replace(plan, scenes=max(2, min(12, 3 * Plan(1, (GRID, GRID), objects).tokens // plan.tokens)))
    # Numbers are the hardest.
    return replace(plan, questions=12, kinds=("color", "shape", "presence", "presence", *4 * ("count",)), distinct=True)


CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
---

# A small Qwen2-VL for scenes of easy-vqa images

Tower with rotary positions, merger of 2 x 2 patches, Qwen2 text model with M-RoPE: Qwen2-VL's anatomy with
{parameters:.1f} M parameters, at native resolution (a scene of 192 x 192 pixels has 576 vision tokens). It answers
questions by color, shape, presence and count about scenes of up to six shapes, and nothing else: a bench for token
pruning. Trained by `examples/easy_vqa/train_tiny_qwen2_vl.py --seed {seed}` on train images of
[easy-vqa](https://pypi.org/project/easy-vqa/), never with tokens dropped; its text model began as the small LLaVA's.
Weights are stored in float16 and load as float32.

Its processor is code of this folder, for images alone: Qwen2-VL's own needs torchvision for its videos.

| stage | steps | loss | accuracy on its training batches | minutes |
|---|---|---|---|---|
{stages}

The accuracy of `vision` is the share of objects' tokens whose shape and color are both told right.
{threads} thread(s), {machine}; torch {torch}, transformers {transformers}. `log.json` has every {every} steps.
"""


class QwenRun(Run):
    learning_rate = {"vision": 2e-2, "answer": 1e-2}
    card = CARD
    layers = (".layers.", ".blocks.", "merger.")

    def build(self) -> None:
        self.processor = build_processor()
        self.model = build_model(self.processor)
        self.llava = LlavaForConditionalGeneration.from_pretrained(LLAVA).eval()
        self.llava_processor = tiny_llava.build_processor()
        start_from_llava(self.model, self.processor, self.llava, AutoTokenizer.from_pretrained(LLAVA))
        self.model.model.language_model.set_attn_implementation("eager")
        # The small LLaVA's tokens are large and have much in common: the merger learns them about their mean, in units
        # of their deviation, and is given both when it has learned them.
        rng = random.Random(0)
        tokens = self.llava_tokens([make_scene(rng, sources("train"), OBJECTS["standard"]) for _ in range(8)])
        self.mean, self.scale = tokens.mean(0), tokens.var(0).mean().sqrt()
        vision = self.model.config.vision_config
        self.heads = PatchHeads(vision.embed_dim * vision.spatial_merge_size**2)

    def modules(self) -> dict[str, nn.Module]:
        if self.stage == "vision":
            return {"tower": self.model.model.visual, "heads": self.heads}
        parts = {"language_model": self.model.model.language_model, "lm_head": self.model.lm_head}
        return {"merger": self.model.model.visual.merger, **parts}

    @torch.no_grad()
    def llava_tokens(self, scenes: list[Scene]) -> torch.Tensor:
        """What the small LLaVA's text model is given of the scenes: `(tokens of all, 192)` float32."""
        pixels = tiny_llava.pixels_of(scenes, self.llava_processor)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = self.llava.model.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
        return torch.cat(list(tokens)).float()

    def begin(self, stage: str) -> None:
        super().begin(stage)
        if stage == "answer":
            last = self.model.model.visual.merger.mlp[-1]
            with torch.no_grad():
                last.weight *= self.scale
                last.bias.mul_(self.scale).add_(self.mean)

    def loss(self) -> tuple[torch.Tensor, float]:
        rng = random.Random(f"{self.seed} {self.stage} {self.step}")
        plan = plan_step(self.stage, rng)
        scenes = self.make_scenes(plan, rng)
        visual = self.model.model.visual
        pixels, grids = pixels_of(scenes, self.processor)
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(self.stage == "vision"):
            encoded = visual(pixels, grids)
        if self.stage == "vision":
            with torch.autocast("cpu", torch.bfloat16):
                made = visual.merger(encoded.last_hidden_state.detach())
            left = F.mse_loss(made.float(), (self.llava_tokens(scenes) - self.mean) / self.scale)
            classes, middles = (
                torch.from_numpy(np.stack([f(s) for s in scenes])) for f in (patch_classes, patch_middles)
            )
            features = encoded.last_hidden_state.float().view(*classes.shape, -1)
            loss, right = self.heads(features, classes, middles)
            return left + loss, right
        asked = [questions_about(scene, plan, rng) for scene in scenes]
        rows, columns = (side * plan.cell // TOKEN for side in plan.grid)
        batch = pack_questions(asked, self.processor, (rows, columns))
        labels, ids = batch.pop("labels"), batch.pop("input_ids")
        with torch.autocast("cpu", torch.bfloat16):
            features = visual.merger(encoded.last_hidden_state)
            words = self.model.get_input_embeddings()(ids)
            image = (ids == self.processor.image_token_id).unsqueeze(-1)
            embeds = words.masked_scatter(image, features.to(words.dtype))
            hidden = self.model.model.language_model(inputs_embeds=embeds, **batch, use_cache=False).last_hidden_state
        return self.answer_loss(hidden, labels)


def main(argv: list[str] | None = None) -> int:
    return run_command(QwenRun, __doc__.splitlines()[0], STEPS, argv)


if __name__ == "__main__":
    sys.exit(main())
