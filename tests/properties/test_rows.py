"""Rows between the caller's sequence and what is held, against lists of the rows that are left."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learnpruner.rows_learnpruner import PhysicalRows, gather_rows

from property_settings import PROPERTY

pytestmark = pytest.mark.core

FILLS = {torch.float32: math.nan, torch.bool: False, torch.int64: -1}


@st.composite
def cut_prompts(draw, min_cuts=0):
    """The sequence's length, the rows of each sample that are not padding, and those that are left after each cut."""
    batch, sequence = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    some = st.lists(st.booleans(), min_size=sequence, max_size=sequence)
    left = [list(range(sequence))] * batch
    if draw(st.booleans()):
        left = [[row for row, there in enumerate(draw(some)) if there] for _ in range(batch)]
    stages = [left]
    for _ in range(draw(st.integers(min_cuts, 3))):
        left = [[row for row, there in zip(rows, draw(some)) if there] for rows in left]
        stages.append(left)
    return sequence, stages


def values(batch, sequence, *shape):
    """Every number once, from 1."""
    count = batch * sequence * math.prod(shape)
    return torch.arange(1, count + 1).view(batch, sequence, *shape)


def marks(rows, sequence):
    return torch.tensor([[row in own for row in range(sequence)] for own in rows])


def start(sequence, valid, shared=False):
    """All rows of a prompt, of which `valid` are not padding; their positions are each sample's own, or shared."""
    batch = len(valid)
    hidden = values(batch, sequence, 2).float()
    cos = values(1 if shared else batch, sequence, 3).float()
    whole = all(len(rows) == sequence for rows in valid)
    rows = PhysicalRows(batch, sequence, hidden.device, None if whole else marks(valid, sequence))
    rows.hidden_states, rows.position_embeddings = hidden, (cos, -cos)
    return rows


def cut(rows, left):
    """Keeps the logical rows `left`; rows that only fill up stand in no list, so they go."""
    kept = torch.tensor([[row in own for row in index] for index, own in zip(rows.index.tolist(), left)])
    order = rows.keep(kept, [len(own) for own in left])
    rows.hidden_states = gather_rows(rows.hidden_states, order)
    rows.position_embeddings = tuple(gather_rows(part, order) for part in rows.position_embeddings)


def held(tensor, rows):
    """Of each sample, the rows of a physical tensor that are not padding, as lists."""
    valid = torch.ones_like(rows.index, dtype=torch.bool) if rows.valid is None else rows.valid
    return [[row for row, there in zip(sample, own) if there] for sample, own in zip(tensor.tolist(), valid.tolist())]


def picked(logical, left):
    """The same by list, of a logical tensor; one sample stands for all where there is only one."""
    logical = logical.tolist()
    logical = logical * len(left) if len(logical) == 1 else logical
    return [[sample[row] for row in rows] for sample, rows in zip(logical, left)]


@PROPERTY
@given(prompt=cut_prompts(), shared=st.booleans())
def test_every_kept_row_survives_once_and_in_order(prompt, shared):
    sequence, (valid, *cuts) = prompt
    rows = start(sequence, valid, shared)
    hidden, parts = rows.hidden_states, rows.position_embeddings
    assert held(rows.index, rows) == valid
    for left in cuts:
        cut(rows, left)
        counts = [len(own) for own in left]
        assert rows.length == max(counts)
        # Shorter samples are filled up on the left.
        expected = [[False] * (max(counts) - count) + [True] * count for count in counts]
        assert rows.valid is None if min(counts) == max(counts) else rows.valid.tolist() == expected
        assert held(rows.index, rows) == left
        assert held(rows.hidden_states, rows) == picked(hidden, left)
        for part, before in zip(rows.position_embeddings, parts, strict=True):
            assert held(part, rows) == picked(before, left)


@PROPERTY
@given(prompt=cut_prompts())
def test_what_fills_up_is_no_row_that_is_kept(prompt):
    """A scatter to one place twice would leave it open which of the two wins."""
    sequence, (valid, *cuts) = prompt
    rows = start(sequence, valid)
    for left in cuts:
        cut(rows, left)
        assert all(len(set(index)) == len(index) for index in rows.index.tolist())


@PROPERTY
@given(
    prompt=cut_prompts(), dtype=st.sampled_from(sorted(FILLS, key=str)), shape=st.sampled_from([(), (1,), (2,), (2, 3)])
)
def test_round_trip(prompt, dtype, shape):
    """Kept rows come back where they were, and nothing else does."""
    sequence, (valid, *cuts) = prompt
    rows = start(sequence, valid)
    for left in cuts:
        cut(rows, left)
    left = (valid, *cuts)[-1]
    logical, fill = values(len(valid), sequence, *shape).to(dtype), FILLS[dtype]
    if shape:
        flat = logical.flatten(2).unbind(-1)
        physical = torch.stack([rows.to_physical(part) for part in flat], dim=-1)
        physical = physical.view(*rows.index.shape, *shape)
    else:
        physical = rows.to_physical(logical)
    assert held(physical, rows) == picked(logical, left)
    # Whatever stands in a row that only fills up is seen nowhere.
    if rows.valid is not None:
        physical[~rows.valid] = 77
    returned = rows.to_logical(physical, sequence, fill)
    assert returned.dtype == dtype
    assert returned.shape == logical.shape
    for sample, own in enumerate(left):
        for row in range(sequence):
            expected = logical[sample, row] if row in own else torch.full(shape, fill, dtype=dtype)
            torch.testing.assert_close(returned[sample, row], expected, rtol=0, atol=0, equal_nan=True)


@PROPERTY
@given(prompt=cut_prompts(min_cuts=2))
def test_several_cuts_are_the_last_one_alone(prompt):
    sequence, (valid, *cuts) = prompt
    several, once = start(sequence, valid), start(sequence, valid)
    for left in cuts:
        cut(several, left)
    cut(once, cuts[-1])
    assert several.length == once.length
    assert held(several.index, several) == held(once.index, once)
    assert held(several.hidden_states, several) == held(once.hidden_states, once)
    for one, other in zip(several.position_embeddings, once.position_embeddings, strict=True):
        assert held(one, several) == held(other, once)
    there = [torch.ones_like(rows.index, dtype=torch.bool) for rows in (several, once)]
    seen = [rows.to_logical(ones, sequence, False) for rows, ones in zip((several, once), there)]
    assert torch.equal(*seen)
    assert torch.equal(seen[0], marks(cuts[-1], sequence))


@PROPERTY
@given(prompt=cut_prompts(min_cuts=1))
def test_a_batch_is_cut_as_its_samples_are_alone(prompt):
    sequence, (valid, *cuts) = prompt
    rows = start(sequence, valid)
    for left in cuts:
        cut(rows, left)
    for sample in range(len(valid)):
        alone = start(sequence, [valid[sample]])
        for left in cuts:
            cut(alone, [left[sample]])
        assert alone.valid is None
        assert alone.index[0].tolist() == held(rows.index, rows)[sample]
