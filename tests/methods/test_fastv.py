"""FastV against its formula, row by row."""

import pytest
import torch

from learnpruner.methods import METHODS, FastV

from decoder_oracle import CASES, assert_equals, run_until
from tiny_models import LAYERS, build_inputs, samples_of, tiny_config, tiny_pair


def reference(slow, layers, counts):
    ((layer,), (count,)) = layers, counts
    scores = slow.received(run_until(slow, layer)[0], slow.queries[-1:])
    yield slow.best(scores, count), scores


def of_all_rows(slow, layers, counts):
    ((layer,), (count,)) = layers, counts
    scores = slow.received(run_until(slow, layer)[0], slow.queries)
    yield slow.best(scores, count), scores


def of_the_layer_behind(slow, layers, counts):
    ((layer,), (count,)) = layers, counts
    run_until(slow, layer)
    scores = slow.received(slow.attention(layer)[0], slow.queries[-1:])
    yield slow.best(scores, count), scores


@pytest.mark.parametrize("layer", [1, 2, LAYERS - 1])
@pytest.mark.parametrize(("family", "batch", "some_text"), CASES)
def test_the_selection_is_the_formulas(family, batch, some_text, layer):
    with torch.no_grad():
        assert_equals(reference, FastV(ratio=0.8, layer=layer), family, batch, some_text)


@pytest.mark.parametrize("fault", [of_all_rows, of_the_layer_behind])
def test_it_is_the_last_rows_attention_in_the_layer_before(fault):
    with torch.no_grad(), pytest.raises(AssertionError):
        assert_equals(fault, FastV(ratio=0.8, layer=2), "llava", "mixed")


def test_the_papers_layer():
    config = tiny_config()
    config.text_config.num_hidden_layers = 32
    _, pruned = tiny_pair(config=config)
    assert [cut.layer for cut in FastV(ratio=0.5).cuts(pruned.model)] == [2]


@pytest.mark.parametrize("layer", [0, -1, LAYERS, LAYERS + 3, 1.5])
@pytest.mark.parametrize("name", ["fastv", "dart"])
def test_a_layer_outside_the_decoder_is_refused(name, layer):
    _, pruned = tiny_pair("llava")
    inputs = build_inputs("llava", samples_of("one", "llava"))
    with pytest.raises(ValueError, match=rf"{name}: layer is one from 1 to 3 of this decoder's 4, got {layer}"):
        pruned(**inputs, schedule=METHODS[name](0.9, layer=layer))
