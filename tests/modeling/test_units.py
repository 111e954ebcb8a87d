"""A cut before the decoder whose budget and choice are a sample's: all its images and videos together."""

import math

import pytest
import torch

from learnpruner import Cut
from learnpruner.scores_learnpruner import top_k

from host_waits import Waits
from oracles import masked
from tiny_models import (
    IMAGE,
    LAYERS,
    NO_PLACEHOLDERS,
    VIDEO,
    build_inputs,
    image_tokens,
    row_alone,
    samples_of,
    tiny_pair,
    with_videos,
)

pytestmark = pytest.mark.core
CASES = with_videos(["mixed", "image_first", "image_last"])


class Norms:
    """Keeps the longest features of each row; rounded to halves, so that there are ties."""

    def __call__(self, images):
        self.images = images
        return (2 * images.features.float().norm(dim=-1)).round().div(2)

    def select(self, scores, images, counts):
        return top_k(scores, images.present, torch.tensor(counts))


def share(tokens):
    return max(1, round(0.3 * tokens))


def cut_of(unit="sample"):
    return Cut(0, share, Norms(), unit=unit)


def parts_of(family, sample):
    """Tokens of the parts that a sample has: images, and groups of a video's frames."""
    for part in sample:
        if isinstance(part, tuple):
            groups = part[0] if len(part) == 3 else 1
            yield from [image_tokens(family, *part) // groups] * groups


@pytest.mark.parametrize(("family", "batch"), CASES)
def test_the_choice_is_the_samples(family, batch):
    """Its scores in the order of the prompt, the first of equals first, whatever kinds of part stand there."""
    stock, pruned = tiny_pair(family)
    samples = samples_of(batch, family)
    inputs, cut = build_inputs(family, samples), cut_of()
    outputs = pruned(**inputs, schedule=(cut,))
    vision = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    seen, found = cut.score.images, 0
    for row, sample in enumerate(samples):
        columns, sizes = vision[row].nonzero().flatten().tolist(), list(parts_of(family, sample))
        assert len(columns) == sum(sizes)
        if not columns:
            continue
        assert (seen.owners[found], seen.sizes[found]) == (row, len(columns))
        scores = outputs.vision_scores[0][row, columns].tolist()
        lengths = (2 * seen.features[found, : len(columns)].norm(dim=-1)).round().div(2).tolist()
        assert str(scores) == str(lengths)
        must = len(columns) - 1 if batch == "image_last" else None
        # Structure (NaN) comes last.
        order = sorted(
            range(len(columns)), key=lambda i: (i != must, math.isnan(scores[i]), -scores[i] if scores[i] > 0 else 0, i)
        )
        kept = [columns[place] for place in sorted(order[: sum(map(share, sizes))])]
        assert [column for column in columns if outputs.kept_mask[0][row, column]] == kept
        found += 1
    assert found == len(seen.owners)
    with masked(stock, outputs.kept_mask, [0], inputs["attention_mask"], LAYERS):
        expected = stock(**inputs).logits
    rows = outputs.kept_mask[0] & inputs["attention_mask"].bool()
    assert (outputs.logits - expected)[rows].abs().max() < 1e-4


@pytest.mark.parametrize(("family", "batch"), CASES)
def test_features_are_those_of_the_parts(family, batch):
    """Laid out in the prompt, they are the same."""
    _, pruned = tiny_pair(family)
    inputs, cuts = build_inputs(family, samples_of(batch, family)), (cut_of("part"), cut_of("sample"))
    for cut in cuts:
        pruned(**inputs, schedule=(cut,))
    parts, samples = (cut.score.images for cut in cuts)
    empty = torch.zeros(inputs["input_ids"].shape)
    for place in range(parts.features.shape[-1]):
        one, other = (seen.to_prompt(seen.features[..., place], empty) for seen in (parts, samples))
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    assert samples.present.sum(1).tolist() == samples.sizes
    assert sum(samples.sizes) == sum(parts.sizes)


@pytest.mark.parametrize(("family", "batch"), with_videos(["mixed"]))
def test_a_batch_equals_its_rows_and_generate_the_forward(family, batch):
    _, pruned = tiny_pair(family)
    samples = samples_of(batch, family)
    inputs, arguments = build_inputs(family, samples), {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    together = pruned(**inputs, schedule=(cut_of(),))
    tokens = pruned.generate(**inputs, **arguments, **NO_PLACEHOLDERS, schedule=(cut_of(),))
    for row in range(len(samples)):
        single, valid = row_alone(family, inputs, samples, row)
        alone = pruned(**single, schedule=(cut_of(),))
        if alone.kept_mask is not None:
            assert torch.equal(together.kept_mask[0][row, valid], alone.kept_mask[0][0])
        kept = together.kept_mask[0][row]
        assert (together.logits[row][kept] - alone.logits[0][kept[valid]]).abs().max() < 1e-4
        answer = pruned.generate(**single, **arguments, **NO_PLACEHOLDERS, schedule=(cut_of(),))
        assert torch.equal(tokens[row, -4:], answer[0, -4:])


@pytest.mark.parametrize(("family", "batch"), with_videos(["mixed"]))
def test_the_host_waits_no_more(family, batch):
    _, pruned = tiny_pair(family)
    inputs, counts = build_inputs(family, samples_of(batch, family)), []
    for unit in ("part", "sample"):
        log = []
        with Waits(log):
            pruned(**inputs, schedule=(cut_of(unit),))
        counts.append(sorted(log))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layer": 0, "unit": "clip"}, "per part or sample"),
        ({"layer": 0, "unit": "sample", "merge": lambda images, chosen: None}, "per part, "),
        ({"layer": 1, "unit": "part"}, "per sample, "),
        ({"layer": 0, "counts_from_content": True}, "counts_from_content=True"),
    ],
)
def test_what_is_not_supported_is_said(settings, says):
    with pytest.raises(ValueError, match=says):
        Cut(keep=share, score=Norms(), **settings)
