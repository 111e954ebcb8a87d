"""VisPruner's choice against one image at a time, in plain loops that follow the authors' code."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from learnpruner.methods import METHODS

from largest import Largest
from tiny_models import build_inputs, covering, samples_of, tiny_pair, tokens_of


def tower(stock, pixels):
    """Of each crop: what [CLS] pays each patch, and the patches' features, in the layer before last."""
    vision = stock.model.vision_tower
    before = vision.config._attn_implementation
    vision.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = vision(pixels, output_attentions=True, output_hidden_states=True)
    vision.set_attn_implementation(before)
    return outputs.attentions[-2][:, :, 0, 1:].mean(1), outputs.hidden_states[-2][:, 1:]


def as_the_authors(paid, features, count, share):
    """What the authors' code keeps of one image of patches, told step by step; `None` where it cannot go on: it splits
    even numbers alone."""
    ranked = sorted(range(len(paid)), key=lambda token: -paid[token])
    important = ranked[: math.floor(share * count)]
    waiting = ranked[len(important) :]  # the best paid first
    wanted = count - len(important)
    while (leave := min(8, len(waiting) - wanted)) > 0:
        if len(waiting) % 2 or leave > len(waiting) // 2:
            return None
        first_of_pairs, second_of_pairs = waiting[::2], waiting[1::2]
        likeness = {}
        for one in first_of_pairs:
            likeness[one] = cosine_similarity(features[one], features[second_of_pairs], dim=-1).max().item()
        first_of_pairs.sort(key=lambda one: -likeness[one])
        waiting = first_of_pairs[leave:] + second_of_pairs
    return sorted(important + waiting)


def reference(paid, features, count, share, variant, must=None):
    """The same for lists with newlines (`None`), which come last, odd numbers, and a token that must stay."""
    patches = [token for token, value in enumerate(paid) if value is not None]
    structure = [token for token, value in enumerate(paid) if value is None]
    ranked = sorted(patches, key=lambda token: -paid[token]) + structure
    if must is not None:
        ranked = [must] + [token for token in ranked if token != must]
    first = max(math.floor(share * count), 0 if must is None else 1)
    kept = ranked[:first]
    left = [token for token in ranked[first:] if token in patches]
    if variant == "paper":
        left.sort()
    while len(left) > count - first > 0:
        even, odd = left[0::2], left[1::2]
        others = torch.stack([features[token] for token in odd])
        redundant = {token: cosine_similarity(features[token], others, dim=-1).max().item() for token in even}
        even.sort(key=lambda token: -redundant[token])
        left = even[min(8, len(left) - (count - first)) :] + odd
        if variant == "paper":
            left.sort()
    kept = kept + left[: count - first]
    return sorted(kept + [token for token in structure if token not in kept][: count - len(kept)])


def clustered(patches, seed):
    """What is paid, and features near one of a few centres: many are nearly the same."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, 8, generator=generator)
    where = torch.randint(6, (patches,), generator=generator)
    features = centres[where] + 0.2 * torch.randn(patches, 8, generator=generator)
    return torch.rand(patches, generator=generator), features


def chosen_of(paid, features, count, **settings):
    """What the method keeps of one image, without a model."""
    images = SimpleNamespace(features=features[None], present=torch.ones(1, len(paid), dtype=torch.bool))
    (place,) = METHODS["vispruner"](0.1, **settings).places(None)
    return place.score.select(paid[None], images, [count])[0].nonzero().flatten().tolist()


@pytest.mark.parametrize(("patches", "count", "share"), [(64, 16, 0.5), (64, 24, 0.25), (128, 32, 0.5), (32, 16, 0.0)])
def test_patches_are_chosen_as_by_the_authors(patches, count, share):
    for seed in range(5):
        paid, features = clustered(patches, seed)
        expected = as_the_authors(paid.tolist(), features, count, share)
        assert len(expected) == count
        assert chosen_of(paid, features, count, important=share) == expected
        assert reference(paid.tolist(), features, count, share, "code") == expected


def test_the_order_of_the_lists_matters():
    """In the order of the image, most of the diverse half is another."""
    shared = []
    for seed in range(5):
        paid, features = clustered(576, seed)
        important = set(paid.argsort(descending=True)[:32].tolist())
        code, paper = (set(chosen_of(paid, features, 64, variant=variant)) for variant in ("code", "paper"))
        assert important <= code & paper
        shared.append(len(code & paper - important) / 32)
    assert max(shared) < 0.5


@pytest.mark.parametrize(("count", "share", "first"), [(5, 0.5, 2), (1, 0.5, 0), (7, 0.3, 2)])
def test_the_important_share_is_rounded_down(count, share, first):
    paid, features = clustered(64, 0)
    best = set(paid.argsort(descending=True)[:first].tolist())
    kept = chosen_of(paid, features, count, important=share)
    assert len(kept) == count
    assert best <= set(kept)
    # The next in rank is one of the first list's even places, whose redundancy decides.
    assert kept == reference(paid.tolist(), features, count, share, "code")


@pytest.mark.parametrize(
    ("family", "ratio", "batch", "share", "variant"),
    covering(
        [(family, ratio) for family in ("llava", "llava_next") for ratio in (1 / 16, 0.3, 0.94)],
        ("mixed", "image_last"),
        (0.5, 0.0, 0.8),
        ("code", "paper"),
    ),
)
def test_the_choice_is_the_formulas(family, batch, ratio, share, variant):
    stock, pruned = tiny_pair(family)
    samples = samples_of(batch, family)
    inputs = build_inputs(family, samples)
    outputs = pruned(**inputs, schedule=METHODS["vispruner"](ratio, important=share, variant=variant))
    image = 0
    for row, sample in enumerate(samples):
        columns = (inputs["input_ids"][row] == pruned.config.image_token_id).nonzero().flatten().tolist()
        sizes = [part for part in sample if isinstance(part, tuple)]
        for number, size in enumerate(sizes):
            pixels = inputs["pixel_values"][image]
            paid, features = tower(stock, pixels[None] if family == "llava" else pixels)
            tokens = tokens_of(family, size)
            paid, features = (
                [None if token is None else values[token] for token in tokens] for values in (paid, features)
            )
            must = len(tokens) - 1 if batch == "image_last" and number == len(sizes) - 1 else None
            kept = reference(paid, features, max(1, round(ratio * len(tokens))), share, variant, must)
            places = [columns.pop(0) for _ in tokens]
            assert [place for place in places if outputs.kept_mask[0][row, place]] == [places[token] for token in kept]
            image += 1
        assert not columns


def test_the_share_is_checked():
    with pytest.raises(ValueError, match="important is a share"):
        METHODS["vispruner"](important=1.5)
    with pytest.raises(ValueError, match="variant is 'paper' or 'code'"):
        METHODS["vispruner"](variant="raster")


@pytest.mark.parametrize("patches", [96, 64])
def test_memory_is_that_of_one_image(patches):
    """A square of its tokens, whatever the number of images."""
    features, scores = torch.randn(5, 96, 4), torch.rand(5, 96)
    present = torch.arange(96) < torch.tensor([96] + [patches] * 4).unsqueeze(1)
    images = SimpleNamespace(features=features, present=present, sizes=present.sum(1).tolist())
    (cut,) = METHODS["vispruner"](0.1).places(None)
    with Largest() as largest:
        chosen = cut.score.select(scores, images, [9] * 5)
    assert chosen.sum(1).tolist() == [9] * 5
    assert largest.numel <= 96 * 96
