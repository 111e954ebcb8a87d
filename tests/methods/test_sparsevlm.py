"""SparseVLM against its formula, row by row."""

from types import SimpleNamespace

import pytest
import torch

from learnpruner.methods import SparseVLM
from learnpruner.methods.sparsevlm import _relevance

from decoder_oracle import CASES, assert_equals, run_until
from tiny_models import build_inputs, tiny_config, tiny_pair


def raters(slow):
    text = [row for row in slow.queries if row > slow.vision[0]]
    if not text:
        return []
    relevance = dict.fromkeys(text, 0.0)
    for column in slow.vision:
        products = torch.stack([slow.hidden[column] @ slow.hidden[row] for row in text])
        for row, share in zip(text, products.softmax(0).tolist()):
            relevance[row] += share / len(slow.vision)
    above = [row for row in text if relevance[row] > sum(relevance.values()) / len(text)]
    return above or text


def reference(slow, layers, counts, choose=raters):
    rating = choose(slow)
    for layer, count in zip(layers, counts):
        scores = slow.received(run_until(slow, layer)[0], rating)
        chosen = slow.best(scores, count)
        yield chosen, scores
        slow.keep(chosen)


@pytest.mark.parametrize(("family", "batch", "some_text"), CASES)
def test_the_selection_is_the_formulas(family, batch, some_text):
    with torch.no_grad():
        assert_equals(reference, SparseVLM(ratio=0.6), family, batch, some_text)


def as_the_authors(slow, layers, counts):
    """In a decoder of 32 layers: each runs, and those that the authors' code numbers 2, 6 and 15, from 0, rank by what
    they paid themselves; only then tokens leave."""
    rating, counts = raters(slow), iter(counts)
    for number in range(16):
        paid, _ = slow.run()
        if number in (2, 6, 15):
            scores = slow.received(paid, rating)
            chosen = slow.best(scores, next(counts))
            yield chosen, scores
            slow.keep(chosen)


def test_the_layers_are_those_of_the_authors():
    config = tiny_config()
    config.text_config.num_hidden_layers = 32
    config.text_config.initializer_range = 0.1  # of 0.3, so many layers lose digits
    with torch.no_grad():
        assert_equals(as_the_authors, SparseVLM(ratio=0.6), "llava", "padded", config=config)


def test_not_all_text_rates():
    with torch.no_grad(), pytest.raises(AssertionError):
        assert_equals(
            lambda *arguments: reference(*arguments, choose=lambda slow: slow.queries),
            SparseVLM(ratio=0.6),
            "llava",
            "mixed",
        )


def test_relevance_row_by_row():
    torch.manual_seed(0)
    # More rows than are taken at a time; the third kind is padding.
    kinds = torch.randint(3, (2, 300))
    states, text = torch.randn(2, 300, 8), kinds == 1
    state = SimpleNamespace(
        hidden_states=states, vision=kinds == 0, num_text=int(text.sum(1).max()), vision_scores=torch.zeros(2, 300)
    )
    found = _relevance(state, text)
    for sample in range(2):
        expected = torch.zeros(300)
        for vision in (kinds[sample] == 0).nonzero().flatten():
            shares = torch.exp(states[sample, text[sample]] @ states[sample, vision])
            expected[text[sample]] += shares / shares.sum() / (kinds[sample] == 0).sum()
        assert torch.allclose(found[sample], expected, atol=1e-6)


def test_a_single_row_of_text_rates():
    _, pruned = tiny_pair()
    inputs = build_inputs("llava", [[(32, 32), 1], [(32, 32), 5]])
    scores = pruned(**inputs, schedule=SparseVLM(ratio=0.6)).vision_scores
    vision = inputs["input_ids"] == pruned.config.image_token_id
    assert not scores[0][vision].isnan().any()


def test_the_papers_schedule():
    config = tiny_config()
    config.text_config.num_hidden_layers = 32
    _, pruned = tiny_pair(config=config)
    cuts = SparseVLM(ratio=110 / 576, accounting="cap").cuts(pruned.model)
    assert [cut.layer for cut in cuts] == [3, 7, 16]
    assert [cut.keep(576) for cut in cuts] == [300, 200, 110]
    assert [cut.watched for cut in cuts] == [(0,), (), ()]
