"""What `best_first` says of numbers at the very end of their range."""

from math import inf, isnan, nan

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from learnpruner.scores_learnpruner import top_k

from property_settings import PROPERTY

pytestmark = pytest.mark.core

LOWEST = torch.finfo(torch.float32).min


@st.composite
def rows(draw):
    scores = draw(st.lists(st.sampled_from([nan, -inf, LOWEST, 0.0, inf]), min_size=1, max_size=5))
    candidates = [column for column in range(len(scores)) if draw(st.booleans())]
    return scores, candidates, draw(st.integers(0, len(candidates)))


def run(scores, candidates, count):
    marked = torch.tensor([[column in candidates for column in range(len(scores))]])
    return top_k(torch.tensor([scores]), marked, torch.tensor([count]))[0].nonzero().flatten().tolist()


@PROPERTY
@given(row=rows())
@example(row=([0.0, -inf], [1], 1))
def test_only_candidates_are_chosen(row):
    assert set(run(*row)) <= set(row[1])


@PROPERTY
@given(row=rows())
@example(row=([nan, -inf], [0, 1], 1))
@example(row=([nan, LOWEST], [0, 1], 1))
def test_every_number_comes_before_nan(row):
    scores, candidates, _ = row
    numbers = [column for column in candidates if not isnan(scores[column])]
    chosen = [column for column in run(*row) if column in candidates]
    if any(isnan(scores[column]) for column in chosen):
        assert set(numbers) <= set(chosen)
