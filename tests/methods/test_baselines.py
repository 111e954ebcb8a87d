"""Baselines against what a person would draw."""

import math

import pytest
import torch

from learnpruner import Cut
from learnpruner.methods import METHODS
from learnpruner.methods.base import TopKImages
from learnpruner.methods.baselines import box_scores, grid_marks, mean_of_nearest, random_scores
from learnpruner.methods.images import coordinates, embeddings, grids

from scenes import scene_dataset
from tiny_models import LLAVA, build_inputs, samples_of, tiny_pair


@pytest.mark.parametrize("count", [1, 7, 32, 55, 100, 288, 550, 576])
def test_the_grid_is_spread_evenly(count):
    kept = grid_marks(24, 24, count).reshape(24, 24)
    assert kept.sum() == count
    # Each quarter of the image has its share, but for a line's breadth.
    for quarter in (kept[:12, :12], kept[:12, 12:], kept[12:, :12], kept[12:, 12:]):
        assert abs(quarter.sum() - count / 4) <= 1 + math.sqrt(count) / 2


@pytest.mark.parametrize(("rows", "columns"), [(1, 9), (9, 1), (3, 7), (8, 16)])
def test_every_grid_holds_every_count(rows, columns):
    for count in range(1, rows * columns + 1):
        assert grid_marks(rows, columns, count).sum() == count


def test_boxes_come_first_and_in_turn():
    y, x = (8 * part.flatten() + 4 for part in torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij"))
    for row in scene_dataset("test", 20, level="hard", per_scene=1):
        scores = box_scores(x.float(), y.float(), row["boxes"])
        order = scores.argsort(descending=True, stable=True).tolist()
        middles = [(8 * (token % 24) + 4, 8 * (token // 24) + 4) for token in order]

        def owner(middle):
            x, y = middle
            return [n for n, (l, t, r, b) in enumerate(row["boxes"]) if l <= x < r and t <= y < b]  # noqa: B023, E741

        owners = [owner(middle) for middle in middles]
        inside = sum(len(found) > 0 for found in owners)
        # The first tokens are one of each object: the one nearest its middle.
        first = middles[: len(row["boxes"])]
        for left, top, right, bottom in row["boxes"]:
            center = ((left + right) / 2, (top + bottom) / 2)
            nearest = min(math.dist(center, middle) for middle in middles)
            assert nearest in [pytest.approx(math.dist(center, middle)) for middle in first]
        # Behind the boxes no token is in a box (an object that holds no patch's middle has one token all the same).
        assert all(not found for found in owners[inside + len(row["boxes"]) :])
        assert scores.isfinite().all()


def test_random_is_uniform_and_its_own():
    kept = [random_scores(576, f"0 {number}").squeeze(1).argsort(descending=True)[:32] for number in range(400)]
    share = torch.bincount(torch.stack(kept).flatten(), minlength=576) / 400
    assert share.mean() == pytest.approx(32 / 576)
    assert share.max() < 0.12
    assert torch.equal(random_scores(9, "1 2"), random_scores(9, "1 2"))
    assert not torch.equal(random_scores(9, "1 2"), random_scores(9, "2 2"))


@pytest.mark.parametrize("family", LLAVA)
def test_cls_attention_is_the_towers_own(family):
    """Before anything is laid out: what an eager tower returns as its attention, of each crop."""
    stock, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("two_images", family))
    scores = pruned(**inputs, schedule=METHODS["cls_attention"](ratio=0.5)).vision_scores[0]
    found = scores[~scores.isnan()]
    stock.set_attn_implementation("eager")
    pixels = inputs["pixel_values"].flatten(0, -4)
    maps = stock.model.vision_tower(pixels, output_attentions=True).attentions[-2][:, :, 0, 1:].mean(1)
    if family == "llava":
        assert (found.view(2, -1) - maps).abs().max() < 1e-6
        return
    # The first crop is the whole image, whose patches come first.
    assert (found[: maps.shape[1]] - maps[0]).abs().max() < 1e-6
    # Every other score is one of some crop; padding of a crop is left out.
    assert (found.unsqueeze(1) - maps.flatten()).abs().amin(1).max() < 1e-6


class Spy(TopKImages):
    """Keeps by chance, and what it saw."""

    def __call__(self, images):
        self.images = images
        return torch.rand(images.present.shape)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl"])
def test_coordinates_are_those_of_the_picture(family):
    """Each grid covers its picture evenly, row by row; newlines have no place."""
    _, pruned = tiny_pair(family)
    spy = Spy()
    pruned(**build_inputs(family, samples_of("mixed", family)), schedule=(Cut(0, lambda tokens: tokens - 1, spy),))
    places, every, images = coordinates(spy.images), grids(spy.images), spy.images
    for row, size in enumerate(images.sizes):
        structure = images.features[row, :size].isnan().any(-1)
        assert torch.equal(places[row, :size].isnan().any(-1), structure)
        patches, start = places[row, :size][~structure], 0
        for rows, columns in every[row]:
            grid = patches[start : start + rows * columns].view(rows, columns, 2)
            assert torch.allclose(grid[..., 0], ((torch.arange(columns) + 0.5) / columns).expand(rows, -1))
            assert torch.allclose(grid[..., 1].mT, ((torch.arange(rows) + 0.5) / rows).expand(columns, -1))
            start += rows * columns
        assert start == len(patches)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl"])
def test_pool_is_a_mean_of_the_nearest(family):
    """Patch by patch, with plain loops."""
    _, pruned = tiny_pair(family)
    spy = Spy()
    pruned(**build_inputs(family, samples_of("mixed", family)), schedule=(Cut(0, lambda tokens: tokens - 1, spy),))
    images, chosen = spy.images, spy.select(spy(spy.images), spy.images, [5] * len(spy.images.sizes))
    merged, states, places = mean_of_nearest(images, chosen), embeddings(images), coordinates(images)
    for row, size in enumerate(images.sizes):
        patches = [token for token in range(size) if not places[row, token].isnan().any()]
        keepers = [token for token in patches if chosen[row, token]]
        groups = {token: [] for token in keepers}
        for token in patches:
            distances = [math.dist(places[row, token].tolist(), places[row, keeper].tolist()) for keeper in keepers]
            nearest = min(distances)
            # The first of those that are equally near.
            groups[keepers[[d < nearest + 1e-5 for d in distances].index(True)]].append(token)
        for keeper, members in groups.items():
            mean = states[row, members].mean(0)
            assert (merged[row, keeper] - mean).abs().max() < 1e-5
        others = [token for token in range(size) if token not in keepers]
        assert torch.equal(merged[row, others], states[row, others])
