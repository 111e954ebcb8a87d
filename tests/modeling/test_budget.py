"""Counts follow from the configuration alone, and make the mean that the ratio says."""

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from learnpruner import LearnPrunerLlavaConfig, learnpruner_schedule
from learnpruner.accounting import mean_tokens, spread_budget
from learnpruner.budget_learnpruner import SLACK, keep_counts

import oracles
from tiny_models import tiny_config

pytestmark = pytest.mark.core
PAPER = {"num_layers": 32, "pruner_layer": 12, "stage_ratio": 3.0}

TOKENS = st.one_of(st.integers(1, 50), st.integers(1, 100_000))
RATIOS = st.floats(0, 1, exclude_min=True)
# Up to an R2 that is all but nothing.
STAGE_RATIOS = st.one_of(st.floats(1, 20), st.floats(1, 1e308))


@st.composite
def depths(draw):
    """Decoder layers, and how many of them see R1."""
    depth = draw(st.integers(1, 128))
    return depth, draw(st.integers(1, depth))


@st.composite
def written_ratios(draw, tokens):
    """What people write: 192 of 576 tokens, or a small fraction."""
    whole = draw(st.sampled_from([tokens, 18, 100]))
    return Fraction(draw(st.integers(1, whole)), whole)


@pytest.mark.parametrize(("average", "counts"), [(192, (329, 110)), (128, (220, 73)), (64, (109, 37)), (32, (55, 18))])
def test_table_of_the_paper(average, counts):
    assert keep_counts(576, average / 576, **PAPER) == counts
    assert mean_tokens(counts, (0, 12), 576, 32) == pytest.approx(average, abs=12 / 32 / 2)


@given(TOKENS, RATIOS, depths(), STAGE_RATIOS)
@example(1, 5e-324, (1, 1), 1.0)
@example(100_000, 1.0, (128, 1), 1e308)
def test_counts_lie_in_the_image_and_their_mean_is_the_ratio(tokens, ratio, depth, rho):
    depth, layer = depth
    first, second = keep_counts(tokens, ratio, num_layers=depth, pruner_layer=layer, stage_ratio=rho)
    assert 1 <= second <= first <= tokens
    if layer == depth:
        assert first == second
    average = ratio * tokens
    layers, counts = ((0,), (first,)) if layer == depth else ((0, layer), (first, second))
    if average >= 1:
        assert abs(mean_tokens(counts, layers, tokens, depth) - average) <= 0.5 + SLACK
    else:
        assert counts[0] == 1


@given(TOKENS, depths(), STAGE_RATIOS)
def test_ratio_one_keeps_all(tokens, depth, rho):
    depth, layer = depth
    counts = keep_counts(tokens, 1.0, num_layers=depth, pruner_layer=layer, stage_ratio=rho)
    assert counts == (tokens, tokens)


@given(st.data(), st.integers(1, 3000), st.integers(1, 64), st.fractions(1, 12, max_denominator=4))
def test_equals_the_formula_in_exact_fractions(data, tokens, depth, rho):
    """Floats of what was written give the counts of what was written: whole numbers are whole, halves are halves."""
    layer, ratio = data.draw(st.integers(1, depth)), data.draw(written_ratios(tokens))
    counts = keep_counts(tokens, float(ratio), num_layers=depth, pruner_layer=layer, stage_ratio=float(rho))
    assert counts == oracles.keep_counts(tokens, ratio, depth, layer, rho)


@given(st.integers(1, 3000), st.data())
def test_a_share_that_is_a_whole_number_of_tokens_keeps_so_many(tokens, data):
    """Also where the product of floats falls short of it: 49 times a float near to 1/49 is below 1."""
    kept = data.draw(st.integers(1, tokens))
    for ratio in (kept / tokens, kept * (1 / tokens)):
        assume(ratio <= 1)
        assert keep_counts(tokens, ratio, num_layers=32, pruner_layer=12, stage_ratio=1.0) == (kept, kept)
        assert spread_budget(tokens, ratio * tokens, (0,), (1,), 32) == (kept,)


@pytest.mark.parametrize(("tokens", "ratio", "count"), [(5, 0.5, 3), (7, 0.5, 4), (15, 0.1, 2), (25, 0.1, 3)])
def test_halves_round_up(tokens, ratio, count):
    assert keep_counts(tokens, ratio, num_layers=4, pruner_layer=4, stage_ratio=3.0) == (count, count)


@given(TOKENS, RATIOS, depths(), STAGE_RATIOS)
def test_two_cuts_are_a_case_of_any_number(tokens, ratio, depth, rho):
    depth, layer = depth
    layers, weights = ((0,), (1,)) if layer == depth else ((0, layer), (rho, 1))
    counts = spread_budget(tokens, ratio * tokens, layers, weights, depth)
    assert (counts[0], counts[-1]) == keep_counts(tokens, ratio, num_layers=depth, pruner_layer=layer, stage_ratio=rho)


@st.composite
def schedules(draw):
    """Image, layers of the cuts, weights that do not ascend, decoder layers."""
    depth = draw(st.integers(1, 64))
    layers = sorted(draw(st.sets(st.integers(0, depth - 1), min_size=1, max_size=6)))
    weights = draw(st.lists(st.floats(1e-3, 1e3), min_size=len(layers), max_size=len(layers)))
    return draw(TOKENS), layers, sorted(weights, reverse=True), depth


def least_mean(tokens, layers, depth):
    return (layers[0] * tokens + depth - layers[0]) / depth


@given(schedules(), RATIOS)
def test_any_schedule_makes_its_mean(schedule, ratio):
    """What is left over is the rounding of one cut: half a token, in the layers up to the next cut."""
    tokens, layers, weights, depth = schedule
    least = least_mean(tokens, layers, depth)
    # In reach: from one token behind the first cut to the whole image.
    budget = least + ratio * (tokens - least)
    counts = spread_budget(tokens, budget, layers, weights, depth)
    seen = (tokens, *counts)
    assert all(later <= earlier for earlier, later in pairwise(seen))
    assert counts[-1] >= 1
    longest = max(after - before for before, after in pairwise((*layers, depth)))
    assert abs(mean_tokens(counts, layers, tokens, depth) - budget) <= longest / depth / 2 + SLACK


@given(schedules())
def test_any_schedule_keeps_all_at_a_mean_of_all(schedule):
    tokens, layers, weights, depth = schedule
    assert spread_budget(tokens, tokens, layers, weights, depth) == (tokens,) * len(layers)


@given(schedules(), RATIOS)
def test_a_mean_out_of_reach_is_refused(schedule, share):
    """Where no layer comes before the first cut, the least is one token for each cut."""
    tokens, layers, weights, depth = schedule
    budget = share * (least_mean(tokens, layers, depth) - 2 * SLACK)
    if layers[0] == 0:
        counts = spread_budget(tokens, budget, layers, weights, depth)
        assert all(1 <= count <= tokens for count in counts)
        assert counts == tuple(sorted(counts, reverse=True))
    else:
        with pytest.raises(ValueError, match="out of reach"):
            spread_budget(tokens, budget, layers, weights, depth)


@given(st.data())
def test_weights_are_kept_as_nearly_as_whole_numbers_allow(data):
    """Counts that the weights make whole are those counts."""
    depth = data.draw(st.integers(3, 48))
    layers = sorted(data.draw(st.sets(st.integers(0, depth - 1), min_size=1, max_size=4)))
    counts = sorted(data.draw(st.lists(st.integers(1, 500), min_size=len(layers), max_size=len(layers))), reverse=True)
    tokens = data.draw(st.integers(counts[0] + 1, 1000))
    budget = mean_tokens(counts, layers, tokens, depth)
    assert spread_budget(tokens, budget, layers, [count / 7 for count in counts], depth) == tuple(counts)


def test_a_first_cut_that_would_keep_more_than_all_keeps_all():
    assert keep_counts(576, 0.8, **PAPER) == (576, 392)
    # Half a decoder at 100 tokens, and what is left for the second and the third as 2 to 1.
    assert spread_budget(100, 70, (0, 4, 6), (8, 2, 1), 8) == (100, 53, 27)


def test_schedule_of_the_configuration():
    config = LearnPrunerLlavaConfig.from_base_config(tiny_config(), pruner_ratio=0.5)
    first, second = learnpruner_schedule(config)
    assert (first.layer, second.layer) == (0, config.pruner_layer)
    assert (first.keep(16), second.keep(16)) == oracles.keep_counts(16, 0.5, 4, config.pruner_layer, 3.0)
    assert learnpruner_schedule(config, 1.0) == ()
    config.pruner_layer = 4
    assert [cut.layer for cut in learnpruner_schedule(config)] == [0]
