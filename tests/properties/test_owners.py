"""Which sample an image belongs to, against a search through all splits, and what is read of a prompt against loops."""

from itertools import combinations_with_replacement

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from learnpruner.prompt_learnpruner import Prompt

from property_settings import PROPERTY

pytestmark = pytest.mark.core

SIZES = st.integers(1, 5)
KIND = {"text": 0, "image": 1, "video": 2}


def layout_of(placeholders, modality="image"):
    """A layout of which nothing is known but the placeholders of each sample."""
    nothing = torch.zeros(len(placeholders), 0, dtype=torch.int8)
    counts = {"image": [0] * len(placeholders), "video": [0] * len(placeholders), modality: placeholders}
    return Prompt(nothing, None, [0] * len(placeholders), counts, {})


def splits(sizes, placeholders):
    """Every way to deal the images out in order so that each sample gets as many tokens as it has placeholders."""
    found = []
    for owners in combinations_with_replacement(range(len(placeholders)), len(sizes)):
        held = [0] * len(placeholders)
        for owner, size in zip(owners, sizes):
            held[owner] += size
        if held == placeholders:
            found.append(list(owners))
    return found


@st.composite
def almost_consistent(draw):
    """Sizes and placeholders that match, but for up to two changes."""
    samples = draw(st.lists(st.lists(SIZES, max_size=3), min_size=1, max_size=4))
    sizes = [size for sample in samples for size in sample]
    placeholders = [sum(sample) for sample in samples]
    for _ in range(draw(st.integers(0, 2))):
        source = draw(st.integers(0, len(placeholders) - 1))
        target = draw(st.integers(0, len(placeholders) - 1))
        moved = draw(st.integers(0, placeholders[source]))
        placeholders[source] -= moved
        placeholders[target] += draw(st.sampled_from([moved, moved, 0, moved + 1]))
    return sizes, placeholders


@PROPERTY
@given(
    samples=st.lists(st.lists(SIZES, max_size=4), min_size=1, max_size=6), modality=st.sampled_from(("image", "video"))
)
def test_every_split_of_images_is_found_again(samples, modality):
    sizes = [size for sample in samples for size in sample]
    layout = layout_of([sum(sample) for sample in samples], modality)
    assert layout.owners(modality, sizes) == [row for row, sample in enumerate(samples) for _ in sample]


@PROPERTY
@given(case=almost_consistent())
@example(case=([], [0, 0]))
@example(case=([], [0, 1]))
@example(case=([2], [1, 1]))
@example(case=([2], [0]))
@example(case=([2, 2], [2, 0]))
@example(case=([2, 2], [2, 0, 2, 2]))
@example(case=([1, 3], [3, 1]))
def test_a_split_is_found_exactly_where_there_is_one(case):
    sizes, placeholders = case
    possible = splits(sizes, placeholders)
    assert len(possible) <= 1
    if possible:
        assert layout_of(placeholders).owners("image", sizes) == possible[0]
    else:
        with pytest.raises(ValueError, match="do not match"):
            layout_of(placeholders).owners("image", sizes)


# A part of a sample is what it is and how many tokens it has.
PARTS = st.lists(st.tuples(st.sampled_from(sorted(KIND)), SIZES), max_size=5)


@st.composite
def prompts(draw):
    """Samples of text, images and videos, filled up on either side, with anything at all under the padding."""
    samples = draw(st.lists(PARTS, min_size=1, max_size=4))
    rows = [[KIND[name] for name, size in sample for _ in range(size)] for sample in samples]
    longest = max(1, *map(len, rows)) + draw(st.integers(0, 2))
    kinds, valid = [], []
    for row in rows:
        missing = longest - len(row)
        padding = draw(st.lists(st.integers(0, 2), min_size=missing, max_size=missing))
        left = draw(st.booleans())
        kinds.append(padding + row if left else row + padding)
        valid.append([False] * missing + [True] * len(row) if left else [True] * len(row) + [False] * missing)
    return samples, kinds, valid


def tensor(rows, dtype):
    return torch.tensor(rows, dtype=dtype)


@PROPERTY
@given(prompt=prompts(), grids=st.lists(st.lists(st.integers(0, 99), min_size=3, max_size=3), max_size=3))
def test_a_prompt_is_read_as_it_was_written(prompt, grids):
    samples, kinds, valid = prompt
    grid = torch.tensor(grids, dtype=torch.int64).view(len(grids), 3)
    layout = Prompt.read(tensor(kinds, torch.int8), tensor(valid, torch.bool), {"image_grid_thw": grid})
    assert layout.lengths == [sum(size for _, size in sample) for sample in samples]
    assert layout.grids == {"image_grid_thw": grids}
    assert layout.mistyped == 0
    for modality in ("image", "video"):
        own = [[size for name, size in sample if name == modality] for sample in samples]
        assert layout.placeholders[modality] == [sum(sizes) for sizes in own]
        sizes = [size for sizes in own for size in sizes]
        assert layout.owners(modality, sizes) == [row for row, sizes in enumerate(own) for _ in sizes]


@PROPERTY
@given(prompt=prompts())
def test_without_a_mask_nothing_is_padding(prompt):
    _, kinds, _ = prompt
    layout = Prompt.read(tensor(kinds, torch.int8), None, {})
    assert layout.lengths == [len(row) for row in kinds]
    assert layout.placeholders == {name: [row.count(KIND[name]) for row in kinds] for name in ("image", "video")}


@PROPERTY
@given(prompt=prompts(), masked=st.booleans(), earlier=st.integers(0, 2), data=st.data())
def test_tokens_of_another_type_are_counted(prompt, masked, earlier, data):
    """Padding does not count, nor do the types of earlier turns that stand in front."""
    _, kinds, valid = prompt
    length = earlier + len(kinds[0])
    types = [data.draw(st.lists(st.integers(0, 2), min_size=length, max_size=length)) for _ in kinds]
    layout = Prompt.read(
        tensor(kinds, torch.int8), tensor(valid, torch.bool) if masked else None, {}, tensor(types, torch.int64)
    )
    assert layout.mistyped == sum(
        types[row][earlier + column] != kinds[row][column]
        for row in range(len(kinds))
        for column in range(len(kinds[0]))
        if valid[row][column] or not masked
    )
