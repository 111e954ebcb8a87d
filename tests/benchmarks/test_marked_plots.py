"""Plots mark what was measured with other counts than today's formula gives, and say below what changed."""

import copy

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
    for runs, points in (([old, today], [((35.0, 50.0), MARK)]), ([today], [])):
        groups = render_accuracy.group_runs(copy.deepcopy(runs))
        render_accuracy.save_plot(groups, tmp_path / "plot.png")
        assert marked_points(drawn[-1]) == points
        assert caption(drawn[-1]) == note(runs)
        assert (tmp_path / "plot.png").stat().st_size > 1000
    assert "in place of 47 -> 23" in caption(drawn[0])


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
