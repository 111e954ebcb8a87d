# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The photo model on tiny random weights: prompts, what is trained, its start."""

import pytest
import torch
from PIL import Image

from learnpruner.compare import build_prompt

import photo_llava
import projector
import prompts
import text_model
import train_base
from tiny_photo import ASKED, photo, scene_of, tiny_text, tiny_tower


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


def test_features_of_another_layer_would_not_fit():
    """The stored hidden state is the one right before the layer that LLaVA reads."""
    assert tiny_tower().config.num_hidden_layers + 1 + photo_llava.VISION_LAYER == train_base.LAYER + 1
