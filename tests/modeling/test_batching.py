"""Invariant 3: a batch equals its rows run one by one."""

import pytest
import torch

from tiny_models import (
    TEXT_INPUTS,
    build_inputs,
    cat_pixels,
    covering,
    pixels_of,
    positions,
    row_alone,
    samples_of,
    tiny_pair,
    with_videos,
)

pytestmark = pytest.mark.core
ATTENTION = ("sdpa", "eager")


@pytest.mark.parametrize(
    ("family", "batch", "side", "attention"),
    covering([(*case, side) for case in with_videos(("padded", "mixed")) for side in ("left", "right")], ATTENTION),
)
def test_forward(family, batch, side, attention):
    _, pruned = tiny_pair(family, attention=attention)
    samples = samples_of(batch, family)
    inputs = build_inputs(family, samples, side=side)
    together = pruned(**inputs, position_ids=positions(family, pruned, inputs))
    for row in range(len(samples)):
        single, valid = row_alone(family, inputs, samples, row)
        alone = pruned(**single)
        if alone.kept_mask is not None:
            for cut in range(2):
                assert torch.equal(together.kept_mask[cut][row, valid], alone.kept_mask[cut][0])
        kept = together.kept_mask[-1][row]
        last_kept = kept[valid]
        assert (together.logits[row][kept] - alone.logits[0][last_kept]).abs().max() < 1e-4


@pytest.mark.parametrize(("family", "batch", "attention"), covering(with_videos(("padded", "mixed")), ATTENTION))
def test_generate(family, batch, attention):
    _, pruned = tiny_pair(family, attention=attention)
    samples = samples_of(batch, family)
    inputs = build_inputs(family, samples)
    arguments = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    together = pruned.generate(**inputs, **arguments)
    for row in range(len(samples)):
        single, _ = row_alone(family, inputs, samples, row)
        alone = pruned.generate(**single, **arguments)
        assert torch.equal(together.sequences[row, -10:], alone.sequences[0, -10:])
        for step, expected in zip(together.logits, alone.logits):
            assert (step[row] - expected[0]).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_batch_order_does_not_matter(family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("mixed", family))
    reversed_inputs = {name: inputs[name].flip(0) for name in TEXT_INPUTS if name in inputs}
    images = [pixels_of(family, inputs, some) for some in (slice(1, 3), slice(0, 1))]
    reversed_inputs |= cat_pixels(family, images)
    outputs, other = pruned(**inputs), pruned(**reversed_inputs)
    assert torch.equal(outputs.kept_mask[1], other.kept_mask[1].flip(0))
    assert (outputs.logits - other.logits.flip(0)).abs().max() < 1e-4
