# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The photo model in tiny, with random weights: scenes, tower, text model, features, a training run."""

import json
import random

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Regex
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

import train_base
from photo_scenes import Object, Scene
from stamps import KINDS

ASKED = [("Is there a cow?", "yes"), ("How many cows are there?", "two"), ("Which is largest?", "cow")]
# A word with the space before it, a mark, a newline.
PIECES = Regex(r"<\|?\w+\|?>| ?\w+| ?[^\w\s]|\s")
SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "pad_token": "<|endoftext|>"}


def scene_of(number: int, set_: str = "train") -> Scene:
    """Four objects in corners, of which the fourth is not asked about."""
    rng = random.Random(number)
    names = rng.sample([name for name, kind in KINDS.items() if kind.asked], 3)
    objects, coverage = [], np.zeros((4, 24, 24), np.float16)
    for place, name in enumerate([*names, "coin"]):
        left, top, side = 168 * (place % 2) + 20, 168 * (place // 2) + 20, 100 - 10 * place
        box = (left, top, left + side, top + side)
        objects.append(Object(name, KINDS[name].merged, KINDS[name].files[0], box, side**2, KINDS[name].asked))
        coverage[place, top // 14 : (top + side) // 14, left // 14 : (left + side) // 14] = 1
    return Scene(0, set_, number, "none", tuple(objects), coverage=coverage)


def tiny_tower() -> Dinov2Model:
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=12, num_attention_heads=2, mlp_ratio=2, image_size=336, patch_size=14
    )
    torch.manual_seed(0)
    tower = Dinov2Model(config).eval()
    for layer in tower.encoder.layer:
        layer.layer_scale1.lambda1.data.fill_(1.0)
    return tower


def tiny_text(tokenizer, bfloat16=False) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=36,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        # Wide enough that attention is far from uniform.
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    text = LlamaForCausalLM(config).eval()
    text.config.dtype = torch.bfloat16 if bfloat16 else torch.float32
    return text.to(text.config.dtype)


def write_features(folder, numbers, set_="train"):
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [scene_of(number, set_) for number in numbers]
    layers = torch.stack([torch.randn(577, 24, generator=torch.Generator().manual_seed(n)) for n in numbers])
    coverage = torch.cat([torch.from_numpy(scene.coverage) for scene in scenes])
    save_file({"layer": layers.half(), "coverage": coverage}, folder / "00000.safetensors")
    records = [scene.record() | {"pixels": ""} for scene in scenes]
    (folder / "00000.json").write_text(json.dumps({"made_of": {"fold": 0}, "scenes": records}))


def start_run(tmp_path, features, tokenizer, name="run", sequences=8, **arguments):
    text, tower = tiny_text(tokenizer), tiny_tower()
    return train_base.Run(tmp_path / name, text, tokenizer, tower, features, sequences, **arguments)


def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (336, 336, 3), dtype=np.uint8))
