# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Figures of what a model attends to and what methods keep: LearnPruner's analysis (arXiv 2604.23950) on any model.

For each image, then the mean over the images for which a figure is known; `None` where it is for none. Foreground are
the patches of known boxes ([`box_patches`]).
"""

import math
from collections.abc import Sequence

import torch

from learnpruner.scores_learnpruner import top_k

from .observations import Observation

# Rows and columns of the map of kept places, whatever the images' own grids.
PLACES = 12
# Times the mean of an image's patches from which one is a sink. The paper's definition is not known to the project.
SINK = 5.0


def share(values: torch.Tensor, among: torch.Tensor | None) -> float | None:
    """The mean over the patches `among`, of marks their share; `None` where there are none."""
    return None if among is None or not among.any() else values[among].double().mean().item()


def area_under_curve(scores: torch.Tensor, foreground: torch.Tensor) -> float | None:
    """The chance that a patch of the foreground ranks above one of the ground, ties by half (ROC AUC)."""
    ground, front = scores[~foreground].sort().values, scores[foreground].contiguous()
    if not len(ground) or not len(front):
        return None
    below = (torch.searchsorted(ground, front) + torch.searchsorted(ground, front, right=True)) / 2
    return (below.double().mean() / len(ground)).item()


def attention_figures(
    paid: torch.Tensor, foreground: torch.Tensor | None, count: int, sink: float
) -> dict[str, float | None]:
    """Where attention to the patches of one image goes.

    Args:
        paid (`torch.Tensor` of shape `(patches,)`): What each patch is paid; at least two patches.
        foreground (`torch.Tensor` of shape `(patches,)`, bool, *optional*): One patch or more.
        count (`int`): Patches that a cut by `paid` keeps.
        sink (`float`): Times the mean from which a patch is a sink.

    Returns:
        `dict`:
        - patches: all that they are paid; of a row of text the rest goes to text.
        - entropy: of how that is spread over them, from 0 (one has all) to 1 (all have the same).
        - sinks, sink_attention: share of patches that are sinks, and of the attention to patches that goes to them.
        - sink_foreground: share of sinks that is foreground.
        - foreground_attention: share of the attention to patches that goes to foreground.
        - recall: share of the foreground that a cut by `paid` keeps; by chance it is the share kept.
        - auc: as in [`area_under_curve`]; by chance one half.
    """
    total = paid.double().sum()
    spread = paid.double() / total
    sinks = spread * len(paid) > sink
    (best,) = top_k(paid.unsqueeze(0), torch.ones_like(sinks).unsqueeze(0), torch.tensor([count]))
    return {
        "patches": total.item(),
        "entropy": torch.special.entr(spread).sum().item() / math.log(len(paid)),
        "sinks": sinks.double().mean().item(),
        "sink_attention": spread[sinks].sum().item(),
        "sink_foreground": None if foreground is None else share(foreground, sinks),
        "foreground_attention": None if foreground is None else spread[foreground].sum().item(),
        "recall": share(best, foreground),
        "auc": None if foreground is None else area_under_curve(paid, foreground),
    }


def position_figures(marks: torch.Tensor, places: torch.Tensor) -> dict:
    """Where the marked patches of one image are.

    Args:
        marks (`torch.Tensor` of shape `(patches,)`, bool): Where none is, as where a cut keeps LLaVA-NeXT's newlines
            alone, only `share` and `places` are known.
        places (`torch.Tensor` of shape `(patches, 2)`): x and y, as shares.

    Returns:
        `dict`:
        - share: of the patches that are marked.
        - left, right, top, bottom: share of the marked in that half; a patch on the line is half there.
        - raster: mean place of the marked in the order of tokens, from 0 to 1.
        - places: of the patches in each of `PLACES` x `PLACES` parts of the picture, the share marked; rows from the
          top, `None` where no patch's middle is.
    """
    column, row = (places * PLACES).long().clamp(max=PLACES - 1).unbind(-1)
    cell = row * PLACES + column
    there = torch.bincount(cell, minlength=PLACES**2)
    marked = torch.bincount(cell[marks], minlength=PLACES**2)
    parts = [n / of if of else None for n, of in zip(marked.tolist(), there.tolist())]
    before = (places < 0.5).double() + (places == 0.5).double() / 2
    order = torch.linspace(0, 1, len(marks), dtype=torch.float64)
    return {
        "share": marks.double().mean().item(),
        "left": share(before[:, 0], marks),
        "right": share(1 - before[:, 0], marks),
        "top": share(before[:, 1], marks),
        "bottom": share(1 - before[:, 1], marks),
        "raster": share(order, marks),
        "places": [parts[start : start + PLACES] for start in range(0, PLACES**2, PLACES)],
    }


def image_figures(seen: Observation, foreground: torch.Tensor | None, ratio: float, sink: float) -> dict:
    """All figures of one image.

    Args:
        foreground (`torch.Tensor` of shape `(patches,)`, bool, *optional*): One patch or more.
        ratio (`float`): Share of the patches that a cut by attention keeps.
        sink (`float`): As in [`attention_figures`].

    Returns:
        `dict`:
        - foreground: where it is ([`position_figures`]).
        - methods: by name, for each cut where what it keeps is, and `recall`, the share of the foreground that it
          keeps; by chance that is its `share`.
        - cls, layers: [`attention_figures`] of [CLS] and of the text in each decoder layer.
    """
    count = max(1, round(ratio * len(seen.places)))
    return {
        "foreground": None if foreground is None else position_figures(foreground, seen.places),
        "methods": {
            name: [{"recall": share(mask, foreground), **position_figures(mask, seen.places)} for mask in kept]
            for name, kept in seen.kept.items()
        },
        "cls": None if seen.cls is None else attention_figures(seen.cls, foreground, count, sink),
        "layers": [attention_figures(paid, foreground, count, sink) for paid in seen.text],
    }


def mean_figures(figures: Sequence):
    """The mean of figures of one form: numbers, or lists and dicts of them. `None` counts nowhere."""
    known = [figure for figure in figures if figure is not None]
    if not known:
        return None
    if isinstance(known[0], dict):
        return {name: mean_figures([figure[name] for figure in known]) for name in known[0]}
    if isinstance(known[0], list):
        return [mean_figures(parts) for parts in zip(*known)]
    return sum(known) / len(known)


def percent(value: float | None) -> str:
    """A share in percent, a dash where it is not known."""
    return "-" if value is None else f"{100 * value:.1f}"


def summary(diagnosis: dict) -> str:
    """Two tables in Markdown, in percent, of what `learnpruner diagnose` wrote."""
    names = ("share", "recall", "left", "top", "raster")
    lines = [
        "| method | cut before layer | patches | foreground recall | of them, left half | top half | mean place in the "
        "raster |",
        "|---|---|---|---|---|---|---|",
    ]
    if diagnosis["foreground"]:
        boxes = {**diagnosis["foreground"], "recall": None}
        lines.append(f"| (the boxes) | - | {' | '.join(percent(boxes[name]) for name in names)} |")
    for method, cuts in diagnosis["methods"].items():
        lines += [f"| {method} | {cut['layer']} | {' | '.join(percent(cut[name]) for name in names)} |" for cut in cuts]
    names = ("patches", "entropy", "sinks", "sink_attention", "sink_foreground", "foreground_attention")
    lines += [
        "",
        "| attention of | to patches | entropy | sinks | attention to sinks | sinks in boxes | attention to boxes | "
        "foreground recall | AUC |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = [("[CLS]", diagnosis["cls"])] if diagnosis["cls"] else []
    rows += [(f"text, layer {number}", layer) for number, layer in enumerate(diagnosis["layers"])]
    lines += [
        f"| {label} | {' | '.join(percent(figures[name]) for name in (*names, 'recall', 'auc'))} |"
        for label, figures in rows
    ]
    return "\n".join(lines)
