# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Weights on the CPU or on disk until their module runs, as accelerate offloads them: the model answers as without."""

from itertools import product

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file

from learnpruner import LearnPrunerForConditionalGeneration

from tiny_models import FAMILIES, NO_PLACEHOLDERS, QWEN, build_inputs, covering, samples_of, tiny_pair

MAPS = {"tower": {"tower": "disk"}, "text": {"text": "disk"}, "both": {"tower": "disk", "text": "disk"}}


def offload(model, where, folder):
    """All of it. The model runs on the CPU, too, so that no other device is needed."""
    if where == "cpu":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    return disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def device_map(family, **places):
    """Everything on the CPU but for `places`: the tower (with the projector) or the text model."""
    tower = ["visual"] if family in QWEN else ["vision_tower", "multi_modal_projector"]
    here = ["pruner", *(["image_newline"] if family == "llava_next" else [])]
    parts = {**dict.fromkeys(tower, "tower"), "language_model": "text", **dict.fromkeys(here)}
    return {f"model.{part}": places.get(kind, "cpu") for part, kind in parts.items()} | {"lm_head": "cpu"}


def scored(model, family):
    outputs = model(**build_inputs(family, samples_of("mixed", family)))
    assert len(outputs.kept_mask) == 2
    return (outputs.logits, *outputs.kept_mask)


def generated(model, family):
    inputs = build_inputs(family, samples_of("mixed", family))
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, **NO_PLACEHOLDERS)


def answers(model, family):
    return (*scored(model, family), generated(model, family))


def assert_equal(found, expected):
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize(("family", "where", "trained"), covering([*product(FAMILIES, ["cpu", "disk"])], [False, True]))
def test_the_whole_model(family, where, trained, tmp_path):
    stock, pruned = tiny_pair(family, pruner_trained=trained)
    expected = answers(pruned, family)
    offload(pruned, where, tmp_path / "offload")
    offload(stock, where, tmp_path / "stock")
    assert all(parameter.is_meta for parameter in pruned.parameters())
    assert_equal(scored(pruned, family), expected[:-1])
    if family != "llava_next":
        assert torch.equal(generated(pruned, family), expected[-1])
    # What the stock model cannot do either. Its `generate` reads a LLaVA-NeXT's newline before the model runs, and
    # `save_pretrained` does not know what accelerate offloaded by itself.
    for model in (stock, pruned):
        if family == "llava_next":
            with pytest.raises(NotImplementedError, match="meta tensor"):
                generated(model, family)
        with pytest.raises(NotImplementedError, match="meta tensor"):
            model.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(("family", "places", "trained"), covering([*product(FAMILIES, MAPS)], [False, True]))
def test_a_device_map(family, places, trained, tmp_path):
    _, pruned = tiny_pair(family, pruner_trained=trained)
    pruned.save_pretrained(tmp_path / "whole")
    options = {"device_map": device_map(family, **MAPS[places]), "offload_folder": tmp_path / "offload"}
    model = LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "whole", **options).eval()
    assert any(parameter.is_meta for parameter in model.parameters())
    expected = answers(pruned, family)
    assert_equal(answers(model, family), expected)
    model.save_pretrained(tmp_path / "again")
    again = LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
    assert again.config.pruner_trained == trained
    assert_equal(answers(again, family), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruner_is_trained_on_an_offloaded_base(family, tmp_path):
    tiny_pair(family)[0].save_pretrained(tmp_path / "stock")
    options = {"device_map": device_map(family, tower="disk", text="disk"), "offload_folder": tmp_path / "offload"}
    model = LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "stock", pruner_ratio=0.4, **options)
    model.train_pruner_only()
    inputs = build_inputs(family, samples_of("mixed", family))
    with torch.enable_grad():
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.pruner.hidden.weight.grad.any()
    torch.optim.SGD(model.model.pruner.parameters(), lr=1.0).step()
    model.save_pretrained(tmp_path / "pruner")
    assert all(name.startswith("model.pruner.") for name in load_file(tmp_path / "pruner" / "model.safetensors"))
    again = LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "pruner").eval()
    assert again.config.pruner_trained
    assert_equal(answers(again, family), answers(model.eval(), family))


@pytest.mark.parametrize(("family", "where"), covering([(family,) for family in FAMILIES], ["cpu", "disk"]))
def test_a_pruner_that_is_offloaded_cannot_be_trained(family, where, tmp_path):
    """Its gradient would go to a copy that is thrown away."""
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("mixed", family))
    offload(pruned.train(), where, tmp_path)
    with pytest.raises(ValueError, match="offloaded"):
        pruned(**inputs)
    pruned.model.pruner.requires_grad_(False)
    assert pruned(**inputs).kept_mask
