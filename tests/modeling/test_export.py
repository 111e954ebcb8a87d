"""`torch.export`: at a ratio of 1 wherever the stock class exports; of a call that cuts it is refused by name."""

import pytest
import torch

from tiny_models import FAMILIES, build_inputs, labelled, samples_of, tiny_pair, vision_tower

HOW = pytest.mark.parametrize("strict", [False, True])


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def export(model, inputs, strict, **arguments):
    given = {**inputs, "use_cache": False, **arguments}
    model(**given)  # the first call of a stock model installs hooks, which a strict export cannot trace
    return torch.export.export(model, (), given, strict=strict).module()(**given).logits


@pytest.mark.parametrize(
    ("by", "strict"),
    [
        ("configuration", False),
        ("argument", False),
        *(pytest.param(by, True, marks=pytest.mark.slow) for by in ("argument", "configuration")),
    ],
)
def test_unpruned(by, strict):
    stock, pruned = tiny_pair("llava", pruner_ratio=0.4 if by == "argument" else 1.0)
    inputs = build_inputs("llava", samples_of("one", "llava"))
    found = export(pruned, inputs, strict, **({"pruner_ratio": 1.0} if by == "argument" else {}))
    assert torch.equal(found, export(stock, inputs, strict))
    assert torch.equal(found, stock(**inputs).logits)


@HOW
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES[1:])
def test_where_the_stock_class_exports(family, strict):
    """With images it does in LLaVA alone: elsewhere sizes are read from a tensor. Text does in all."""
    stock, pruned = tiny_pair(family, pruner_ratio=1.0)
    images = build_inputs(family, samples_of("one", family))
    with pytest.raises(Exception, match="data-dependent") as error:
        export(stock, images, strict)
    with pytest.raises(error.type, match="data-dependent"):
        export(pruned, images, strict)


@pytest.mark.parametrize(
    ("family", "strict"),
    [(family, False) for family in FAMILIES]
    + [("llava", True), *(pytest.param(family, True, marks=pytest.mark.slow) for family in FAMILIES[1:])],
)
def test_text_alone(family, strict):
    stock, pruned = tiny_pair(family)
    inputs = build_inputs(family, [[6]])
    assert torch.equal(export(pruned, inputs, strict), export(stock, inputs, strict))


@HOW
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [False, True])
def test_a_call_that_cuts(family, strict, training):
    _, pruned = tiny_pair(family)
    pruned.train(training)
    inputs = labelled(family, samples_of("one", family))
    seen = []
    vision_tower(pruned).register_forward_pre_hook(lambda *args: seen.append(args))
    for model in (pruned, pruned.model):
        given = inputs if model is pruned else {name: inputs[name] for name in inputs if name != "labels"}
        with pytest.raises(ValueError, match=r"torch\.export.*torch\.compile.*pruner_ratio=1\.0") as error:
            torch.export.export(model, (), {**given, "use_cache": False}, strict=strict)
        assert error.type is ValueError
    assert not seen, "refused before any work"
    assert pruned(**inputs).kept_mask is None if training else pruned(**inputs).kept_mask
