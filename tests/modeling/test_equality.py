"""Invariant 1: at a ratio of 1, and without images, the stock class bit for bit."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import set_seed

from learnpruner.compat_learnpruner import CACHE

from tiny_models import (
    FAMILIES,
    LLAVA,
    NO_PLACEHOLDERS,
    TEXT_MODELS,
    VOCAB,
    build_inputs,
    covering,
    image_states,
    samples_of,
    tiny_pair,
    with_videos,
)

pytestmark = pytest.mark.core
BATCHES = ("one", "padded", "two_images", "mixed")

GENERATE = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 10},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beam_sampling": {"num_beams": 3, "do_sample": True},
    "no_cache": {"use_cache": False},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 8},
}


@pytest.mark.parametrize(
    ("family", "text", "batch", "attention"),
    covering([(*model, batch) for model in TEXT_MODELS for batch in BATCHES], ("sdpa", "eager")),
)
def test_forward(family, text, batch, attention):
    stock, pruned = tiny_pair(family, text=text, attention=attention, pruner_ratio=1.0)
    inputs = build_inputs(family, samples_of(batch, family))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    expected = stock(**inputs, labels=labels, output_hidden_states=True)
    outputs = pruned(**inputs, labels=labels, output_hidden_states=True)
    assert torch.equal(outputs.logits, expected.logits)
    assert torch.equal(outputs.loss, expected.loss)
    assert all(torch.equal(a, b) for a, b in zip(outputs.hidden_states, expected.hidden_states))
    if family in LLAVA:
        assert torch.equal(image_states(outputs), image_states(expected))
    assert outputs.kept_mask is None
    assert outputs.vision_scores is None
    assert type(outputs[CACHE]) is type(expected[CACHE])


@pytest.mark.parametrize("mode", GENERATE)
@pytest.mark.parametrize(("family", "batch"), [case for case in with_videos(("mixed",)) if case[1] != "video"])
def test_generate(family, batch, mode):
    stock, pruned = tiny_pair(family, pruner_ratio=1.0)
    samples = samples_of(batch, family)
    inputs = build_inputs(family, samples[:1] if mode in ("prompt_lookup", "chunked") else samples)
    results = []
    for model in (stock, pruned):
        set_seed(0)
        arguments = {"max_new_tokens": 8, "do_sample": False, **NO_PLACEHOLDERS, **GENERATE[mode]}
        results.append(model.generate(**inputs, **arguments))
    assert torch.equal(*results)


class Operations(TorchDispatchMode):
    """Names of the tensor operations that run, and the shapes that they make."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.found.append((str(function), getattr(result, "shape", None)))
        return result


@pytest.mark.parametrize("family", FAMILIES)
def test_the_device_does_what_it_does_for_stock(family):
    """What a ratio of 1 costs is Python alone: every operation of a whole answer is the stock model's, in its order."""
    stock, pruned = tiny_pair(family, pruner_ratio=1.0)
    inputs = build_inputs(family, samples_of("mixed", family))
    found = []
    for model in (stock, pruned):
        with Operations() as operations:
            model.generate(**inputs, max_new_tokens=4, do_sample=False)
        found.append(operations.found)
    assert found[0] == found[1]
    assert len(found[0]) > 100


@pytest.mark.parametrize("family", FAMILIES)
def test_text_only_prompts_are_the_stock_path_at_any_ratio(family):
    stock, pruned = tiny_pair(family, pruner_ratio=0.2)
    inputs = build_inputs(family, [[9], [4]])
    assert torch.equal(pruned(**inputs).logits, stock(**inputs).logits)
    assert pruned(**inputs).kept_mask is None
    arguments = {**inputs, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(pruned.generate(**arguments), stock.generate(**arguments))


@pytest.mark.parametrize("family", FAMILIES)
def test_where_every_count_is_the_whole_image_nothing_is_cut(family):
    """Rounding alone can grant every token: that too is the stock path."""
    stock, pruned = tiny_pair(family, pruner_ratio=0.999)
    inputs = build_inputs(family, samples_of("padded", family))
    outputs = pruned(**inputs)
    assert outputs.kept_mask is None
    assert torch.equal(outputs.logits, stock(**inputs).logits)
    arguments = {**inputs, "max_new_tokens": 6, "num_beams": 2}
    assert torch.equal(pruned.generate(**arguments), stock.generate(**arguments))


def test_ratio_acts_from_the_next_call_and_per_call():
    stock, pruned = tiny_pair(pruner_ratio=0.3)
    inputs = build_inputs("llava", samples_of("one", "llava"))
    cut = pruned(**inputs).logits
    assert torch.equal(pruned(**inputs, pruner_ratio=1.0).logits, stock(**inputs).logits)
    assert torch.equal(pruned(**inputs).logits, cut)
    pruned.config.pruner_ratio = 1.0
    assert torch.equal(pruned(**inputs).logits, stock(**inputs).logits)
    assert torch.equal(pruned(**inputs, pruner_ratio=0.3).logits, cut)


@pytest.mark.parametrize("family", FAMILIES)
def test_return_dict_false(family):
    stock, pruned = tiny_pair(family, pruner_ratio=1.0)
    inputs = build_inputs(family, samples_of("one", family))
    expected = stock(**inputs, return_dict=False)
    outputs = pruned(**inputs, return_dict=False)
    assert isinstance(outputs, tuple)
    assert len(outputs) == len(expected)
    assert torch.equal(outputs[0], expected[0])
    assert outputs[0].shape[-1] == VOCAB


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_embeds(family):
    stock, pruned = tiny_pair(family, pruner_ratio=1.0)
    inputs = build_inputs(family, samples_of("padded", family))
    embeds = stock.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(pruned(inputs_embeds=embeds, **inputs).logits, stock(inputs_embeds=embeds, **inputs).logits)
