# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""A model whose pruner was trained under gradient checkpointing: copies, files, and what is done with it next."""

import copy
import inspect
import pickle

import pytest
import torch

from tiny_models import FAMILIES, NO_PLACEHOLDERS, PRUNED, build_inputs, labelled, samples_of, tiny_pair

pytestmark = pytest.mark.core
TWO = pytest.mark.parametrize("family", ["llava", "qwen2_vl"])


def switch(model, on, *args, **options):
    """Under the name of the installed release: up to 5.22 the other."""
    way = "enable" if on else "disable"
    name = f"activation_checkpointing_{way}"
    getattr(model, name if hasattr(model, name) else f"gradient_checkpointing_{way}")(*args, **options)


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert any("pruner" in name for name in found)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def answer(model, family):
    inputs = build_inputs(family, samples_of("padded", family))
    training, model = model.training, model.eval()
    sequences = model.generate(**inputs, max_new_tokens=4, do_sample=False, **NO_PLACEHOLDERS)
    model.train(training)
    return sequences


@pytest.fixture(scope="module", params=[(family, way) for family in FAMILIES for way in (True, False)], ids=str)
def used(request):
    """A family, a model that went through a step of training with checkpointing, its inputs, gradients and answer."""
    family, reentrant = request.param
    _, model = tiny_pair(family)
    model.train_pruner_only()
    inputs = labelled(family, samples_of("padded", family))
    expected = gradients(model, inputs)
    switch(model, True, {"use_reentrant": reentrant})
    assert_equal(gradients(model, inputs), expected)
    return family, model, inputs, expected, answer(tiny_pair(family)[1], family)


def test_it_answers(used):
    family, model, _, _, expected = used
    assert torch.equal(answer(model, family), expected)


def test_a_deep_copy(used):
    family, model, inputs, expected, answered = used
    twin = copy.deepcopy(model)
    assert_equal(gradients(twin, inputs), expected)
    assert torch.equal(answer(twin, family), answered)


def test_the_layers_pickle(used):
    """Not the model: under checkpointing the stock one has a hook on its embeddings that does not."""
    _, model, _, _, _ = used
    layers = model.model.language_model.layers
    twins = pickle.loads(pickle.dumps(layers))
    assert all(layer.gradient_checkpointing for layer in twins)
    for layer, twin in zip(layers, twins, strict=True):
        assert repr(twin._gradient_checkpointing_func) == repr(layer._gradient_checkpointing_func)


def test_a_folder(used, tmp_path):
    family, model, inputs, expected, answered = used
    model.save_pretrained(tmp_path)
    again = PRUNED[family].from_pretrained(tmp_path).train_pruner_only()
    assert_equal(gradients(again, inputs), expected)
    assert torch.equal(answer(again, family), answered)


def test_switched_off_and_on_in_the_other_way(used):
    _, model, inputs, expected, _ = used
    twin = copy.deepcopy(model)
    switch(twin, False)
    assert_equal(gradients(twin, inputs), expected)
    for reentrant in (True, False):
        switch(twin, True, {"use_reentrant": reentrant})
        assert_equal(gradients(twin, inputs), expected)


@TWO
@pytest.mark.slow
def test_compiled(family):
    _, model = tiny_pair(family)
    model.train_pruner_only()
    inputs = labelled(family, samples_of("padded", family))
    switch(model, True, {"use_reentrant": True})
    expected = gradients(model, inputs)
    model.zero_grad()
    torch.compile(model, backend="eager")(**inputs, use_cache=False).loss.backward()
    assert_equal({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected)


@TWO
def test_every_second_layer(family):
    _, model = tiny_pair(family)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    if "every_n_layers" not in inspect.signature(enable).parameters:
        pytest.skip("this release of transformers checkpoints every layer")
    model.train_pruner_only()
    inputs = labelled(family, samples_of("padded", family))
    expected = gradients(model, inputs)
    enable(every_n_layers=2)
    assert_equal(gradients(model, inputs), expected)
