# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The picture that `learnpruner diagnose` draws: one page of panels."""

import math
from pathlib import Path

from .diagnostics import percent

BLUE, ORANGE, GREEN, GREY = "#2a6f97", "#d1722b", "#4f8a4b", "#9a9a9a"
MAPS_IN_A_ROW = 3
# Times the mean: the top of the maps' colours.
HIGHEST = 3


def save_diagnostics(diagnosis: dict, path: Path) -> None:
    """Draws what [`diagnose`] measured as a PNG.

    Panels: foreground recall after each cut; foreground recall and AUC by each layer's text attention; entropy, share
    on sinks and share on foreground of each layer; and where boxes are, and where patches survive each method's cuts.
    """
    from matplotlib import pyplot

    parts = {name: cuts[-1] for name, cuts in diagnosis["methods"].items()}
    if diagnosis["foreground"]:
        parts = {"(the boxes)": diagnosis["foreground"], **parts}
    columns = min(MAPS_IN_A_ROW, len(parts))
    lines = math.ceil(len(parts) / columns)
    heights = [max(3.5, 0.4 * sum(map(len, diagnosis["methods"].values()))), 3.5]
    figure = pyplot.figure(figsize=(10, 0.4 + sum(heights) + 3 * lines), layout="constrained")
    # Names of models and methods may hold dollars, which are no formula.
    figure.suptitle(
        f"{diagnosis['model']}, {diagnosis['images']} images, {diagnosis['ratio']:.4g} of the tokens",
        fontsize=12,
        parse_math=False,
    )
    upper, lower = figure.subfigures(2, 1, height_ratios=(sum(heights), 3 * lines))
    axes = upper.subplots(2, 2, height_ratios=heights)
    _draw_recall(axes[0, 0], diagnosis)
    _draw_quality(axes[0, 1], diagnosis)
    _draw_entropy(axes[1, 0], diagnosis)
    _draw_sinks(axes[1, 1], diagnosis)
    lower.suptitle("how often each place is kept after the last cut, times the method's mean", fontsize=10)
    maps, shown = lower.subplots(lines, columns, squeeze=False).flatten(), None
    for axis, (name, part) in zip(maps, parts.items()):
        axis.set_facecolor("lightgrey")  # where no patch is
        grid = [
            [math.nan if value is None else value / (part["share"] or 1) for value in row] for row in part["places"]
        ]
        shown = axis.imshow(grid, vmin=0, vmax=HIGHEST, cmap="viridis", interpolation="nearest")
        axis.set_title(f"{name}: {percent(part['left'])} % left, {percent(part['top'])} % top", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    for axis in maps[len(parts) :]:
        axis.set_axis_off()
    lower.colorbar(shown, ax=list(maps), shrink=0.8, extend="max")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _no_boxes(axis) -> None:
    axis.text(0.5, 0.5, "no boxes in the data", ha="center", va="center", transform=axis.transAxes, color=GREY)
    axis.set_xticks([])
    axis.set_yticks([])


def _draw_recall(axis, diagnosis: dict) -> None:
    axis.set_title("foreground recall after each cut (mark: by chance)", fontsize=10)
    if not diagnosis["foreground"]:
        return _no_boxes(axis)
    bars = [
        (f"{name}\nbefore layer {cut['layer']}", cut) for name, cuts in diagnosis["methods"].items() for cut in cuts
    ]
    axis.barh(range(len(bars)), [cut["recall"] for _, cut in bars], color=BLUE, height=0.6)
    chance = [cut["share"] for _, cut in bars]
    axis.scatter(chance, range(len(bars)), marker="|", s=250, color=ORANGE, linewidths=2.5, zorder=3)
    axis.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    return None


def _draw_layers(axis, diagnosis: dict, lines: dict[str, tuple[str, str, float | None]]) -> None:
    """Figures of each layer: name -> (label, colour, what chance gives). [CLS] attention's are dashed."""
    numbers = range(len(diagnosis["layers"]))
    for name, (label, color, chance) in lines.items():
        axis.plot(numbers, [layer[name] for layer in diagnosis["layers"]], color=color, marker="o", ms=4, label=label)
        if diagnosis["cls"]:
            axis.axhline(diagnosis["cls"][name], color=color, linestyle="--", linewidth=1)
        if chance is not None:
            axis.axhline(chance, color=color, linestyle=":", linewidth=1)
    if diagnosis["cls"]:
        axis.plot([], [], color="black", linestyle="--", linewidth=1, label="of [CLS]")
    if any(chance is not None for _, _, chance in lines.values()):
        axis.plot([], [], color="black", linestyle=":", linewidth=1, label="by chance")
    if diagnosis["pruner_layer"] < len(numbers):
        ranking = diagnosis["pruner_layer"] - 1
        axis.axvline(ranking, color=GREY, linewidth=6, alpha=0.25, label="ranks in stage 2", zorder=0)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("decoder layer whose text attends, from 0", fontsize=8)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=8)


def _draw_quality(axis, diagnosis: dict) -> None:
    axis.set_title("what a cut by one layer's text attention finds", fontsize=10)
    if not diagnosis["foreground"]:
        return _no_boxes(axis)
    recall = ("foreground recall", BLUE, diagnosis["ratio"])
    return _draw_layers(axis, diagnosis, {"recall": recall, "auc": ("AUC", ORANGE, 0.5)})


def _draw_entropy(axis, diagnosis: dict) -> None:
    axis.set_title("entropy of the attention to patches (1: all the same)", fontsize=10)
    _draw_layers(axis, diagnosis, {"entropy": ("entropy", GREEN, None)})


def _draw_sinks(axis, diagnosis: dict) -> None:
    axis.set_title(f"attention to sinks (above {diagnosis['sink']:g} x the mean) and to boxes", fontsize=10)
    lines = {"sink_attention": ("to sinks", BLUE, None)}
    if diagnosis["foreground"]:
        lines["foreground_attention"] = ("to boxes", ORANGE, diagnosis["foreground"]["share"])
    _draw_layers(axis, diagnosis, lines)
