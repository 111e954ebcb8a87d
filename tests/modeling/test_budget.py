"""Counts follow from the configuration alone, and make the mean that the ratio says."""

from itertools import product

import pytest

from learnpruner import LearnPrunerLlavaConfig, learnpruner_schedule
from learnpruner.accounting import mean_tokens
from learnpruner.budget_learnpruner import keep_counts

import oracles
from tiny_models import tiny_config

pytestmark = pytest.mark.core
PAPER = {"num_layers": 32, "pruner_layer": 12, "stage_ratio": 3.0}


def test_paper_example():
    assert keep_counts(576, 32 / 576, **PAPER) == (55, 18)
    assert mean_tokens((55, 18), (0, 12), 576, 32) == pytest.approx(31.875)


@pytest.mark.parametrize("average", [192, 128, 64, 32])
def test_mean_is_the_ratio(average):
    counts = keep_counts(576, average / 576, **PAPER)
    assert mean_tokens(counts, (0, 12), 576, 32) == pytest.approx(average, abs=1)


@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 576, 2928])
def test_equals_formula(tokens):
    ratios = (1e-6, 0.01, 1 / 9, 0.5, 0.7, 0.95, 1.0)
    for case in product(ratios, (1, 3, 12, 31, 32), (1.0, 2.0, 3.0, 10.0)):
        ratio, layer, rho = case
        first, second = keep_counts(tokens, ratio, num_layers=32, pruner_layer=layer, stage_ratio=rho)
        assert 1 <= second <= first <= tokens, case
        expected = oracles.keep_counts(tokens, ratio, 32, layer, rho)
        if layer < 32:
            assert (first, second) == (expected[0], min(expected)), case
        else:
            assert first == max(1, round(ratio * tokens)), case
        if ratio == 1:
            assert (first, second) == (tokens, tokens), case


def test_where_the_first_stage_is_capped_the_mean_still_holds():
    first, second = keep_counts(576, 0.8, **PAPER)
    assert first == 576
    assert mean_tokens((first, second), (0, 12), 576, 32) == pytest.approx(0.8 * 576, abs=1)


def test_schedule_of_the_configuration():
    config = LearnPrunerLlavaConfig.from_base_config(tiny_config(), pruner_ratio=0.5)
    first, second = learnpruner_schedule(config)
    assert (first.layer, second.layer) == (0, config.pruner_layer)
    assert (first.keep(16), second.keep(16)) == oracles.keep_counts(16, 0.5, 4, config.pruner_layer, 3.0)
    assert learnpruner_schedule(config, 1.0) == ()
    config.pruner_layer = 4
    assert [cut.layer for cut in learnpruner_schedule(config)] == [0]
