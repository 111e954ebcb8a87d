"""A pruned cache that its owner or another tool edits between two calls: right by its own methods, else refused.

A key's token is known by its place alone, so text behind a replaced key would silently be other text.
"""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from learnpruner.compat_learnpruner import CACHE

from tiny_models import FAMILIES, QWEN, build_inputs, samples_of, tiny_pair

pytestmark = pytest.mark.core


def on_states(change):
    def edit(cache, other):
        for layer in cache.layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)
        return cache

    return edit


def replace_layer(number):
    def edit(cache, other):
        layer = DynamicLayer()
        layer.update(cache.layers[number].keys, cache.layers[number].values)
        cache.layers[number] = layer
        return cache

    return edit


def replace_values(cache, other):
    cache.layers[1].values = cache.layers[1].values.flip(2)
    return cache


def move(where):
    """Edits the list of layers."""

    def edit(cache, other):
        where(cache.layers, other.layers)
        return cache

    return edit


def share(cache, other):
    shared = DynamicCache()
    shared.layers = cache.layers
    return shared


EDITS = {
    "answer sliced off": on_states(lambda states: states[:, :, :-2]),
    "front sliced off": on_states(lambda states: states[:, :, 2:]),
    "key appended": on_states(lambda states: torch.cat([states, states[:, :, -1:]], dim=2)),
    "rows flipped": on_states(lambda states: states.flip(0)),
    "rows repeated": on_states(lambda states: states.repeat(2, 1, 1, 1)),
    "values replaced": replace_values,
    "first layer replaced": replace_layer(0),
    "a layer replaced": replace_layer(2),
    "layers reversed": move(lambda layers, other: layers.reverse()),
    "layer left out": move(lambda layers, other: layers.pop()),
    "layer added": move(lambda layers, other: layers.append(copy.deepcopy(layers[-1]))),
    "layer of another prompt": move(lambda layers, other: layers.__setitem__(1, other[1])),
    "copied into a cache": lambda cache, other: DynamicCache([(layer.keys, layer.values) for layer in cache.layers]),
    "iterated into a cache": lambda cache, other: DynamicCache([states[:2] for states in cache]),
    "layers in another cache": share,
}


def step(model, family, inputs, cache, masked, rows=None):
    """One more token on a cache."""
    rows, length = rows or len(inputs["input_ids"]), inputs["input_ids"].shape[1]
    given = {"input_ids": torch.full((rows, 1), 5), CACHE: cache}
    if masked:
        given["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(rows, 1, dtype=torch.long)], dim=1)
    if family in QWEN:
        given["position_ids"] = torch.full((3, rows, 1), length)
    return model(**given)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", ["one", "padded"])
def test_edits_are_refused(family, batch, edit):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of(batch, family))
    other = pruned(**build_inputs(family, samples_of(batch, family), seed=1))[CACHE]
    rows = len(inputs["input_ids"]) * (2 if edit == "rows repeated" else 1)
    for masked in (False, True) if edit != "rows repeated" else (False,):
        edited = EDITS[edit](pruned(**inputs)[CACHE], other)
        with pytest.raises(ValueError, match="fresh cache"):
            step(pruned, family, inputs, edited, masked, rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_are_refused_in_generate(family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("one", family))
    answer, other = pruned.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True), pruned(**inputs)[CACHE]
    ids = torch.cat([answer.sequences, torch.tensor([[7, 8]])], dim=1)
    for edit in EDITS.values():
        edited = edit(copy.deepcopy(answer[CACHE]), copy.deepcopy(other))
        with pytest.raises(ValueError, match="fresh cache"):
            pruned.generate(ids, **{CACHE: edited}, max_new_tokens=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_go_on(family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("padded", family))
    cache = pruned(**inputs)[CACHE]
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), copy.copy(cache)]
    for each in copies[:2]:
        each.reorder_cache(torch.tensor([1, 0]))
        each.reorder_cache(torch.tensor([1, 0]))
    expected, *found = (step(pruned, family, inputs, each, True).logits for each in (copy.deepcopy(cache), *copies))
    assert all(torch.equal(each, expected) for each in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unpruned_cache_is_as_stock(family):
    stock, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("one", family))
    sliced = EDITS["answer sliced off"]
    caches = sliced(stock(**inputs)[CACHE], None), sliced(pruned(**inputs, pruner_ratio=1.0)[CACHE], None)
    one, other = (step(model, family, inputs, cache, False) for model, cache in zip((stock, pruned), caches))
    assert torch.equal(one.logits, other.logits)
