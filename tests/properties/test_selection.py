"""What is chosen, against sorted lists."""

from fractions import Fraction
from math import inf, isnan, isqrt, nan
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from learnpruner.cuts_learnpruner import TextAttention
from learnpruner.scores_learnpruner import best_first, rank, top_k, top_k_with_diversity

from host_waits import Waits
from property_settings import PROPERTY

pytestmark = pytest.mark.core

# Few numbers, so that many are equal; every dtype has them exactly.
SCORES = st.sampled_from([nan, -2.0, -0.5, 0.0, 0.25, 1.0, 3.0])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def in_order(scores, columns):
    """Columns by descending score, numbers before NaN, the lower index before the higher."""
    numbers = [column for column in columns if not isnan(scores[column])]
    rest = [column for column in columns if isnan(scores[column])]
    return sorted(numbers, key=lambda column: (-scores[column], column)) + sorted(rest)


def mask(rows, width):
    return [[column in chosen for column in range(width)] for chosen in rows]


@st.composite
def tables(draw, least=0, most_rows=4, scores=SCORES):
    """A few rows of equal width: scores, the candidates' columns, how many of them are wanted, and which must be."""
    width = draw(st.integers(1, 8))
    found = []
    for _ in range(draw(st.integers(1, most_rows))):
        row = draw(st.lists(scores, min_size=width, max_size=width))
        candidates = [column for column in range(width) if draw(st.booleans())]
        if least and not candidates:
            candidates = [draw(st.integers(0, width - 1))]
        count = draw(st.integers(min(least, len(candidates)), len(candidates)))
        must = draw(st.lists(st.sampled_from(candidates), max_size=min(count, 2), unique=True)) if count else []
        for column in must:
            row[column] = inf
        found.append((row, candidates, count, must))
    return found


def columns_of(table):
    rows, candidates, counts, musts = (list(column) for column in zip(*table))
    return rows, candidates, counts, musts, len(rows[0])


@PROPERTY
@given(table=tables(), dtype=DTYPES)
@example(table=[([nan, 1.0, nan, 1.0], [0, 1, 2, 3], 3, [])], dtype=torch.float32)
def test_best_first_is_a_stable_sort(table, dtype):
    """Candidates by score; then all others, each of them once."""
    rows, candidates, _, _, width = columns_of(table)
    scores, marked = torch.tensor(rows, dtype=dtype), torch.tensor(mask(candidates, width))
    order, places = best_first(scores, marked).tolist(), rank(scores, marked).tolist()
    for row, own, columns, place in zip(rows, candidates, order, places):
        assert columns[: len(own)] == in_order(row, own)
        assert sorted(columns) == list(range(width))
        assert [place[column] for column in columns] == list(range(width))


@PROPERTY
@given(table=tables(), dtype=DTYPES, count_dtype=st.sampled_from([torch.int64, torch.int32]))
def test_top_k(table, dtype, count_dtype):
    """Exactly as many as wanted, the best, no others than candidates, and every infinite score."""
    rows, candidates, counts, musts, width = columns_of(table)
    log = []
    scores, marked = torch.tensor(rows, dtype=dtype), torch.tensor(mask(candidates, width))
    wanted = torch.tensor(counts, dtype=count_dtype)
    with Waits(log):
        chosen = top_k(scores, marked, wanted)
    assert log == []
    assert chosen.dtype == torch.bool
    assert chosen.tolist() == mask([in_order(row, own)[:count] for row, own, count, _ in table], width)
    assert chosen.sum(1).tolist() == counts
    assert not (chosen & ~marked).any()
    assert all(chosen[row, column] for row, must in enumerate(musts) for column in must)


@PROPERTY
@given(table=tables(), data=st.data())
def test_top_k_of_a_row_depends_on_its_candidates_alone(table, data):
    """Not on other rows, nor on what stands between, before or behind the candidates, nor on how wide a batch is."""
    rows, candidates, counts, _, width = columns_of(table)
    both = top_k(torch.tensor(rows), torch.tensor(mask(candidates, width)), torch.tensor(counts))
    other = [[row[c] if c in own else data.draw(SCORES | st.just(inf)) for c in range(width)] for row, own, *_ in table]
    again = top_k(torch.tensor(other), torch.tensor(mask(candidates, width)), torch.tensor(counts))
    assert again.tolist() == both.tolist()
    for row, own, count, together in zip(rows, candidates, counts, both.tolist()):
        alone = torch.tensor([[row[column] for column in own]])
        found = top_k(alone, torch.ones_like(alone, dtype=torch.bool), torch.tensor([count]))
        assert found[0].tolist() == [together[column] for column in own]


# The corners of the 24-cell, of length 2 or 8: their cosines are 0, 1/2 and 1, or minus these, exactly in every dtype.
# They are often equal, and equal ones go to the lower index.
AXES = [tuple(2 * sign * (place == axis) for place in range(4)) for axis in range(4) for sign in (1, -1)]
CORNERS = [(a, b, c, d) for a in (1, -1) for b in (1, -1) for c in (1, -1) for d in (1, -1)]
STRUCTURE = (nan,) * 4
LONG = [tuple(4 * part for part in corner) for corner in AXES + CORNERS]
FEATURES = st.sampled_from([*AXES, *CORNERS, *LONG, STRUCTURE])


def cosine(one, other):
    squares = [sum(part * part for part in vector) for vector in (one, other)]
    return Fraction(sum(a * b for a, b in zip(one, other)), isqrt(squares[0] * squares[1]))


def with_diversity(scores, candidates, count, features, diversity):
    """One candidate after the other: first by score, then the one least like what was chosen; structure last."""
    by_score = max(1, count - round(diversity * count))
    chosen = in_order(scores, candidates)[:by_score]
    while len(chosen) < count:
        left = [column for column in candidates if column not in chosen]
        patches = [column for column in left if features[column] != STRUCTURE]
        if not patches:
            chosen.append(min(left))
            continue
        seen = [features[column] for column in chosen if features[column] != STRUCTURE]
        likeness = {column: max((cosine(features[column], one) for one in seen), default=0) for column in patches}
        chosen.append(min(patches, key=lambda column: (likeness[column], column)))
    return chosen


@st.composite
def images(draw):
    """Tables of at least one candidate and token wanted, the features of all, and a share of diversity."""
    table = draw(tables(least=1))
    found = []
    diversity = draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.6, 0.75, 1.0]))
    for row, candidates, count, must in table:
        features = [draw(FEATURES) for _ in row]
        # Structure has no score; one row must be kept at most, and it may be structure.
        row = [-0.75 if isnan(value) or value == inf else value for value in row]
        row = [nan if one == STRUCTURE else value for value, one in zip(row, features)]
        for column in must[:1]:
            row[column] = inf
        found.append((row, candidates, count, must[:1], features))
    return found, diversity


def run_with_diversity(table, diversity, dtype=torch.float32, scale=1.0):
    rows, candidates, counts, _, features = (list(column) for column in zip(*table))
    marked = torch.tensor(mask(candidates, len(rows[0])))
    vectors = torch.tensor(features, dtype=dtype) * scale
    return top_k_with_diversity(torch.tensor(rows), marked, counts, vectors, diversity)


@PROPERTY
@given(case=images(), dtype=DTYPES, scale=st.sampled_from([1.0, 0.25, 64.0]))
# The nearest of those chosen counts, not all together.
@example(
    case=([([3.0, 1.0, -2.0, -2.0], [0, 1, 2, 3], 3, [], [*AXES[:2], CORNERS[0], AXES[2]])], 0.25),
    dtype=torch.float32,
    scale=1.0,
)
# Structure comes after every patch.
@example(
    case=([([3.0, nan, 1.0], [0, 1, 2], 2, [], [AXES[0], STRUCTURE, CORNERS[0]])], 0.5), dtype=torch.float32, scale=1.0
)
# Structure that was chosen is like nothing.
@example(
    case=([([inf, 3.0, 0.0, 0.0], [0, 1, 2, 3], 3, [0], [STRUCTURE, AXES[0], CORNERS[8], AXES[1]])], 0.25),
    dtype=torch.float32,
    scale=1.0,
)
# Length is no likeness.
@example(case=([([3.0, 1.0, 1.0], [0, 1, 2], 2, [], [AXES[0], AXES[0], LONG[8]])], 0.5), dtype=torch.float32, scale=1.0)
def test_top_k_with_diversity(case, dtype, scale):
    table, diversity = case
    chosen = run_with_diversity(table, diversity, dtype, scale)
    expected = [with_diversity(row, own, count, features, diversity) for row, own, count, _, features in table]
    assert chosen.tolist() == mask(expected, len(table[0][0]))
    assert chosen.sum(1).tolist() == [count for _, _, count, _, _ in table]
    assert all(chosen[row, column] for row, (*_, must, _) in enumerate(table) for column in must)


@PROPERTY
@given(case=images())
def test_diversity_does_not_wait_for_the_device(case):
    table, diversity = case
    rows, candidates, counts, _, features = (list(column) for column in zip(*table))
    scores, marked, vectors = torch.tensor(rows), torch.tensor(mask(candidates, len(rows[0]))), torch.tensor(features)
    log = []
    with Waits(log):
        top_k_with_diversity(scores, marked, counts, vectors.float(), diversity)
    assert log == []


@PROPERTY
@given(case=images())
def test_diversity_in_an_image_depends_on_its_tokens_alone(case):
    table, diversity = case
    together = run_with_diversity(table, diversity).tolist()
    for (row, own, count, must, features), both in zip(table, together):
        alone = ([row[c] for c in own], list(range(len(own))), count, must, [features[c] for c in own])
        assert run_with_diversity([alone], diversity)[0].tolist() == [both[column] for column in own]


@PROPERTY
@given(table=tables(least=1))
def test_without_diversity_it_is_top_k(table):
    rows, candidates, counts, _, width = columns_of(table)
    scores, marked = torch.tensor(rows), torch.tensor(mask(candidates, width))
    features = torch.ones(*scores.shape, 2)
    chosen = top_k_with_diversity(scores, marked, counts, features, 0.0)
    assert chosen.tolist() == top_k(scores, marked, torch.tensor(counts)).tolist()


def by_text(scores, first, vision, count):
    """What cut 2 keeps: its place among its own kind decides, seen by text or not; what must be comes before."""
    must = [column for column in vision if scores[column] == inf]
    unseen = [column for column in vision if isnan(scores[column]) or column in must]
    seen = [column for column in vision if column not in unseen]
    first = [inf if column in must else value for column, value in enumerate(first)]
    share = {}
    for kind, values in ((unseen, first), (seen, scores)):
        for place, column in enumerate(in_order(values, kind)):
            share[column] = Fraction(2 * place + 1, 2 * len(kind))
    return sorted(vision, key=lambda column: (column not in must, share[column], column))[:count]


@st.composite
def samples(draw):
    """Tables of attention received and, for each, the scores of the first cut; one row of a sample at most must be."""
    table = draw(tables(scores=st.sampled_from([nan, nan, 0.0, 0.125, 0.25, 0.5])))
    found = []
    for row, vision, count, must in table:
        row = [nan if value == inf else value for value in row]
        # Text has no score.
        row = [value if column in vision else nan for column, value in enumerate(row)]
        for column in must[:1]:
            row[column] = inf
        first = draw(st.lists(SCORES, min_size=len(row), max_size=len(row)))
        found.append((row, first, vision, count, must[:1]))
    return found


def run_by_text(table):
    scores, first, vision, counts, _ = (list(column) for column in zip(*table))
    marked = torch.tensor(mask(vision, len(scores[0])))
    state = SimpleNamespace(vision=marked, vision_scores=torch.tensor(first))
    return torch.tensor(scores), state, torch.tensor(counts)


@PROPERTY
@given(table=samples())
@example(table=[([nan, 0.5, nan, 0.25], [0.0, nan, 1.0, nan], [0, 1, 2, 3], 2, [])])
@example(table=[([0.5, 0.25, nan], [0.0, 0.0, 1.0], [0, 1, 2], 2, [])])
@example(table=[([0.5, 0.25, inf], [3.0, 3.0, -2.0], [0, 1, 2], 1, [2])])
def test_second_cut(table):
    width = len(table[0][0])
    arguments = run_by_text(table)
    log = []
    with Waits(log):
        chosen = TextAttention("all").select(*arguments)
    assert log == []
    expected = [by_text(scores, first, vision, count) for scores, first, vision, count, _ in table]
    assert chosen.tolist() == mask(expected, width)
    assert chosen.sum(1).tolist() == [count for *_, count, _ in table]
    assert all(chosen[row, column] for row, (*_, must) in enumerate(table) for column in must)


@PROPERTY
@given(table=samples())
def test_second_cut_of_a_sample_depends_on_its_vision_tokens_alone(table):
    together = TextAttention("all").select(*run_by_text(table)).tolist()
    for (scores, first, vision, count, must), both in zip(table, together):
        if not vision:
            assert not any(both)
            continue
        alone = ([scores[c] for c in vision], [first[c] for c in vision], list(range(len(vision))), count, must)
        found = TextAttention("all").select(*run_by_text([alone]))
        assert found[0].tolist() == [both[column] for column in vision]
