"""Methods in half precision and under autocast: scores, choices and means are those of float32."""

from contextlib import nullcontext

import pytest
import torch

from learnpruner import Cut
from learnpruner.methods import METHODS

from tiny_models import IMAGE, LLAVA, build_inputs, covering, samples_of, tiny_pair

BOXES = ((4, 4, 20, 12), (18, 16, 30, 30))
# Their scores are of few values.
COARSE = {"uniform", "pool", "downsample"}
AUTOCAST = torch.autocast("cpu", torch.bfloat16)


def build(name):
    return METHODS[name](0.7, **({"boxes": (BOXES,) * 3, "picture": (32, 32)} if name == "oracle_boxes" else {}))


# A smaller image is one crop.
EVERY = [(name, family) for name in METHODS for family in LLAVA if (name, family) != ("downsample", "llava_next")]


HALF = {
    "autocast": (torch.float32, AUTOCAST),
    "half": (torch.bfloat16, nullcontext()),
    "both": (torch.bfloat16, AUTOCAST),
}


@pytest.mark.parametrize(("name", "family", "how"), covering(EVERY, tuple(HALF)))
def test_scores_are_float32_and_counts_exact(how, name, family):
    dtype, context = HALF[how]
    _, pruned = tiny_pair(family, dtype=dtype)
    samples = samples_of("mixed", family)
    inputs, method = build_inputs(family, samples, dtype=dtype), build(name)
    with torch.no_grad():
        expected = pruned(**inputs, schedule=method)
        with context:
            outputs = pruned(**inputs, schedule=method)
            tokens = pruned.generate(**inputs, schedule=method, max_new_tokens=2)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 2
    vision = before = inputs["input_ids"] == IMAGE
    for mask, own, scores in zip(outputs.kept_mask, expected.kept_mask, outputs.vision_scores, strict=True):
        assert scores.dtype == torch.float32
        values = scores[before & ~scores.isnan()]
        # Rounded scores would tie.
        assert name in COARSE or not torch.equal(values, values.bfloat16().float())
        assert torch.equal((mask & vision).sum(1), (own & vision).sum(1))
        before = before & mask
    assert outputs.logits[outputs.kept_mask[-1] & inputs["attention_mask"].bool()].isfinite().all()


class Spy:
    """A first cut's score that keeps what it saw, and what came of it."""

    def __init__(self, score):
        self.score, self.watch = score, getattr(score, "watch", None)

    def __call__(self, images):
        self.images, self.scores = images, self.score(images)
        return self.scores

    def select(self, scores, images, counts):
        self.counts, self.chosen = counts, self.score.select(scores, images, counts)
        return self.chosen


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("name", ["pool", "visionzip", "vispruner", "divprune", "stage_1"])
def test_the_choice_and_the_means_are_those_of_float32(name, family):
    """Given the same encoded images."""
    _, pruned = tiny_pair(family)
    # What autocast may round is left out.
    pruned.model.multi_modal_projector.forward = lambda features: torch.nn.functional.pad(features, (0, 8))
    samples = samples_of("mixed", family)
    (cut,) = METHODS[name](0.4).cuts(pruned.model)
    spy = Spy(cut.score)
    with torch.no_grad():
        pruned(**build_inputs(family, samples), schedule=(Cut(0, cut.keep, spy, cut.merge, cut.watched),))
        merged = None if cut.merge is None else cut.merge(spy.images, spy.chosen)
        with AUTOCAST:
            if name in ("divprune", "stage_1"):
                assert torch.equal(cut.score(spy.images).nan_to_num(), spy.scores.nan_to_num())
            assert torch.equal(cut.score.select(spy.scores, spy.images, spy.counts), spy.chosen)
            if cut.merge is not None:
                assert torch.equal(cut.merge(spy.images, spy.chosen).nan_to_num(), merged.nan_to_num())


@pytest.mark.parametrize(("dtype", "context"), [(torch.float32, AUTOCAST), (torch.bfloat16, nullcontext())])
@pytest.mark.parametrize("name", ["cls_attention", "visionzip", "vispruner"])
def test_products_of_cls_are_not_rounded(name, dtype, context):
    """From the projections as they are, crop by crop and head by head."""
    _, pruned = tiny_pair("llava", dtype=dtype)
    inputs = build_inputs("llava", samples_of("padded", "llava"), dtype=dtype)
    attention = pruned.model.vision_tower.encoder.layers[-2].self_attn
    seen = {}
    for kind in ("q_proj", "k_proj"):
        # The tower runs it first, and the method last.
        getattr(attention, kind).register_forward_hook(lambda *of, kind=kind: seen.update({kind: of[2].double()}))
    with torch.no_grad(), context:
        scores = pruned(**inputs, schedule=METHODS[name](0.5)).vision_scores[0]
    width = attention.head_dim
    for crop, found in enumerate(scores[inputs["input_ids"] == IMAGE].view(2, -1)):
        expected = torch.zeros(17, dtype=torch.double)
        for head in range(attention.num_heads):
            part = slice(head * width, (head + 1) * width)
            query, keys = seen["q_proj"][crop, 0, part], seen["k_proj"][crop, :, part]
            expected += (keys @ query / width**0.5).softmax(0) / attention.num_heads
        assert (found - expected[1:]).abs().max() < 1e-6
