"""What holds for every method of the registry: exact budgets, masking where nothing merges, batches, `generate`."""

import threading

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import learnpruner
from learnpruner.compat_learnpruner import CACHE
from learnpruner.methods import METHODS, Composed

from oracles import masked
from tiny_models import (
    FAMILIES,
    LAYERS,
    LLAVA,
    NO_PLACEHOLDERS,
    PATCHES,
    build_inputs,
    covering,
    image_tokens,
    row_alone,
    samples_of,
    tiny_pair,
    with_answer,
)

pytestmark = pytest.mark.core
RATIO = 0.7  # within reach of methods that see the whole image for two of the four layers
NEEDS_CLS = {"cls_attention", "visionzip", "vispruner"}
MERGES = {"pool", "visionzip", "downsample"}
ONE_CROP = {"downsample"}  # of a CLIP tower
# Of those that cut inside the decoder, the layers of a decoder of four.
SECOND_LAYERS = {
    "fastv": [1],
    "stage_2": [2],
    "dart": [1],
    "pyramiddrop": [1, 2, 3],
    "sparsevlm": [1, 2, 3],
    "transprune": [1, 2, 3],
}
INSIDE = list(SECOND_LAYERS)
# The cuts are the same code in both Qwens.
MATRIX = [family for family in FAMILIES if family != "qwen2_5_vl"]
BOXES = ((4, 4, 20, 12), (18, 16, 30, 30))
EVERY = [
    (name, family)
    for name in METHODS
    for family in MATRIX
    if (name not in NEEDS_CLS or family in LLAVA) and (name not in ONE_CROP or family == "llava")
]


def build(name, samples, **settings):
    """A method with what it must know of the images of a call."""
    count = sum(isinstance(part, tuple) for sample in samples for part in sample)
    if name == "oracle_boxes":
        settings = {"boxes": (BOXES,) * count, "picture": (32, 32), **settings}
    return METHODS[name](**{"ratio": RATIO, **settings})


def sizes(samples, family):
    return [[image_tokens(family, *part) for part in sample if isinstance(part, tuple)] for sample in samples]


def rounded_mean(counts, layers, tokens):
    """Layer by layer, as one would count by hand."""
    seen, total = tokens, 0
    for layer in range(LAYERS):
        if layer in layers:
            seen = counts[layers.index(layer)]
        total += seen
    return total / LAYERS


@pytest.mark.parametrize(("name", "family", "batch"), covering(EVERY, ("mixed", "image_first", "image_last")))
def test_budgets_are_exact_and_cutting_equals_masking(name, family, batch):
    stock, pruned = tiny_pair(family)
    samples = samples_of(batch, family)
    inputs, method = build_inputs(family, samples), build(name, samples)
    outputs = pruned(**inputs, schedule=method)
    cuts = method.cuts(pruned.model)
    layers = [cut.layer for cut in cuts]
    vision = inputs["input_ids"] == pruned.config.image_token_id
    assert len(outputs.kept_mask) == len(cuts)
    for step, (cut, mask) in enumerate(zip(cuts, outputs.kept_mask)):
        expected = [sum(cut.keep(size) for size in of_sample) for of_sample in sizes(samples, family)]
        assert (mask & vision).sum(1).tolist() == expected
        assert (mask | vision)[inputs["attention_mask"].bool()].all()
        if step:
            assert not (mask & ~outputs.kept_mask[step - 1]).any()
    for size in {size for of_sample in sizes(samples, family) for size in of_sample}:
        mean = rounded_mean([cut.keep(size) for cut in cuts], layers, size)
        if name == "downsample":
            # Not every number of patches is a grid's.
            assert 0.8 * RATIO * size < mean <= RATIO * size
            continue
        # Each count is rounded by at most a half, or raised to one.
        assert mean == pytest.approx(RATIO * size, abs=0.51)
    if name in MERGES:
        return
    with masked(stock, outputs.kept_mask, layers, inputs["attention_mask"], LAYERS):
        expected = stock(**inputs).logits
    rows = outputs.kept_mask[-1] & inputs["attention_mask"].bool()
    assert (outputs.logits - expected)[rows].abs().max() < 1e-4


@pytest.mark.parametrize(("name", "family"), EVERY)
def test_a_batch_equals_its_rows(name, family):
    _, pruned = tiny_pair(family)
    samples = samples_of("mixed", family)
    inputs, method = build_inputs(family, samples), build(name, samples)
    together = pruned(**inputs, schedule=method)
    for row, sample in enumerate(samples):
        single, valid = row_alone(family, inputs, samples, row)
        alone = pruned(**single, schedule=build(name, [sample]))
        for cut, mask in enumerate(alone.kept_mask or ()):
            assert torch.equal(together.kept_mask[cut][row, valid], mask[0])
        kept = together.kept_mask[-1][row]
        assert (together.logits[row][kept] - alone.logits[0][kept[valid]]).abs().max() < 1e-4


@pytest.mark.parametrize(("name", "family"), EVERY)
def test_generate_equals_teacher_forcing(name, family):
    stock, pruned = tiny_pair(family)
    samples = samples_of("padded", family)
    inputs, method = build_inputs(family, samples), build(name, samples)
    arguments = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    output = pruned.generate(**inputs, **arguments, **NO_PLACEHOLDERS, schedule=method)
    forward = pruned(**inputs, schedule=method)
    for generated, mask in zip(output[CACHE].kept_mask, forward.kept_mask, strict=True):
        assert torch.equal(generated, mask)
    length = inputs["input_ids"].shape[1]
    whole = with_answer(inputs, output.sequences)
    if name in MERGES:
        # What was merged stands in no stock model's prompt: forced without a cache, by the method's own cut.
        plan = F.pad(torch.ones_like(inputs["input_ids"], dtype=torch.bool), (0, 6))
        expected = pruned(**whole, schedule=method, query_mask=plan, use_cache=False).logits
        for step, logits in enumerate(output.logits):
            assert (logits - expected[:, length - 1 + step]).abs().max() < 1e-4
        return
    masks = [F.pad(mask, (0, 6), value=True) for mask in forward.kept_mask]
    layers = [cut.layer for cut in method.cuts(pruned.model)]
    with masked(stock, masks, layers, whole["attention_mask"], LAYERS):
        expected = stock(**whole).logits
    for step, logits in enumerate(output.logits):
        assert (logits - expected[:, length - 1 + step]).abs().max() < 1e-4


@pytest.mark.parametrize(("name", "family"), EVERY)
def test_beams(name, family):
    _, pruned = tiny_pair(family)
    samples = samples_of("padded", family)
    inputs, method = build_inputs(family, samples), build(name, samples)
    arguments = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, **NO_PLACEHOLDERS}
    together = pruned.generate(**inputs, **arguments, schedule=method)
    for row, sample in enumerate(samples):
        single, _ = row_alone(family, inputs, samples, row)
        alone = pruned.generate(**single, **arguments, schedule=build(name, [sample]))
        assert torch.equal(together[row, -4:], alone[0, -4:])


@pytest.mark.parametrize("name", METHODS)
def test_ratio_one_is_the_stock_model(name):
    stock, pruned = tiny_pair("llava")
    samples = samples_of("padded", "llava")
    inputs = build_inputs("llava", samples)
    outputs = pruned(**inputs, schedule=build(name, samples, ratio=1.0))
    assert torch.equal(outputs.logits, stock(**inputs).logits)
    assert outputs.kept_mask is None


@pytest.mark.parametrize("name", METHODS)
def test_cap_counts_what_the_last_cut_leaves(name):
    _, pruned = tiny_pair("llava")
    method = build(name, [], ratio=0.25, accounting="cap")
    assert method.cuts(pruned.model)[-1].keep(16) == 4


@pytest.mark.parametrize("name", METHODS)
def test_no_attention_map_is_formed(name):
    """Invariant 8: no softmax is of sequence x sequence, nor of patches x patches in the tower."""
    _, pruned = tiny_pair("llava")
    samples = [[2, (32, 32), 1, (32, 32), 1, (32, 32), 1, (32, 32), 3]]
    inputs, method, rows = build_inputs("llava", samples), build(name, samples), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._softmax.default:
                rows.append(result.shape[-2:])
            return result

    with Watch():
        pruned(**inputs, schedule=method)
    assert not [shape for shape in rows if min(shape) > PATCHES]
    if name == "fastv":  # the proof can fail: what ranks is seen
        assert rows


def test_the_block_prunes_every_call_and_is_undone():
    _, pruned = tiny_pair("llava")
    inputs = build_inputs("llava", samples_of("padded", "llava"))
    method, before = METHODS["fastv"](ratio=0.7), dict(vars(pruned.model))
    expected = pruned(**inputs, schedule=method).logits
    with pytest.raises(RuntimeError, match="stop"), method(pruned) as same:  # noqa: PT012
        assert same is pruned
        assert torch.equal(pruned(**inputs).logits, expected)
        # What a call says itself goes before.
        assert pruned(**inputs, pruner_ratio=1.0).kept_mask is None
        with METHODS["random"](ratio=0.5)(pruned):
            assert len(pruned(**inputs).kept_mask) == 1
            assert not torch.equal(pruned(**inputs).logits, expected)
        assert torch.equal(pruned(**inputs).logits, expected)
        raise RuntimeError("stop")
    assert vars(pruned.model) == before
    assert not torch.equal(pruned(**inputs).logits, expected)


def test_threads_do_not_meet():
    _, pruned = tiny_pair("llava")
    inputs = build_inputs("llava", samples_of("padded", "llava"))
    methods = [build(name, [[(32, 32)], [(32, 32)]]) for name in METHODS]
    expected = [pruned(**inputs, schedule=method).logits for method in methods]
    found = [None] * len(methods)

    def run(number):
        with torch.no_grad():
            for _ in range(3):
                found[number] = pruned(**inputs, schedule=methods[number]).logits

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(methods))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, other in zip(expected, found):
        assert torch.equal(own, other)


@pytest.mark.parametrize("fields", [{}, {"pruner_stage_ratio": 2.0}, {"pruner_min_tokens": 6}, {"pruner_layer": 4}])
def test_composition_of_the_two_stages_is_learnpruner(fields):
    _, pruned = tiny_pair("llava", **fields)
    inputs = build_inputs("llava", samples_of("mixed", "llava"))
    own = pruned(**inputs, pruner_ratio=0.3)
    composed = [] if fields.get("pruner_layer") == LAYERS else [Composed(ratio=0.3)]
    composed += [METHODS["composed"](0.3, first="stage_1", second="stage_2")] if composed else []
    for method in (*composed, METHODS["learnpruner"](ratio=0.3)):
        other = pruned(**inputs, schedule=method)
        assert torch.equal(own.logits, other.logits)


@pytest.mark.parametrize("first", [name for name in METHODS if name not in (*INSIDE, "learnpruner", "composed")])
@pytest.mark.parametrize("second", INSIDE)
def test_any_first_cut_with_any_second(first, second):
    stock, pruned = tiny_pair("llava")
    samples = samples_of("mixed", "llava")
    inputs = build_inputs("llava", samples)
    method = Composed(first=build(first, samples), second=build(second, samples), ratio=0.3)
    outputs = pruned(**inputs, schedule=method)
    cuts = method.cuts(pruned.model)
    layers = [cut.layer for cut in cuts]
    assert layers == [0, *SECOND_LAYERS[second]]
    # A smaller image of one crop may have some tokens less.
    assert cuts[0].keep(PATCHES) == pytest.approx(3 * cuts[1].keep(PATCHES), abs=3 if first in ONE_CROP else 2)
    if first not in MERGES:
        with masked(stock, outputs.kept_mask, layers, inputs["attention_mask"], LAYERS):
            expected = stock(**inputs).logits
        rows = outputs.kept_mask[-1] & inputs["attention_mask"].bool()
        assert (outputs.logits - expected)[rows].abs().max() < 1e-4


def test_unknown_names_list_the_known():
    with pytest.raises(KeyError, match=r"fastvv.*fastv.*random"):
        METHODS["fastvv"]
    for part in ("fastvv", 5, {"first": "fastv"}):
        with pytest.raises(ValueError, match=r"names, random, .*composed; got"):
            Composed(first=part)


def test_the_revision_of_a_composed_method_is_that_of_its_parts(monkeypatch):
    assert Composed().revision == 1
    assert Composed(first="vispruner").revision == METHODS["vispruner"].revision
    monkeypatch.setattr(METHODS["stage_2"], "revision", 3)
    assert Composed(first="vispruner").revision == METHODS["vispruner"].revision + 2


@pytest.mark.parametrize("name", sorted(NEEDS_CLS))
def test_a_tower_without_cls_is_refused_before_running(name):
    _, pruned = tiny_pair("qwen2_vl")
    inputs = build_inputs("qwen2_vl", samples_of("one", "qwen2_vl"))
    pruned.model.visual.forward = None  # would raise TypeError
    with pytest.raises(ValueError, match=rf"{name} reads the class token .*\(\[CLS\]\).*has none: take"):
        pruned(**inputs, schedule=METHODS[name](ratio=0.5))
    with pytest.raises(ValueError, match="CLS"), METHODS[name](ratio=0.5)(pruned):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"ratio": 0.0}, "pruner_ratio"), ({"ratio": 1.5}, "pruner_ratio"), ({"accounting": "total"}, "'mean' or 'cap'")],
)
def test_settings_are_checked_when_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        METHODS["random"](**arguments)


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        (METHODS["stage_2"](0.3), {"pruner_layer": LAYERS}, "no second cut"),
        (Composed(ratio=0.3), {"pruner_layer": LAYERS}, "no second cut"),
        (METHODS["fastv"](0.3, layer=LAYERS), {}, "layer is one from 1 to 3"),
    ],
)
def test_cuts_that_cannot_be_are_refused(method, fields, message):
    _, pruned = tiny_pair("llava", **fields)
    with pytest.raises(ValueError, match=message):
        pruned(**build_inputs("llava", samples_of("one", "llava")), schedule=method)


def test_a_mean_out_of_reach_says_what_to_do():
    _, pruned = tiny_pair("llava")
    inputs = build_inputs("llava", samples_of("one", "llava"))
    with pytest.raises(ValueError, match=r"FastV: A mean of 1.6 of 16 .* 1 of 4 .* accounting='cap'"):
        pruned(**inputs, schedule=METHODS["fastv"](ratio=0.1))


def test_methods_are_part_of_the_package():
    assert learnpruner.methods.METHODS is METHODS
