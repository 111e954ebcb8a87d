"""Selections that were tried, against plain loops."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from learnpruner import LearnPrunerForConditionalGeneration

import ablations
import selections


def drawn(seed, sizes=(9, 14)):
    generator = torch.Generator().manual_seed(seed)
    length = max(sizes)
    features = torch.randn(len(sizes), length, 5, generator=generator)
    present = torch.arange(length) < torch.tensor(sizes).unsqueeze(1)
    scores = torch.rand(len(sizes), length, generator=generator)
    return SimpleNamespace(features=features, present=present), scores


def slowly(name, scores, features, count, weight):
    """One image, token by token."""
    number = len(scores)
    order = sorted(range(number), key=lambda token: -scores[token])
    relevance = [1 - order.index(token) / (number - 1) for token in range(number)]
    alike = [[F.cosine_similarity(one, other, dim=0).item() for other in features] for one in features]
    chosen = []
    while len(chosen) < count:
        values = {}
        for token in set(range(number)) - set(chosen):
            if name == "marginal":
                nearest = max((alike[token][other] for other in chosen), default=0)
                values[token] = weight * relevance[token] - (1 - weight) * nearest
            else:
                values[token] = sum(
                    relevance[other] ** (1 / weight)
                    * max(0, alike[token][other] - max([0, *(alike[other][taken] for taken in chosen)]))
                    for other in range(number)
                )
        chosen.append(max(values, key=values.get))
    return set(chosen)


@pytest.mark.parametrize("name", ["marginal", "facility"])
@pytest.mark.parametrize("seed", range(8))
def test_selection(name, seed):
    images, scores = drawn(seed)
    weight = random.Random(seed).choice((0.2, 0.5, 0.8))
    counts = [4, 7]
    chosen = selections.SELECTIONS[name](scores, images, counts, weight)
    for row, count in enumerate(counts):
        size = int(images.present[row].sum())
        expected = slowly(name, scores[row, :size].tolist(), images.features[row, :size], count, weight)
        assert set(chosen[row].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("name", selections.SELECTIONS)
def test_what_must_stay_stays(name):
    images, scores = drawn(3)
    scores[0, 8] = torch.inf
    chosen = selections.SELECTIONS[name](scores, images, [1, 5], 0.3)
    assert chosen[0].nonzero()[:, 0].tolist() == [8]
    assert chosen.sum(1).tolist() == [1, 5]


@pytest.mark.parametrize("by", ["pruner", "cls"])
def test_it_is_a_method(by):
    model = LearnPrunerForConditionalGeneration.from_pretrained(ablations.EASY_VQA / "learnpruner-tiny-llava").eval()
    torch.manual_seed(0)
    ids = torch.tensor([[model.config.image_token_id] * 576 + [5, 6, 7]])
    side = model.config.vision_config.image_size
    output = model(
        input_ids=ids, pixel_values=torch.randn(1, 3, side, side), schedule=selections.Selected(1 / 36, by=by)
    )
    assert output.kept_mask[0][:, :576].sum() == 16
