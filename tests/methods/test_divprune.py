"""DivPrune's choice against one sample at a time, in plain loops: all its vision tokens are one set, as in the authors'
code."""

from functools import cache

import pytest
import torch
from torch.nn.functional import cosine_similarity

from learnpruner.methods import METHODS, divprune

from tiny_models import IMAGE, VIDEO, build_inputs, covering, image_tokens, samples_of, tiny_pair, with_videos


def reference(tokens, structure, count, must=None):
    """Indices kept of one sample. `tokens` is a list of projected vectors."""

    @cache
    def distance(i, j):
        return 1 - cosine_similarity(tokens[i], tokens[j], dim=0).item()

    patches = [i for i in range(len(tokens)) if i not in structure]
    chosen = [] if must is None else [must]
    while len(chosen) < count:
        left = [i for i in patches if i not in chosen]
        if not left:
            chosen.append(next(i for i in structure if i not in chosen))
            continue
        others = [j for j in chosen if j in patches]
        chosen.append(max(left, key=lambda i: min(distance(i, j) for j in (others or patches) if j != i)))
    return sorted(chosen)


def projected(family, stock, inputs):
    """What the stock model gives its decoder for the vision tokens, and which of them are newlines; of every sample."""
    embeds = []
    with (
        torch.no_grad(),
        stock.model.language_model.register_forward_pre_hook(
            lambda *of: embeds.append(of[2]["inputs_embeds"]), with_kwargs=True
        ),
    ):
        stock(**inputs)
    vision = is_vision(inputs)
    newlines = torch.zeros_like(vision)
    if family == "llava_next":
        newlines = vision & (embeds[0] == stock.model.image_newline).all(-1)
    return [(row[mask], newline[mask]) for row, mask, newline in zip(embeds[0], vision, newlines)]


def is_vision(inputs):
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)


def parts_of(family, sample):
    """Tokens of each part that has a count of its own: of a video, each group of frames."""
    sizes = []
    for part in sample:
        if isinstance(part, tuple):
            groups = part[0] if len(part) == 3 else 1
            sizes += [image_tokens(family, *part) // groups] * groups
    return sizes


@pytest.mark.parametrize(
    ("family", "batch", "ratio", "rows_at_a_time"),
    covering(with_videos(["mixed", "image_last"]), (0.05, 0.4, 0.94), (5, 1024)),
)
def test_the_choice_is_the_formulas(family, batch, ratio, rows_at_a_time, monkeypatch):
    monkeypatch.setattr(divprune, "ROWS_AT_A_TIME", rows_at_a_time)
    stock, pruned = tiny_pair(family)
    samples = samples_of(batch, family)
    inputs = build_inputs(family, samples)
    outputs = pruned(**inputs, schedule=METHODS["divprune"](ratio))
    for row, (sample, (tokens, newlines)) in enumerate(zip(samples, projected(family, stock, inputs))):
        columns, structure = is_vision(inputs)[row].nonzero().flatten().tolist(), newlines.nonzero().flatten().tolist()
        count = sum(max(1, round(ratio * size)) for size in parts_of(family, sample))
        must = len(columns) - 1 if batch == "image_last" else None
        kept = reference(list(tokens), structure, count, must) if columns else []
        assert [place for place in columns if outputs.kept_mask[0][row, place]] == [columns[i] for i in kept]


def test_a_frame_that_was_there_is_not_taken_again():
    """Four equal frames: the choice is that of one frame, not of each."""
    _, pruned = tiny_pair("qwen2_vl")
    inputs = build_inputs("qwen2_vl", [[2, (4, 24, 24), 5]])
    frame = inputs["pixel_values_videos"].unflatten(0, (4, -1))[0]
    inputs["pixel_values_videos"] = frame.repeat(4, 1)
    kept = pruned(**inputs, schedule=METHODS["divprune"](0.25)).kept_mask[0]
    places = kept[is_vision(inputs)].view(4, -1)
    # 8 of 36 tokens (2 of 9, rounded, for each frame), all different.
    assert places.sum() == 8
    assert places.sum(0).max() == 1
