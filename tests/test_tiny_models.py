"""What the other tests stand on: few cases that leave out no pair, and models that share nothing."""

from itertools import combinations, product

import torch

from tiny_models import build_inputs, covering, samples_of, tiny_pair


def test_covering_leaves_out_no_case_and_no_pair():
    cases, axes = [("a", 1), ("a", 2), ("b", 1)], ((0.1, 0.2, 0.3), (True, False), ("x", "y"))
    rows = covering(cases, *axes)
    assert {row[:2] for row in rows} == set(cases)
    assert len(rows) < len(cases) * 3 * 2 * 2 / 3
    whole = [(*case, *values) for case in cases for values in product(*axes)]
    assert set(rows) <= set(whole)
    for one, other in combinations(range(5), 2):
        assert {(row[one], row[other]) for row in rows} == {(row[one], row[other]) for row in whole}


@torch.no_grad()
def test_no_two_pairs_share_a_thing():
    stock, pruned = tiny_pair()
    drawn = torch.rand(1)
    inputs = build_inputs("llava", samples_of("one", "llava"))
    expected = [model(**inputs).logits for model in (stock, pruned)]
    for model in (stock, pruned):
        for parameter in model.parameters():
            parameter.zero_()
        model.config.text_config.num_attention_heads = 1
    again = tiny_pair()
    assert torch.equal(torch.rand(1), drawn)
    assert again[0].config is not again[1].config
    for model, logits in zip(again, expected):
        assert model.config.text_config.num_attention_heads == 4
        assert torch.equal(model(**inputs).logits, logits)
