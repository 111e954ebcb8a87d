"""VisPruner's choice against one image at a time, in plain loops."""

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


def reference(paid, features, count, share, must=None):
    """Tokens kept of one image. Lists over tokens, `None` for newlines."""
    patches = [token for token, value in enumerate(paid) if value is not None]
    structure = [token for token, value in enumerate(paid) if value is None]
    ranked = sorted(patches, key=lambda token: -paid[token]) + structure
    if must is not None:
        ranked = [must] + [token for token in ranked if token != must]
    half = int(share * count)
    half = max(1, half + 1 if share * count - half >= 0.5 else half)
    important = ranked[:half]
    left = [token for token in patches if token not in important]
    while len(left) > count - half:
        even, odd = left[0::2], left[1::2]
        redundant = {
            token: max([cosine_similarity(features[token], features[other], dim=0).item() for other in odd], default=0)
            for token in even
        }
        gone = sorted(even, key=lambda token: -redundant[token])[: min(8, len(left) - (count - half))]
        left = [token for token in left if token not in gone]
    kept = important + left
    return sorted(kept + [token for token in structure if token not in kept][: count - len(kept)])


@pytest.mark.parametrize(
    ("family", "ratio", "batch", "share"),
    covering(
        [(family, ratio) for family in ("llava", "llava_next") for ratio in (1 / 16, 0.3, 0.94)],
        ("mixed", "image_last"),
        (0.5, 0.0, 0.8),
    ),
)
def test_the_choice_is_the_formulas(family, batch, ratio, share):
    stock, pruned = tiny_pair(family)
    samples = samples_of(batch, family)
    inputs = build_inputs(family, samples)
    outputs = pruned(**inputs, schedule=METHODS["vispruner"](ratio, important=share))
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
            kept = reference(paid, features, max(1, round(ratio * len(tokens))), share, must)
            places = [columns.pop(0) for _ in tokens]
            assert [place for place in places if outputs.kept_mask[0][row, place]] == [places[token] for token in kept]
            image += 1
        assert not columns


def test_the_share_is_checked():
    with pytest.raises(ValueError, match="important is a share"):
        METHODS["vispruner"](important=1.5)


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
