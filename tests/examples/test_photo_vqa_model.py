# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The photo model on tiny random weights: prompts, what is trained, its start, its training, its checkpoint."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoProcessor,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.compare import build_prompt

import build
import photo_llava
import projector
import prompts
import text_model
import train_base
from packages import Packages
from photo_scenes import Object, Scene
from questions import NUMBERS, training_questions
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


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def renamed(tokenizer, tmp_path_factory):
    """The same with a place for the image, as text_model.py makes it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    text_model._rename_token(folder, tokenizer)
    return PreTrainedTokenizerFast.from_pretrained(folder)


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


@pytest.fixture
def features(tmp_path):
    write_features(tmp_path / "features/train", range(6))
    write_features(tmp_path / "features/validation", range(100, 102), "validation")
    return tmp_path / "features"


@pytest.fixture(autouse=True)
def _short_lookup(monkeypatch):
    monkeypatch.setattr(train_base, "LOOKUP_EPOCHS", 1)


def start_run(tmp_path, features, tokenizer, name="run", sequences=8, **arguments):
    text, tower = tiny_text(tokenizer), tiny_tower()
    return train_base.Run(tmp_path / name, text, tokenizer, tower, features, sequences, **arguments)


def messages_of(asked, answered):
    found = []
    for number, (question, answer) in enumerate(asked):
        image = [{"type": "image"}] if number == 0 else []
        found.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        found.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return found if answered else found[:-1]


def test_the_placeholder_takes_the_spare_token(tokenizer, renamed):
    assert len(renamed) == len(tokenizer)
    assert renamed.convert_tokens_to_ids("<image>") == tokenizer.convert_tokens_to_ids(text_model.SPARE)
    assert renamed("<image>\nQuestion").input_ids[0] == renamed.convert_tokens_to_ids("<image>")
    assert "<image>" in renamed.all_special_tokens
    assert "<empty_output>" not in renamed.get_vocab()


def test_prompts(renamed):
    processor = prompts.build_processor(renamed)
    first = "<|im_start|>user\n<image>\nQuestion: Is there a cow?\nAnswer:"
    assert build_prompt(processor, "Is there a cow?") == first
    rest = " yes<|im_end|>\nQuestion: How many cows are there?\nAnswer:"
    assert processor.apply_chat_template(messages_of(ASKED[:2], False), add_generation_prompt=True) == first + rest
    assert processor.apply_chat_template(messages_of(ASKED[:2], True)) == f"{first}{rest} two<|im_end|>"
    plain = [{"role": "user", "content": "Is there a cow?"}]
    assert renamed.apply_chat_template(plain, chat_template=prompts.CHAT_TEMPLATE, tokenize=False) == first.replace(
        "<image>", ""
    )
    inputs = processor(images=Image.new("RGB", (336, 336)), text=first, return_tensors="pt")
    assert (inputs["input_ids"] == renamed.convert_tokens_to_ids("<image>")).sum() == prompts.TOKENS == 576
    assert inputs["pixel_values"].shape == (1, 3, 336, 336)


def test_every_answer_is_one_token(renamed):
    packer = prompts.Packer(renamed)
    with pytest.raises(ValueError, match="' two cows' is not one token"):
        packer.pack([("How many?", "two cows")], apart=True)


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


def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (336, 336, 3), dtype=np.uint8))


def run_packed(joined, tokenizer, apart, chunk):
    """Logits of the training's own forward, from hidden state 8."""
    text, start, _, tower, _ = joined
    processor = prompts.build_processor(tokenizer)
    pixels = processor(images=photo(), text="<image>", return_tensors="pt")["pixel_values"]
    text.set_attn_implementation(photo_llava.ATTENTION)
    with torch.no_grad():
        before = tower(pixels, output_hidden_states=True).hidden_states[train_base.LAYER]
        patches = tower.encoder.layer[train_base.LAYER](before)[0, 1:]
    packer = prompts.Packer(tokenizer, chunk=chunk)
    packed = packer.pack(ASKED, apart)
    return photo_llava.run(text, start, packer.start, patches, packed), packed


@pytest.mark.parametrize("chunk", [20, 160, 2000])
def test_packed_questions_are_what_the_stock_model_answers_alone(joined, renamed, chunk):
    with torch.no_grad():
        logits, packed = run_packed(joined, renamed, True, chunk)
        processor, alone, ends = prompts.build_processor(renamed), [], []
        for question, answer in ASKED:
            inputs = processor(
                images=photo(), text=build_prompt(processor, question) + f" {answer}", return_tensors="pt"
            )
            last = joined[-1](**inputs).logits[0, -2:]
            alone.append(last[0])
            ends.append(last[1])
    assert (logits - torch.stack(alone + ends)).abs().max() < 1e-4
    assert packed.targets.tolist()[3:] == 3 * [renamed.eos_token_id]


@pytest.mark.parametrize("chunk", [20, 160])
def test_turns_are_what_the_stock_model_reads(joined, renamed, chunk):
    processor = prompts.build_processor(renamed)
    text = processor.apply_chat_template(messages_of(ASKED, True))
    inputs = processor(images=photo(), text=text, return_tensors="pt")
    with torch.no_grad():
        logits, packed = run_packed(joined, renamed, False, chunk)
        stock = joined[-1](**inputs).logits[0]
    prefix = len(prompts.Packer(renamed).start) + 576
    assert packed.ids.tolist() == inputs["input_ids"][0, prefix:].tolist()
    assert packed.positions.tolist() == list(range(len(stock)))
    assert inputs["input_ids"][0, packed.rows + 1].tolist() == packed.targets.tolist()
    assert (logits - stock[packed.rows]).abs().max() < 1e-4


def test_gradients_are_those_of_the_stock_model(joined, renamed):
    """Of the projector, through every layer; and of a low-rank layer, whose product with the other factor is known."""
    _, start, low_rank, _, stock = joined
    processor = prompts.build_processor(renamed)
    text = processor.apply_chat_template(messages_of(ASKED, True))
    inputs = processor(images=photo(), text=text, return_tensors="pt")
    logits, packed = run_packed(joined, renamed, False, 50)
    name = "model.layers.0.self_attn.k_proj"
    weights = [*start.parameters(), low_rank[f"{name}.up"]]
    *fast, up = torch.autograd.grad(photo_llava.answer_loss(logits, packed), weights)
    whole = stock.get_submodule(name.replace("model.", "model.language_model.")).weight
    loss = photo_llava.answer_loss(stock(**inputs).logits[0, packed.rows], packed)
    *plain, whole = torch.autograd.grad(loss, [*stock.model.multi_modal_projector.parameters(), whole])
    plain.append(photo_llava.LowRank.scale * whole @ low_rank[f"{name}.down"].T)
    for one, other in zip([*fast, up], plain):
        assert other.abs().max() > 1e-4
        assert (one - other).abs().max() < 1e-4 * other.abs().max()


def test_only_projector_and_low_rank_layers_learn(joined):
    text, _, low_rank, _, _ = joined
    assert {name for name, weight in text.named_parameters() if weight.requires_grad} == set(low_rank)
    assert len(low_rank) == 2 * 2 * len(photo_llava.ADAPTED)


def test_patches_are_named_by_what_covers_them():
    scene = scene_of(0)
    names = projector.patch_names(scene).view(24, 24)
    assert names[2, 2] == projector.NAMES.index(scene.objects[0].name)
    assert names[14, 14] == projector.NAMES.index("coin")
    assert (names == projector.GROUND).sum() == 576 - (scene.coverage > 0).sum()


def test_the_projector_becomes_a_lookup_of_words(renamed):
    """Of patches that are easy to tell, most become their own word at their own place."""
    text, tower = tiny_text(renamed), tiny_tower()
    words = projector.Lookup(text, prompts.Packer(renamed))
    config = photo_llava.build_config(tower.config, text.config, 0)
    generator = torch.Generator().manual_seed(0)
    names = torch.randint(0, projector.GROUND + 1, (6000,), generator=generator)
    looks = torch.randn(projector.GROUND + 1, 24, generator=generator) * 3 + 5
    patches = looks[names] + 0.1 * torch.randn(6000, 24, generator=generator)
    numbers = torch.randint(0, 576, (6000,), generator=generator)
    fitted, right = projector.fit(config, words, patches.half(), names, numbers, epochs=80, seed=0)
    assert right > 0.9
    output = fitted(patches).detach()
    distances = words.distances(output, words.shift(numbers, 24))
    assert (distances.argmin(1) == names).float().mean() > 0.9


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, features, renamed, monkeypatch):
    whole = start_run(tmp_path, features, renamed, "whole")
    whole.train_on()
    first = start_run(tmp_path, features, renamed)
    step = first.step
    monkeypatch.setattr(first, "step", lambda: (step(), first.stop())[0])
    first.train_on()
    assert first.sequence == 4
    again = start_run(tmp_path, features, renamed)
    assert again.sequence == 4
    again.train_on()
    for name, weight in whole.trained().items():
        assert torch.equal(weight, again.trained()[name]), name
    moved = torch.load(tmp_path / "whole/run.pt", weights_only=True)["trained"]
    assert all(moved[name].abs().max() > 0 for name in moved if name.endswith(".up"))
    log = json.loads((tmp_path / "run/photo-llava.json").read_text())
    assert log["done"] == 8
    assert [entry["sequence"] for entry in log["log"] if "loss" in entry] == [4, 8]
    assert [sorted(entry) for entry in log["log"] if "said" in entry] == 2 * [
        ["among_choices", "minutes", "said", "sequence"]
    ]


def test_two_sequences_at_a_time_change_nothing(tmp_path, features, renamed):
    alone, beside = (start_run(tmp_path, features, renamed, str(threads), threads=threads) for threads in (1, 2))
    alone.train_on()
    beside.train_on()
    for name, weight in alone.trained().items():
        assert torch.equal(weight, beside.trained()[name]), name
    assert alone.validate() == beside.validate()


def test_a_finished_run_trains_nothing(tmp_path, features, renamed):
    start_run(tmp_path, features, renamed, sequences=2).train_on()
    before = (tmp_path / "run/run.pt").stat().st_mtime_ns
    again = start_run(tmp_path, features, renamed, sequences=2)
    again.train_on()
    assert (tmp_path / "run/run.pt").stat().st_mtime_ns == before


def test_added_scenes_take_part_from_the_next_pass(tmp_path, features, renamed):
    run = start_run(tmp_path, features, renamed)
    run.step()
    write_features(features / "train", range(9))
    run.step()
    assert run.passes == [[0, 6], [6, 9]]
    assert sorted(run.order) == list(range(9))


def test_time_is_kept(tmp_path, features, renamed):
    run = start_run(tmp_path, features, renamed)
    run.train_on(max_minutes=0)
    assert run.sequence == 4


@pytest.mark.parametrize(("change", "message"), [({"seed": 1}, "is of a run with"), ({"sequences": 5}, "is of a run")])
def test_a_folder_keeps_its_run(tmp_path, features, renamed, change, message):
    start_run(tmp_path, features, renamed).save()
    with pytest.raises(ValueError, match=message):
        start_run(tmp_path, features, renamed, **change)


def test_a_damaged_checkpoint_is_named(tmp_path, features, renamed):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.pt").write_bytes(b"half of")
    with pytest.raises(ValueError, match="is damaged"):
        start_run(tmp_path, features, renamed)


def test_the_rate_rises_and_falls():
    rates = [train_base.rate_at(sequence, 4000) for sequence in range(0, 4000, 4)]
    top = rates.index(max(rates))
    assert 4 * top < 2 * train_base.WARM_UP
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(train_base.LAST_RATE, rel=0.01)


@pytest.fixture
def built(tmp_path, features, renamed, monkeypatch):
    """A folder that build.py writes from what a short training left behind."""
    files = {}
    for name in ("tower", "text"):
        files[name] = tmp_path / name
        files[name].write_text(name)
    found = Packages(tmp_path, tmp_path, tmp_path, tmp_path, **files)
    monkeypatch.setattr(build, "find", lambda folder: found)
    monkeypatch.setattr(build, "load_text_model", lambda gguf, cache: (tiny_text(renamed, bfloat16=True), renamed))
    monkeypatch.setattr(build, "load_tower", lambda path: tiny_tower())
    run = start_run(tmp_path, features, renamed, sequences=4)
    run.about = {"made_of": {name: build.digest(path) for name, path in files.items()}}
    run.train_on()
    arguments = ["--trained", str(tmp_path / "run"), "--output", str(tmp_path / "photo-llava")]
    assert build.main(arguments) == 0
    return tmp_path / "photo-llava", run, files, arguments


def test_the_built_checkpoint_opens(built):
    folder, run, _, _ = built
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {torch.float32}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.config.vision_feature_layer == -4
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id != processor.tokenizer.eos_token_id
    saved = load_file(run.folder / "photo-llava.safetensors")
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight, saved["projector.linear_1.weight"].float())
    inputs = processor(images=photo(), text=build_prompt(processor, "Is there a cow?"), return_tensors="pt")
    pruned = LearnPrunerForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(pruned(**inputs, pruner_ratio=1.0).logits, model(**inputs).logits)


def test_other_weights_are_refused(built, capsys):
    _, _, files, arguments = built
    files["text"].write_text("another release")
    build.digest.cache_clear()
    assert build.main(arguments) == 2
    assert "another release than the one" in capsys.readouterr().err


def test_features_of_another_layer_would_not_fit():
    """The stored hidden state is the one right before the layer that LLaVA reads."""
    assert tiny_tower().config.num_hidden_layers + 1 + photo_llava.VISION_LAYER == train_base.LAYER + 1
