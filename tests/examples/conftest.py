# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Photo-VQA: a tokenizer, stamps and grounds, features, and the photo model in tiny."""

import io
import random

import pytest
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

import build
import packages
import photo_llava
import projector
import prompts
import text_model
from photo_scenes import SETS, Scene, make_scene
from questions import NUMBERS, training_questions
from stamps import KINDS
from tiny_photo import ASKED, PIECES, SPECIAL, scene_of, tiny_text, tiny_tower, write_features


@pytest.fixture(scope="session")
def tokenizer():
    texts = [prompts.START, "\nQuestion:\nAnswer:", *(f" {word}" for word in (*KINDS, *NUMBERS, "left", "right"))]
    texts += [f"\nQuestion: {question}\nAnswer: {answer}" for question, answer in ASKED]
    for number in range(200):
        for one in training_questions(scene_of(number), random.Random(number)):
            texts.append(f" {one.question} {' '.join(one.choices)}")
    words = {piece for text in texts for piece, _ in Split(PIECES, "isolated").pre_tokenize_str(text)}
    names = list(dict.fromkeys([*SPECIAL.values(), text_model.SPARE, *sorted(words)]))
    backend = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = Split(PIECES, "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left", additional_special_tokens=[text_model.SPARE], **SPECIAL
    )


@pytest.fixture(scope="session")
def renamed(tokenizer, tmp_path_factory):
    """The same with a place for the image, as text_model.py makes it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    text_model._rename_token(folder, tokenizer)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture
def features(tmp_path):
    write_features(tmp_path / "features/train", range(6))
    write_features(tmp_path / "features/validation", range(100, 102), "validation")
    return tmp_path / "features"


@pytest.fixture(scope="module")
def joined(renamed):
    """A text model with low-rank layers that are not zero, a projector, a tower; and the stock model made of them."""
    tower, text = tiny_tower(), tiny_text(renamed)
    plain = tiny_text(renamed)
    torch.manual_seed(2)
    low_rank = photo_llava.adapt(text)
    for weight in low_rank.values():
        weight.data.normal_(std=0.2)
    config = photo_llava.build_config(tower.config, text.config, renamed.convert_tokens_to_ids("<image>"))
    start = projector.LlavaMultiModalProjector(config)
    trained = {f"projector.{name}": weight for name, weight in start.state_dict().items()}
    trained |= {f"text.{name}": weight.detach() for name, weight in low_rank.items()}
    return text, start, low_rank, tower, build.assemble(tower, plain, renamed, trained)


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> packages.Packages:
    """Asked stamps are red, others blue, grounds gray; all in the layout of unpacked packages."""
    folder = tmp_path_factory.mktemp("packages")
    rng = random.Random(0)
    paths = {name: packages._path(folder, *piece) for name, piece in packages.PIECES.items()}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    for kind in KINDS.values():
        for file in kind.files:
            stamp = Image.new("RGBA", (rng.randint(50, 90), rng.randint(50, 90)))
            box = (3, 3, stamp.width - 4, stamp.height - 4)
            ImageDraw.Draw(stamp).ellipse(box, fill=(220, 0, 0, 255) if kind.asked else (0, 0, 220, 255))
            path = paths["stamps"] / file
            path.parent.mkdir(parents=True, exist_ok=True)
            stamp.save(path)
    for piece, files in packages.GROUNDS.items():
        for file in files:
            path = paths[piece] / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (400, 360), (120, 120, 120)).save(path)
    images = [Image.new("RGB", (320, 300), (120, 120, 120))] * 49 + [Image.new("RGB", (64, 64))] * 3
    written = []
    for image in images:
        image.save(buffer := io.BytesIO(), "WEBP", lossless=True, method=0)
        written.append(buffer.getvalue())
    paths["monuments"].write_bytes(b"qres" + b"\0name".join(written))
    paths["tower"].write_bytes(b"onnx")
    paths["text"].write_bytes(b"gguf")
    return packages.find(folder)


@pytest.fixture(scope="session")
def scenes(material) -> dict[str, list[Scene]]:
    return {set_: [make_scene(material, 0, set_, number) for number in range(12)] for set_ in SETS}
