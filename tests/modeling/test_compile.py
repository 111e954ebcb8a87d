"""`torch.compile(model)`: equal to the model itself, and no more new graphs than the stock model where calls repeat."""

import pytest
import torch
from transformers import CompileConfig

from learnpruner.compat_learnpruner import CACHE

from tiny_models import NO_PLACEHOLDERS, build_inputs, labelled, samples_of, tiny_pair

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


def train(family, how=None, **options):
    """A step of training: loss, gradients, and whether the pruner counts as trained."""
    _, model = tiny_pair(family, pruner_trained=False)
    run = model.train()
    if how == "function":
        run = torch.compile(model, **options)
    elif how == "method":
        model.compile(**options)
    with torch.enable_grad():
        loss = run(**labelled(family, samples_of("padded", family))).loss
        loss.backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return loss.detach(), gradients, model.config.pruner_trained


SLOW = pytest.mark.slow
EAGER, INDUCTOR = ({"backend": "eager"}, 0.0), ({}, 1e-4)


@pytest.mark.parametrize(
    ("family", "how", "backend"),
    [
        ("llava", "function", EAGER),
        pytest.param("llava", "method", EAGER, marks=SLOW),
        pytest.param("qwen2_vl", "function", EAGER, marks=SLOW),
        pytest.param("qwen2_vl", "method", EAGER, marks=SLOW),
        pytest.param("llava", "function", INDUCTOR, marks=SLOW),
        pytest.param("qwen2_vl", "function", INDUCTOR, marks=SLOW),
    ],
)
def test_training(family, how, backend):
    options, bound = backend
    loss, gradients, trained = train(family, how, **options)
    expected_loss, expected, _ = train(family)
    assert trained
    assert (loss - expected_loss).abs() <= bound
    more = gradients.keys() - expected.keys()
    if backend is INDUCTOR:  # gives zeros to what its unused outputs came from
        more = [name for name in more if gradients[name].any()]
    assert not more
    assert expected.keys() <= gradients.keys()
    assert any("pruner" in name for name in gradients)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() <= bound * max(1, gradient.abs().max()), name


@SLOW
@TWO
def test_generate_of_a_compiled_model(family):
    _, model = tiny_pair(family)
    inputs = build_inputs(family, samples_of("padded", family))
    new = {"max_new_tokens": 4, "do_sample": False, **NO_PLACEHOLDERS}
    expected = model.generate(**inputs, **new)
    model.compile(backend="eager")
    assert torch.equal(model.generate(**inputs, **new), expected)


@TWO
def test_generate_with_a_configuration_for_compiling(family):
    """`generate` compiles on caches of fixed lengths alone, and says that it does not on others."""
    _, model = tiny_pair(family)
    inputs = build_inputs(family, samples_of("padded", family))
    new = {"max_new_tokens": 4, "do_sample": False, **NO_PLACEHOLDERS}
    config = CompileConfig(backend="eager")
    config._compile_all_devices = True
    expected = model.generate(**inputs, **new)
    assert torch.equal(model.generate(**inputs, **new, compile_config=config), expected)
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        model.generate(**inputs, **new, compile_config=config, cache_implementation="static")


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


@pytest.mark.slow
@TWO
def test_graphs_of_four_image_counts_and_eight_steps(family):
    assert_no_more_graphs(family, (1, 2, 3, 4), 9)
