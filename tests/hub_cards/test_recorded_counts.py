"""What was measured with other cuts than its method makes today is marked, by the record's own settings."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.hub_cards.card import ACCURACY, accuracy_rows, check_card, write_card
from learnpruner.hub_cards.recorded_counts import MARK, counts_of_today, is_marked, note
from learnpruner.hub_cards.verify import Verified
from learnpruner.methods import METHODS

import oracles
from recorded import accuracy_record, records, speed_record

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
KINDS = {"color": 0.5}
SPEED_TOKENS = {"image": 576, "after_cuts": [110, 37], "cut_layers": [0, 9], "mean": 64.375}


def record(method, counts, layers, depth, ratio, tokens=576, **changes):
    seen = [tokens, *counts]
    mean = sum((end - start) * count for start, end, count in zip([0, *layers], [*layers, depth], seen)) / depth
    made = accuracy_record(method, "b", None, 0.5, KINDS, counts, mean, ratio)
    return {**made, "tokens": {"image": tokens, "after_cuts": counts, "cut_layers": layers, "mean": mean}, **changes}


@given(st.integers(2, 64), st.data(), st.sampled_from([1.0, 2.0, 3.0, 4.5]), st.integers(1, 575))
def test_learnpruners_are_those_of_the_formula(depth, data, rho, kept):
    """Whatever was recorded: the depth follows from the mean."""
    layer = data.draw(st.integers(1, depth - 1))
    first = data.draw(st.integers(2, 576))
    counts = [first, data.draw(st.integers(1, first - 1))]
    fields = {"pruner_layer": layer, "pruner_stage_ratio": rho, "pruner_diversity": 0.1, "pruner_query": "all"}
    old = record("learnpruner", counts, [0, layer], depth, kept / 576, fields=fields)
    expected = oracles.keep_counts(576, kept / 576, depth, layer, rho)
    assert counts_of_today(old) == expected
    assert is_marked(old) == (counts != list(expected))


@pytest.mark.parametrize(
    ("made", "today"),
    [
        (record("learnpruner", [47, 23], [0, 2], 4, 1 / 18), (48, 16)),
        (record("learnpruner", [32, 32], [0, 2], 4, 1 / 18, fields={"pruner_stage_ratio": 1.0}), (32, 32)),
        (record("learnpruner", [192, 64], [0, 2], 4, 1 / 9, accounting="cap", settings={}), (192, 64)),
        (record("random", [2], [0], 8, 0.1, tokens=25), (3,)),
        (record("random", [3], [0], 8, 0.1, tokens=25), (3,)),
        (record("hawk", [32], [0], 8, 1 / 18, settings={"head_weights": "/not/here.json"}), (32,)),
        (record("fastv", [32], [3], 8, 1 / 18, accounting="cap", settings={"layer": 3}), (32,)),
        (record("downsample", [30], [0], 8, 31 / 576), (30,)),
        (record("none", [], [], 8, 1.0), ()),
        ({**speed_record("b", "p"), "ratio": 1 / 9, "tokens": SPEED_TOKENS}, (109, 37)),
    ],
)
def test_methods(made, today):
    assert counts_of_today(made) == today
    assert is_marked(made) == (made["tokens"]["after_cuts"] != list(today))


def broken(**tokens):
    good = record("learnpruner", [47, 23], [0, 2], 4, 1 / 18)
    return {**good, "tokens": {**good["tokens"], **tokens}}


@pytest.mark.parametrize(
    "made",
    [
        broken(cut_layers=None),
        broken(cut_layers=[2, 0]),
        broken(cut_layers=["0", "2"]),
        broken(cut_layers=[0]),
        broken(mean=31.987),
        broken(mean=23.0),
        broken(mean=0.0),
        broken(mean=23 + 1e-9),
        broken(image=10**9),
        record("learnpruner", [47, 23], [0, 2], 4, 1 / 18, fields={"pruner_stage_ratio": "much"}),
        record("learnpruner", [47, 23], [0, 2], 4, 1 / 18, fields={"pruner_layer": 9}),
        record("fastv", [32], [3], 8, 1 / 18, settings={"no": 1}),
        record("fastv", [32], [3], 8, 1 / 18),  # out of reach
        record("another", [32], [3], 8, 1 / 18),
        speed_record("b", "p"),
    ],
)
def test_what_does_not_say_enough_is_not_marked(made):
    assert counts_of_today(made) is None
    assert not is_marked(made)
    assert note([made]) == ""


def test_the_recorded_results_say_enough():
    """The counts of each can be computed, and those of which they differ are known."""
    marked, selected = set(), set()
    for path in sorted(RESULTS.rglob("*.json")):
        content = json.loads(path.read_text())
        if "tokens" in content:
            assert counts_of_today(content) is not None, path
            if list(counts_of_today(content)) != content["tokens"]["after_cuts"]:
                assert is_marked(content)
                assert content["versions"]["learnpruner"] == "0.1.0"
                marked.add((tuple(content["tokens"]["after_cuts"]), counts_of_today(content)))
            elif is_marked(content):
                assert content["versions"]["learnpruner"] == "0.1.0"
                selected.add(content["method"])
    # Until they are measured again.
    assert marked <= {
        ((219, 73), (220, 73)),
        ((110, 37), (109, 37)),
        ((98, 33), (97, 33)),
        ((64, 21), (65, 21)),
        ((253, 168, 93), (252, 168, 93)),
    }
    assert selected <= {"vispruner"}


@pytest.mark.parametrize("revision", [None, 1, 2, 3])
def test_another_selection_is_marked(revision):
    """As revisions of the method's class tell; a record that does not name one is of the first."""
    said = {} if revision is None else {"method_revision": revision}
    made = record("vispruner", [32], [0], 8, 1 / 18, **said)
    assert is_marked(made) == (revision != METHODS["vispruner"].revision)
    if is_marked(made):
        was = f"Revision {revision or 1} of vispruner selected other tokens than today's, 2."
        assert note([made, made]) == f"{MARK} {was}"
        counts = record("learnpruner", [47, 23], [0, 2], 4, 1 / 18)
        assert note([made, counts]) == f"{note([counts])} {was}"
    same = record("random", [32], [0], 8, 1 / 18)
    assert not is_marked(same)
    assert not is_marked({**record("another", [32], [0], 8, 1 / 18), "method_revision": 2})
    composed = record("composed", [48, 16], [0, 2], 4, 1 / 18, settings={"first": "vispruner"}, **said)
    assert is_marked(composed) == (revision != METHODS["vispruner"].revision)
    # From strangers.
    assert not is_marked({**composed, "settings": {"first": {"of": "no method"}}})


@pytest.mark.parametrize(("depth", "measured", "today"), [(32, [2, 6, 15], [3, 7, 16]), (8, [1, 2, 4], [1, 2, 4])])
def test_other_layers_are_marked(depth, measured, today):
    """SparseVLM's, which are the same in a decoder of 8 layers. Its counts at a cap do not depend on them."""
    made = record("sparsevlm", [300, 200, 110], measured, depth, 110 / 576, accounting="cap", settings={})
    assert counts_of_today(made) == (300, 200, 110)
    assert is_marked(made) == (measured != today)
    says = f"sparsevlm was measured with cuts before the layers {measured}, and cuts before {today} today."
    assert note([made]) == (f"{MARK} {says}" if measured != today else "")


def test_the_note_names_versions_and_both_counts():
    old, same = record("learnpruner", [47, 23], [0, 2], 4, 1 / 18), record("random", [32], [0], 8, 1 / 18)
    assert note([same]) == note([]) == ""
    assert note([same, old, old]) == (
        f"{MARK} Measured with the counts of learnpruner 0.1.0. Today's formula keeps 48 -> 16 of 576 in place of "
        "47 -> 23."
    )


@pytest.fixture(scope="module")
def model(base_folder):
    return LearnPrunerForConditionalGeneration.from_pretrained(base_folder)


def test_cards_mark_them(model, tmp_path):
    recorded = records("b", "p")
    recorded["half.json"]["tokens"] |= {"after_cuts": [12, 4], "mean": 8.0}
    recorded["speed.json"] = {**speed_record("b", "p"), "ratio": 1 / 9, "tokens": SPEED_TOKENS}
    write_card(tmp_path, "user/pruner", model, {}, recorded, None, None, None, True, [])
    text = ModelCard.load(tmp_path / "README.md").text
    accuracy, speed = (text.partition(f"\n## {title}\n")[2].partition("\n## ")[0] for title in ("Accuracy", "Speed"))
    marked = [line for line in text.splitlines() if line.startswith("|") and MARK in line]
    assert len(marked) == 2
    assert f"| 12 -> 4 {MARK} |" in accuracy
    assert f"\n\n{note([recorded['half.json']])}\n" in accuracy
    assert "11 -> 4 of 16 in place of 12 -> 4." in accuracy
    assert f"| 0.1111 {MARK} |" in speed
    assert "\n\n" + note([recorded["speed.json"]]) + "\n" in speed
    check_card(tmp_path, recorded, None)
    # Without its mark, a row is none of this release's.
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace(f"12 -> 4 {MARK}", "12 -> 4"))
    with pytest.raises(ValueError, match="Accuracy: no record has the row"):
        check_card(tmp_path, recorded, None)


def test_verify_shows_the_mark_and_what_it_means():
    old = record("learnpruner", [47, 23], [0, 2], 4, 1 / 18)
    rows = accuracy_rows({"old.json": old})
    assert rows[0][list(ACCURACY).index("after each cut")] == f"47 -> 23 {MARK}"
    verified = Verified("here", {}, "base", "p", ["old.json"], rows, note([old]), False, (576, 47, 23), "yes")
    assert str(verified).endswith(f"\n\n{note([old])}")
