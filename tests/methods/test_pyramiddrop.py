"""PyramidDrop against its formula, row by row."""

import pytest
import torch

from learnpruner.methods import PyramidDrop

from decoder_oracle import CASES, assert_equals, run_until
from tiny_models import tiny_config, tiny_pair


def reference(slow, layers, counts):
    for layer, count in zip(layers, counts):
        run_until(slow, layer)
        scores = slow.received(slow.attention(layer)[0], slow.queries[-1:])
        chosen = slow.best(scores, count)
        yield chosen, scores
        slow.keep(chosen)


def of_the_layer_before(slow, layers, counts):
    for layer, count in zip(layers, counts):
        scores = slow.received(run_until(slow, layer)[0], slow.queries[-1:])
        chosen = slow.best(scores, count)
        yield chosen, scores
        slow.keep(chosen)


@pytest.mark.parametrize(("family", "batch", "some_text"), CASES)
def test_the_selection_is_the_formulas(family, batch, some_text):
    with torch.no_grad():
        assert_equals(reference, PyramidDrop(ratio=0.6), family, batch, some_text)


def test_it_is_the_next_layers_attention():
    with torch.no_grad(), pytest.raises(AssertionError):
        assert_equals(of_the_layer_before, PyramidDrop(ratio=0.6), "llava", "mixed")


def test_the_papers_schedule():
    config = tiny_config()
    config.text_config.num_hidden_layers = 32
    _, pruned = tiny_pair(config=config)
    cuts = PyramidDrop().cuts(pruned.model)
    assert [cut.layer for cut in cuts] == [8, 16, 24]
    assert [cut.keep(576) for cut in cuts] == [288, 144, 72]
