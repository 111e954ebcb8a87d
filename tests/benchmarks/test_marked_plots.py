"""Plots mark what was measured with other counts than today's formula gives, and say below what changed."""

import copy
from itertools import pairwise

import matplotlib
import pytest
from matplotlib import pyplot

from learnpruner.hub_cards.recorded_counts import MARK, counts_of_today, note

import render_accuracy
import render_speed
from recorded import accuracy_record, speed_record

matplotlib.use("Agg")
KINDS = {"color": 0.5}


@pytest.fixture
def drawn(monkeypatch):
    """Figures that were saved, each still open."""
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    yield figures
    monkeypatch.undo()
    pyplot.close("all")


def marked_points(figure):
    return [(text.xy, text.get_text()) for axis in figure.axes for text in axis.texts]


def caption(figure):
    (text,) = figure.texts
    return text.get_text().replace("\n", " ")


def with_counts(made, counts, layers, mean):
    tokens = {"image": 576, "after_cuts": counts, "cut_layers": layers, "mean": mean}
    return {**made, "tokens": {**made["tokens"], **tokens}}


def accuracy_of(name, counts, mean):
    made = accuracy_record("learnpruner", "b", "p", 0.5, KINDS, counts, mean, 1 / 18)
    return with_counts({**made, "name": name}, counts, [0, 2], mean)


def test_accuracy(drawn, tmp_path):
    old = accuracy_of("old", [47, 23], 35.0)
    today = accuracy_of("today", list(counts_of_today(old)), 32.0)
    # Half of the answers are wrong; the first of two methods stands a little to the left.
    place = 35.0 / render_accuracy.BESIDE**0.5
    for runs, points in (([old, today], [((pytest.approx(place), 50.0), MARK)]), ([today], [])):
        groups = render_accuracy.group_runs(copy.deepcopy(runs))
        render_accuracy.save_plot(groups, tmp_path / "plot.png")
        assert marked_points(drawn[-1]) == points
        assert caption(drawn[-1]) == note(runs)
        assert (tmp_path / "plot.png").stat().st_size > 1000
    assert "in place of 47 -> 23" in caption(drawn[0])


def test_methods_can_be_told_apart(drawn, tmp_path):
    """On log axes, the error bars of one budget beside one another."""
    runs = []
    for name, right in (("learnpruner", 0.99), ("vispruner", 0.98), ("random", 0.5)):
        for budget in (32, 64):
            for seed in (0, 1):
                made = accuracy_of(name, [budget], float(budget))
                runs.append({**made, "seed": seed, "accuracy": right - 0.005 * seed, "pruner_sha256": None})
    whole = {**accuracy_of("none", [], 576.0), "method": "none", "accuracy": 0.995}
    for run in runs:
        run["method"] = run["name"]
    render_accuracy.save_plot(render_accuracy.group_runs([whole, *runs]), tmp_path / "plot.png")
    (axis,) = drawn[-1].axes
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert {text.get_text() for text in axis.get_legend().get_texts()} == {"unpruned", *(r["name"] for r in runs)}
    lines = {bars.get_label(): bars for bars in axis.containers}
    assert list(lines["learnpruner"].lines[0].get_ydata()) == pytest.approx([1.25, 1.25])
    (unpruned,) = (line for line in axis.lines if line.get_label() == "unpruned")
    assert list(unpruned.get_ydata()) == pytest.approx([0.5, 0.5])
    for number, budget in enumerate((32, 64)):
        places = sorted(bars.lines[0].get_xdata()[number] for bars in lines.values())
        assert all(right / left > 1.05 for left, right in pairwise(places))
        assert max(abs(place / budget - 1) for place in places) < 0.07
    assert len({bars.lines[0].get_marker() for bars in lines.values()}) == 3


def speed_of(counts, mean, ratio, seconds):
    made = copy.deepcopy(speed_record("b", "p"))
    for who in ("stock", "pruned"):
        made["seconds"][who]["prefill"]["median"] = seconds
    return with_counts({**made, "ratio": ratio}, counts, [0, 9], mean)


def test_speed(drawn, tmp_path):
    old = speed_of([110, 37], 64.375, 1 / 9, 3.0)
    today = [speed_of([55, 18], 31.875, 1 / 18, 2.0), speed_of([329, 110], 192.125, 1 / 3, 4.0)]
    other = speed_of([219, 73], 127.75, 2 / 9, 5.0)
    other["device"] = "another"  # it is in no line
    full = speed_of([], 576.0, 1.0, 6.0)
    for results, points in (([*today, old, other], [((64.375, 3000.0), MARK)]), ([*today, full], [])):
        render_speed.save_plot(results, tmp_path / "plot.png")
        assert marked_points(drawn[-1]) == points
        assert caption(drawn[-1]) == note([old] if old in results else [])
        assert (tmp_path / "plot.png").stat().st_size > 1000
