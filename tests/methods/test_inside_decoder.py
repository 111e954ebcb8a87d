"""What holds for all methods that cut inside the decoder, beside the selection itself."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from learnpruner.compat_learnpruner import CACHE
from learnpruner.methods import METHODS
from learnpruner.methods.decoder import RowValues, scaled_layers

from host_waits import Waits
from tiny_models import build_inputs, pixels_of, samples_of, tiny_pair

NAMES = ["pyramiddrop", "sparsevlm", "dart", "transprune"]


def decoder_of(depth):
    return SimpleNamespace(config=SimpleNamespace(text_config=SimpleNamespace(num_hidden_layers=depth)))


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [
        ((7, 9, 12), 32, [7, 9, 12]),
        ((7, 9, 12), 40, [9, 11, 15]),
        ((7, 9, 12), 28, [6, 8, 11]),
        ((7, 9, 12), 8, [2, 3, 4]),
        ((7, 9, 12), 4, [1, 2, 3]),
        ((8, 16, 24), 4, [1, 2, 3]),
        ((8, 16, 24), 28, [7, 14, 21]),
        ((2, 6, 15), 8, [1, 2, 4]),
        ((30, 31), 8, [6, 7]),
    ],
)
def test_layers_scale_and_stay_different(layers, depth, expected):
    assert scaled_layers(decoder_of(depth), layers) == expected


def test_a_decoder_that_is_too_shallow_is_refused():
    with pytest.raises(ValueError, match="3 cuts inside a decoder need 4 layers, and this one has 3"):
        scaled_layers(decoder_of(3), (7, 9, 12))


def test_values_follow_their_rows():
    values = RowValues()
    before = SimpleNamespace(index=torch.tensor([[5, 0, 2, 3, 7], [0, 1, 2, 3, 4]]))
    values.put(before.index * 10.0, before)
    after = SimpleNamespace(index=torch.tensor([[0, 7, 3], [4, 2, 1]]))
    assert torch.equal(values.at(after), after.index * 10.0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_and_every_backend(name, attention):
    _, pruned = tiny_pair("qwen2_vl", attention=attention, dtype=torch.bfloat16)
    samples = samples_of("mixed", "qwen2_vl")
    inputs = build_inputs("qwen2_vl", samples, dtype=torch.bfloat16)
    method = METHODS[name](ratio=0.7)
    # Under autocast, too: scores that are rounded tie.
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            outputs = pruned(**inputs, schedule=method)
        vision = inputs["input_ids"] == pruned.config.image_token_id
        before = vision
        for cut, mask, scores in zip(method.cuts(pruned.model), outputs.kept_mask, outputs.vision_scores, strict=True):
            assert scores.dtype == torch.float32
            # No rounding to half precision on the way.
            assert not torch.equal(scores[before], scores[before].bfloat16().float())
            assert (mask & vision).sum(1).tolist() == [cut.keep(16), cut.keep(18) + cut.keep(28), 0]
            before = vision & mask


@pytest.mark.parametrize("name", NAMES)
def test_an_image_in_a_later_turn(name):
    _, pruned = tiny_pair("llava")
    inputs = build_inputs("llava", samples_of("two_images", "llava"))
    length = inputs["input_ids"].shape[1]
    first = 1 + 2 + 16 + 1
    method = METHODS[name](ratio=0.7)
    turn = {"input_ids": inputs["input_ids"][:, :first], **pixels_of("llava", inputs, slice(1))}
    cache = pruned(**turn, schedule=method, use_cache=True)[CACHE]
    turn = {"input_ids": inputs["input_ids"][:, first:], **pixels_of("llava", inputs, slice(1, 2))}
    outputs = pruned(**turn, schedule=method, **{CACHE: cache})
    assert outputs.logits.shape[1] == length - first
    vision = turn["input_ids"] == pruned.config.image_token_id
    for cut, mask in zip(method.cuts(pruned.model), outputs.kept_mask, strict=True):
        assert (mask & vision).sum().item() == cut.keep(16)


@pytest.mark.parametrize("name", NAMES)
def test_with_and_without_a_cache(name):
    _, pruned = tiny_pair("llava")
    inputs, method = build_inputs("llava", samples_of("mixed", "llava")), METHODS[name](ratio=0.7)
    cached, bare = (pruned(**inputs, schedule=method, use_cache=use_cache) for use_cache in (True, False))
    for one, other in zip(cached.kept_mask, bare.kept_mask, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_does_not_choose_its_evidence(name):
    _, pruned = tiny_pair("llava")
    inputs, method = build_inputs("llava", samples_of("one", "llava")), METHODS[name](ratio=0.7)
    may_rank = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    may_rank[:, -3:] = False
    other = inputs["input_ids"].clone()
    other[:, -3:] += 1
    masks = [
        pruned(**{**inputs, "input_ids": ids}, query_mask=may_rank, schedule=method).kept_mask
        for ids in (inputs["input_ids"], other)
    ]
    assert all(torch.equal(one, another) for one, another in zip(*masks))


@pytest.mark.parametrize("name", NAMES)
def test_cuts_made_once_serve_two_calls(name):
    _, pruned = tiny_pair("llava")
    first, second = (build_inputs("llava", samples_of("padded", "llava"), seed=seed) for seed in (0, 1))
    cuts = METHODS[name](ratio=0.7).cuts(pruned.model)
    expected = pruned(**second, schedule=METHODS[name](ratio=0.7)).logits
    pruned(**first, schedule=cuts)
    assert torch.equal(pruned(**second, schedule=cuts).logits, expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_host_waits_no_more_than_for_learnpruner(name):
    _, pruned = tiny_pair("llava")
    inputs = build_inputs("llava", samples_of("mixed", "llava"))
    counts = []
    for method in (METHODS[name](ratio=0.7), METHODS["learnpruner"](ratio=0.7)):
        log = []
        with Waits(log):
            pruned(**inputs, schedule=method)
        counts.append(len(log))
    assert counts[0] <= counts[1]
    assert counts[1] > 0
