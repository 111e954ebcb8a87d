"""`torch.compile(model)`: equal to the model itself, and no more new graphs than the stock model where calls repeat."""

import pytest
import torch

from learnpruner.compat_learnpruner import CACHE

from tiny_models import build_inputs, samples_of, tiny_pair

TWO = pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
SIZE = (32, 32)


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Graphs:
    """A backend that counts the graphs it is given, and runs them as they are."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward

    def new(self):
        found, self.count = self.count, 0
        return found


def assert_equal(model, compiled, inputs, bound):
    expected, found = model(**inputs), compiled(**inputs)
    assert (found.logits - expected.logits).abs().max() <= bound
    assert all(torch.equal(*pair) for pair in zip(found.kept_mask, expected.kept_mask, strict=True))
    assert type(found) is type(expected)
    assert found[CACHE].get_seq_length() == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_vl", marks=pytest.mark.slow)])
def test_equals_eager(family):
    _, model = tiny_pair(family)
    compiled = torch.compile(model, backend="eager")
    assert_equal(model, compiled, build_inputs(family, samples_of("padded", family)), 0)


@pytest.mark.slow
@TWO
def test_equals_eager_by_inductor(family):
    _, model = tiny_pair(family)
    compiled = torch.compile(model)
    for batch in ("padded", "two_images"):
        assert_equal(model, compiled, build_inputs(family, samples_of(batch, family)), 1e-4)


def graphs_of(model, family, counts, steps):
    """New graphs of the prompt and of each step of the answer, for prompts with so many images each."""
    torch.compiler.reset()  # what is compiled is counted by code, which models share
    backend = Graphs()
    model.forward = torch.compile(model.forward, backend=backend)
    found = []
    for images in counts:
        parts = [part for _ in range(images) for part in (2, SIZE)]
        inputs = build_inputs(family, [[*parts, 3]])
        new = []

        def note(*args, new=new):
            new.append(backend.new())
            return False

        model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, stopping_criteria=[note])
        found.append(new)
    return found


def assert_no_more_graphs(family, counts, steps):
    stock, pruned = (graphs_of(model, family, counts, steps) for model in tiny_pair(family))
    assert pruned[0][0] >= stock[0][0] > 0, "the prompt was compiled"
    for place, (theirs, ours) in enumerate(zip(stock, pruned)):
        assert len(ours) == len(theirs) == steps
        # Step by step: no new graph of a step where stock has none, but for one at the second image count.
        more = sum(max(0, own - other) for own, other in zip(ours[1:], theirs[1:]))
        assert more <= (1 if place == 1 else 0), (place, theirs, ours)
        if place >= 2:
            assert ours[0] == 0, (place, theirs, ours)


def test_graphs_of_a_few_image_counts():
    assert_no_more_graphs("llava", (1, 2, 3), 4)


@pytest.mark.slow
@TWO
def test_graphs_of_four_image_counts_and_eight_steps(family):
    assert_no_more_graphs(family, (1, 2, 3, 4), 9)
