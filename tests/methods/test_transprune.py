"""TransPrune against the paper's formula, row by row."""

import math
import threading
from types import SimpleNamespace

import pytest
import torch

from learnpruner.methods import METHODS, TransPrune

from decoder_oracle import CASES, assert_equals, run_until
from tiny_models import tiny_config, tiny_pair


def transition(slow, variant):
    """TTV of the layer that ran last: `{column: value}`."""
    total = dict.fromkeys(slow.vision, 0.0)
    for part in (0, 1):
        cosine, stretch = {}, {}
        for row in slow.rows:
            given, added = (value.double() for value in slow.parts[row][part])
            cosine[row] = (given @ added / (given.norm() * added.norm())).item()
            stretch[row] = (added.norm() / given.norm()).item()
        if variant == "paper":
            powers = {row: math.exp(1 - abs(cosine[row])) for row in slow.vision}
        else:
            powers = {row: math.exp(1 - cosine[row]) for row in slow.vision + slow.queries}
        for row in slow.vision:
            total[row] += powers[row] / sum(powers.values()) * stretch[row]
    return total


def reference(variant):
    def cut(slow, layers, counts):
        run_until(slow, layers[0] - 1)
        total = dict.fromkeys(slow.vision, 0.0)
        for layer, count in zip(layers, counts):
            while slow.number < layer:
                slow.run()
                for column, value in transition(slow, variant).items():
                    total[column] += value
            guidance = slow.received(slow.attention(layer)[0], slow.queries)
            known = [value for value in guidance.values() if value is not None]
            guidance = {c: v if v is not None else sum(known) / max(1, len(known)) for c, v in guidance.items()}
            whole = sum(total[column] for column in slow.vision), sum(guidance.values()) or 1.0
            scores = {c: total[c] / whole[0] + guidance[c] / whole[1] for c in slow.vision}
            chosen = sorted(slow.vision, key=lambda c: (c not in slow.must(), -scores[c], c))[:count]
            yield chosen, scores
            slow.keep(chosen)

    return cut


@pytest.mark.parametrize(("family", "batch", "some_text"), CASES)
@pytest.mark.parametrize("variant", ["paper", "code"])
def test_the_selection_is_the_formulas(variant, family, batch, some_text):
    method = TransPrune(ratio=0.6, variant=variant)
    with torch.no_grad():
        assert_equals(reference(variant), method, family, batch, some_text)


def deep():
    config = tiny_config()
    config.text_config.num_hidden_layers = 32
    return config


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_ttv_is_summed_over_the_papers_layers(variant):
    with torch.no_grad():
        assert_equals(reference(variant), TransPrune(variant=variant), "llava", "padded", config=deep())


def test_the_variants_differ():
    with torch.no_grad(), pytest.raises(AssertionError):
        assert_equals(reference("paper"), TransPrune(ratio=0.6, variant="code"), "llava", "mixed")


@pytest.mark.parametrize(("tokens", "expected"), [(576, [504, 360, 72]), (2880, [2520, 1800, 360])])
def test_the_papers_schedule(tokens, expected):
    _, pruned = tiny_pair(config=deep())
    cuts = METHODS["transprune"]().cuts(pruned.model)
    assert [cut.layer for cut in cuts] == [7, 9, 12]
    assert [cut.keep(tokens) for cut in cuts] == expected
    # The paper's layers 7 to 12, counted from 1, each seen once.
    assert [layer + 1 for cut in cuts for layer in cut.watched] == [7, 8, 9, 10, 11, 12]


def watched_layer():
    _, pruned = tiny_pair()
    decoder, score = pruned.model.language_model, TransPrune().cuts(pruned.model)[0].score
    index = torch.arange(5).unsqueeze(0)
    return (
        decoder.layers[0],
        score,
        SimpleNamespace(decoder=decoder, number=0, index=index, vision=index < 3, queries=index > 2),
    )


def test_hooks_are_gone_after_an_error():
    layer, score, state = watched_layer()
    modules = (layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp)
    with pytest.raises(RuntimeError, match="stop"), score.watch(state):  # noqa: PT012
        assert all(module._forward_hooks for module in modules)
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in modules)


def test_another_threads_layers_are_not_seen():
    layer, score, state = watched_layer()
    states, rotation = torch.randn(1, 5, 32), (torch.ones(1, 5, 8), torch.zeros(1, 5, 8))

    def run():
        layer(states, position_embeddings=rotation)

    with score.watch(state):
        run()
    expected = score.total.at(state)
    with score.watch(state):
        other = threading.Thread(target=layer, args=(torch.randn(1, 5, 32),), kwargs={"position_embeddings": rotation})
        other.start()
        other.join()
        run()
    assert torch.equal(score.total.at(state), expected)


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="'paper' or 'code', got 'both'"):
        TransPrune(variant="both")
