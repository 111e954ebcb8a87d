"""DivPrune's choice against one image at a time, in plain loops."""

from functools import cache

import pytest
import torch
from torch.nn.functional import cosine_similarity

from learnpruner.methods import METHODS, divprune

from tiny_models import FAMILIES, build_inputs, covering, image_tokens, samples_of, tiny_pair


def reference(tokens, structure, count, must=None):
    """Indices kept of one image. `tokens` is a list of projected vectors."""

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
    vision = inputs["input_ids"] == stock.config.image_token_id
    newlines = torch.zeros_like(vision)
    if family == "llava_next":
        newlines = vision & (embeds[0] == stock.model.image_newline).all(-1)
    return [(row[mask], newline[mask]) for row, mask, newline in zip(embeds[0], vision, newlines)]


@pytest.mark.parametrize(
    ("family", "ratio", "batch", "rows_at_a_time"),
    covering(
        [(family, ratio) for family in FAMILIES for ratio in (0.05, 0.4, 0.94)], ("mixed", "image_last"), (5, 1024)
    ),
)
def test_the_choice_is_the_formulas(family, batch, ratio, rows_at_a_time, monkeypatch):
    monkeypatch.setattr(divprune, "ROWS_AT_A_TIME", rows_at_a_time)
    stock, pruned = tiny_pair(family)
    samples = samples_of(batch, family)
    inputs = build_inputs(family, samples)
    outputs = pruned(**inputs, schedule=METHODS["divprune"](ratio))
    for row, (sample, (tokens, newlines)) in enumerate(zip(samples, projected(family, stock, inputs))):
        columns = (inputs["input_ids"][row] == pruned.config.image_token_id).nonzero().flatten().tolist()
        sizes = [image_tokens(family, *part) for part in sample if isinstance(part, tuple)]
        start = 0
        for number, size in enumerate(sizes):
            own, structure = tokens[start : start + size], newlines[start : start + size].nonzero().flatten().tolist()
            must = size - 1 if batch == "image_last" and number == len(sizes) - 1 else None
            kept = reference(list(own), structure, max(1, round(ratio * size)), must)
            places = columns[start : start + size]
            assert [place for place in places if outputs.kept_mask[0][row, place]] == [places[i] for i in kept]
            start += size
