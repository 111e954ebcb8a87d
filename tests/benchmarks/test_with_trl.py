"""What TRL's trainers make of the small LLaVA: the page shows the records, which are of the shipped weights."""

import json

import pytest

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.hub_cards.records import weights_digest

pytest.importorskip("trl", reason="TRL is an extra, which the lowest supported versions leave out")
import with_trl

PAGE = with_trl.ROOT / "training" / "README.md"


@pytest.fixture(scope="module")
def recorded():
    return {name: json.loads((with_trl.RESULTS / f"{name}.json").read_text()) for name in with_trl.TABLES}


def test_the_page_shows_the_records(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(PAGE.read_text())
    assert with_trl.main(["render", "--into", str(page)]) == 0
    assert page.read_text() == PAGE.read_text()


def test_they_are_of_the_shipped_model(recorded):
    digest = weights_digest(LearnPrunerForConditionalGeneration.from_pretrained(with_trl.MODELS / "tiny-llava"))
    assert {record["base_sha256"] for record in recorded.values()} == {digest}


def test_sft_trains_the_pruner_to_some_use(recorded):
    record = recorded["sft"]
    assert record["pruner_trained"]
    assert record["furthest_keep_rate"] < 1e-3
    assert record["paired"]["low"] > 0


def test_grpo_scores_what_it_sampled(recorded):
    cases = recorded["grpo"]["cases"]
    assert cases["frozen pruner, `rank_by_prompt`"]["largest"] < 1e-3
    assert cases["frozen pruner"]["mean_absolute"] > 10 * cases["frozen pruner, `rank_by_prompt`"]["mean_absolute"]
    assert cases["pruner in training"]["mean_absolute"] > cases["frozen pruner"]["mean_absolute"]


def test_paired_differences():
    found = with_trl.paired([[True, False, False, True]] * 2, [[True, True, False, True]] * 2)
    assert found["difference"] == 0.25
    assert found["low"] == pytest.approx(0.25 - 1.96 * 0.5 / 2)


def test_a_missing_record_is_said(tmp_path, capsys):
    assert with_trl.main(["render", "--results", str(tmp_path)]) == 2
    assert "sft.json" in capsys.readouterr().err
