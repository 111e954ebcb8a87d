"""DART against its formula, row by row."""

import pytest
import torch

from learnpruner.compat_learnpruner import CACHE
from learnpruner.methods import DART

from decoder_oracle import CASES, SlowDecoder, assert_equals, run_until
from tiny_models import build_inputs, pixels_of, tiny_pair


def reference(slow, layers, counts):
    ((layer,), (count,)) = layers, counts
    _, keys = run_until(slow, layer)
    # Positions of these samples begin at 0: they are not padded.
    norms = {row: sum(head.abs().sum().item() for head in keys[row]) for row in slow.rows}
    hidden = {row: slow.model.norm(slow.hidden[row]).double() for row in slow.rows}

    def largest(columns, number, must=()):
        return sorted(columns, key=lambda c: (c not in must, -norms[c], c))[:number]

    of_vision = largest(slow.vision, min(4, count), slow.must())
    of_text = largest([row for row in slow.queries if row > slow.vision[0]], 4)
    chosen, pivots = list(of_vision), of_vision + of_text
    for turn, pivot in enumerate(pivots):
        takes = (count - len(of_vision)) // len(pivots) + (turn < (count - len(of_vision)) % len(pivots))
        likeness = {
            c: torch.nn.functional.cosine_similarity(hidden[pivot], hidden[c], dim=0).item()
            for c in slow.vision
            if c not in chosen
        }
        chosen += sorted(likeness, key=lambda c: (likeness[c], c))[:takes]
    yield chosen, {column: norms[column] for column in slow.vision}


def highest_first(slow, layers, counts):
    for chosen, norms in reference(slow, layers, counts):
        yield sorted(chosen, key=lambda c: -norms[c])[:-1] + [c for c in slow.vision if c not in chosen][:1], norms


@pytest.mark.parametrize("ratio", [0.55, 0.7, 0.9])
@pytest.mark.parametrize(("family", "batch", "some_text"), CASES)
def test_the_selection_is_the_formulas(family, batch, some_text, ratio):
    with torch.no_grad():
        assert_equals(reference, DART(ratio=ratio, layer=2), family, batch, some_text)


def test_a_token_changed_is_found_out():
    with torch.no_grad(), pytest.raises(AssertionError):
        assert_equals(highest_first, DART(ratio=0.7, layer=2), "llava", "mixed")


@pytest.mark.parametrize("kept", [1, 2, 3, 4, 5, 15])
def test_budgets_at_and_below_the_pivots(kept):
    with torch.no_grad():
        assert_equals(reference, DART(ratio=kept / 16, layer=2, accounting="cap"), "llava", "mixed")


def test_key_norms_in_a_later_turn_on_one_cache():
    stock, pruned = tiny_pair("llava")
    inputs, first = build_inputs("llava", [[2, (32, 32), 3, (32, 32), 4]]), 20
    # Padded on the left, so that the keys are not all valid.
    ids, mask = (torch.nn.functional.pad(inputs[name], (2, 0)) for name in ("input_ids", "attention_mask"))
    turns = ((ids[:, : first + 2], mask[:, : first + 2], slice(1)), (ids[:, first + 2 :], mask, slice(1, 2)))
    cache = None
    for turn, method in zip(turns, ({"pruner_ratio": 1.0}, {"schedule": DART(ratio=0.7, layer=2)})):
        arguments = {"input_ids": turn[0], "attention_mask": turn[1], **pixels_of("llava", inputs, turn[2])}
        outputs = pruned(**arguments, **method, **{CACHE: cache}, use_cache=True)
        cache = outputs[CACHE]
    slow = SlowDecoder(stock, inputs, inputs["input_ids"][0] > 0)
    run_until(slow, 2)
    projection = slow.model.layers[1].self_attn.k_proj
    for column in (c for c in slow.vision if c >= first):
        heads = slow.heads(projection, slow.parts[column][0][0], column - first)
        expected = sum(head.abs().sum().item() for head in heads)
        assert outputs.vision_scores[0][0, column - first].item() == pytest.approx(expected, rel=1e-4)
