"""Baselines against what a person would draw."""

import math
from fractions import Fraction

import pytest
import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from learnpruner import Cut
from learnpruner.methods import METHODS, baselines
from learnpruner.methods.base import TopKImages
from learnpruner.methods.baselines import box_scores, grid_marks, mean_of_nearest, random_scores
from learnpruner.methods.images import coordinates, embeddings, grids, places

from largest import Largest
from scenes import scene_dataset
from tiny_models import IMAGE, LLAVA, PATCH, PINPOINTS, QWEN, SIDE, VIDEO, build_inputs, samples_of, tiny_pair


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


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (4, 0), (0, 0)])
def test_a_grid_without_patches_has_no_marks(rows, columns):
    assert grid_marks(rows, columns, 0).shape == (0,)


# Height and width of images so thin that LLaVA-NeXT's crops have one line of patches, or none.
@pytest.mark.parametrize("size", [(1, 400), (400, 1), (4, 32), (32, 4), (8, 96), (96, 8)])
@pytest.mark.parametrize("name", ["uniform", "pool"])
def test_very_thin_images(name, size):
    _, pruned = tiny_pair("llava_next")
    inputs = build_inputs("llava_next", [[3, size, 5], [2, (32, 32), 4]])
    tokens = (inputs["input_ids"] == IMAGE).sum(1)
    for ratio in (0.1, 0.5, 0.95):
        (kept,) = pruned(**inputs, schedule=METHODS[name](ratio)).kept_mask
        assert (kept & (inputs["input_ids"] == IMAGE)).sum(1).tolist() == [
            max(1, math.floor(ratio * size + 0.5)) for size in tokens.tolist()
        ]


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
    merged, states, where = mean_of_nearest(images, chosen), embeddings(images), places(images)
    for row, size in enumerate(images.sizes):
        patches = [token for token in range(size) if not where[row, token].isnan().any()]
        keepers = [token for token in patches if chosen[row, token]]
        groups = {token: [] for token in keepers}
        for token in patches:
            # Other grids are out of reach.
            (grid, *own), others = where[row, token].tolist(), where[row, keepers].tolist()
            distances = [math.dist(own, other[1:]) if other[0] == grid else math.inf for other in others]
            nearest = min(distances, default=math.inf)
            if nearest == math.inf:
                continue
            # The first of those that are equally near.
            groups[keepers[[d < nearest + 1e-5 for d in distances].index(True)]].append(token)
        for keeper, members in groups.items():
            mean = states[row, members].mean(0)
            assert (merged[row, keeper] - mean).abs().max() < 1e-5
        others = [token for token in range(size) if token not in keepers]
        assert torch.equal(merged[row, others], states[row, others])


def views(family, part):
    """Of an image or a whole video: its grids, each `{token: (row, column)}` and its numbers of rows and columns."""
    side = SIDE // PATCH
    if family in QWEN:
        *groups, height, width = part
        shapes = [(height // PATCH, width // PATCH)] * (groups[0] if groups else 1)
        newline = False
    else:
        rows, columns = get_anyres_image_grid_shape(part, PINPOINTS, SIDE)
        shapes = [(side, side), tuple(unpad_image(torch.zeros(1, rows * side, columns * side), part).shape[1:])]
        newline = True
    found, token = [], 0
    for number, (rows, columns) in enumerate(shapes):
        grid = {}
        for row in range(rows):
            for column in range(columns):
                grid[token] = (row, column)
                token += 1
            token += newline and number > 0
        found.append((grid, rows, columns))
    return found, token


def decoder_inputs(model, **arguments):
    """What a model gives its decoder, and what it returns."""
    seen = []
    with model.model.language_model.register_forward_pre_hook(
        lambda *of: seen.append(of[2]["inputs_embeds"]), with_kwargs=True
    ):
        outputs = model(**arguments)
    return seen[0], outputs


WHOLE_VIDEO = [[2, (4, 32, 32), 6], [3, (3, 24, 40), 1, (32, 32), 4]]


@pytest.mark.parametrize("rows_at_a_time", [5, 256])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.6])
@pytest.mark.parametrize(("family", "batch"), [("llava_next", "mixed"), ("qwen2_vl", WHOLE_VIDEO)])
def test_pool_averages_each_view_by_itself(family, batch, ratio, rows_at_a_time, monkeypatch):
    """What the decoder is given, where a place of the picture has a patch in several grids. Exact arithmetic."""
    monkeypatch.setattr(baselines, "ROWS_AT_A_TIME", rows_at_a_time)
    stock, pruned = tiny_pair(family)
    pruned.config.pruner_per_frame = False
    samples = samples_of(batch, family) if isinstance(batch, str) else batch
    inputs = build_inputs(family, samples)
    own, _ = decoder_inputs(stock, **inputs)
    merged, outputs = decoder_inputs(pruned, **inputs, schedule=METHODS["pool"](ratio))
    vision = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    shared = 0
    for row, sample in enumerate(samples):
        columns = vision[row].nonzero().flatten().tolist()
        for part in sample:
            if isinstance(part, int):
                continue
            found, size = views(family, part)
            at, columns = columns[:size], columns[size:]
            kept = {token for token in range(size) if outputs.kept_mask[0][row, at[token]]}
            for grid, rows, width in found:
                keepers = sorted(kept & grid.keys())
                members = {keeper: [] for keeper in keepers}
                for token, (r, c) in grid.items():
                    distance = {
                        keeper: Fraction(r - grid[keeper][0], rows) ** 2 + Fraction(c - grid[keeper][1], width) ** 2
                        for keeper in keepers
                    }
                    if keepers:
                        members[min(keepers, key=lambda keeper: (distance[keeper], keeper))].append(token)
                for keeper, group in members.items():
                    assert keeper in group
                    mean = torch.stack([own[row, at[token]] for token in group]).mean(0)
                    assert (merged[row, at[keeper]] - mean).abs().max() < 1e-5
            middles = [(r / rows, c / width) for grid, rows, width in found for t, (r, c) in grid.items() if t in kept]
            shared += len(middles) - len(set(middles))
        assert not columns
    if ratio > 0.1:
        assert shared  # patches of one place


def test_pool_forms_no_square_of_the_tokens(monkeypatch):
    monkeypatch.setattr(baselines, "ROWS_AT_A_TIME", 2)
    monkeypatch.setattr(baselines, "embeddings", lambda images: torch.ones(1, 300, 4))
    monkeypatch.setattr(baselines, "places", lambda images: torch.ones(1, 300, 3).cumsum(1))
    with Largest() as largest:
        mean_of_nearest(None, torch.ones(1, 300, dtype=torch.bool))
    assert largest.numel <= 300 * 6


@pytest.mark.parametrize("seed", [1.5, None, [1, 2.0], [None]])
def test_seeds_are_checked_when_made(seed):
    with pytest.raises(ValueError, match="seed is a whole number, a text, or a list"):
        METHODS["random"](0.5, seed=seed)


def test_an_image_without_boxes_is_refused():
    _, pruned = tiny_pair("llava")
    inputs = build_inputs("llava", samples_of("padded", "llava"))
    with pytest.raises(ValueError, match="oracle_boxes: image 1 has no box"):
        pruned(**inputs, schedule=METHODS["oracle_boxes"](0.5, boxes=[[(1, 1, 9, 9)], []], picture=(32, 32)))


def test_a_small_box_has_a_patch_of_its_own_beside_newlines():
    """Between four patches, of two views of the picture: it holds no patch's middle."""
    nan = math.nan
    x = torch.tensor([8, 24, 8, 24, 4, 12, 20, 28, nan, 4, 12, 20, 28, nan])
    y = torch.tensor([8, 8, 24, 24, 8, 8, 8, 8, nan, 24, 24, 24, 24, nan])
    boxes = [(21, 10, 22, 11), (0, 0, 16, 16)]
    inside = baselines.box_patches(x, y, boxes)
    # By hand: (20, 8) is 1.5 and 2.5 from the middle of the first box.
    assert inside[0].nonzero().flatten().tolist() == [6]
    assert inside[1].nonzero().flatten().tolist() == [0, 4, 5]
    scores = box_scores(x, y, boxes)
    assert torch.equal(scores.isnan(), x.isnan())
    # One of each object, and the patches of boxes before all others.
    order = scores.nan_to_num(-torch.inf).argsort(descending=True, stable=True).tolist()
    assert set(order[:2]) == {0, 6}
    assert set(order[:4]) == {0, 4, 5, 6}
    assert set(order[-2:]) == {8, 13}


@pytest.mark.parametrize("ratio", [0.2, 0.45, 0.8, 0.97])
def test_uniform_gives_each_view_its_share_and_newlines_what_is_left(ratio):
    family = "llava_next"
    _, pruned = tiny_pair(family)
    samples = samples_of("mixed", family)
    inputs = build_inputs(family, samples)
    kept_mask = pruned(**inputs, schedule=METHODS["uniform"](ratio)).kept_mask[0]
    for row, sample in enumerate(samples):
        columns = (inputs["input_ids"][row] == IMAGE).nonzero().flatten().tolist()
        for part in sample:
            if isinstance(part, int):
                continue
            found, size = views(family, part)
            at, columns = columns[:size], columns[size:]
            kept = {token for token in range(size) if kept_mask[row, at[token]]}
            count, patches = max(1, round(ratio * size)), sum(len(grid) for grid, _, _ in found)
            assert len(kept) == count
            of_grids = [len(kept & grid.keys()) for grid, _, _ in found]
            assert sum(of_grids) == min(count, patches)
            for own, (grid, _, _) in zip(of_grids, found):
                # Within one of its exact share, as far as it has patches.
                assert abs(own - min(Fraction(count * len(grid), patches), len(grid))) < 1
        assert not columns
