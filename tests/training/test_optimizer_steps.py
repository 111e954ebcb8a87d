# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What steps of an optimizer, and of a loop around it, do with a pruner: its weights, its mark, its freezing."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tiny_models import FAMILIES, build_inputs, labelled, samples_of, tiny_pair

pytestmark = pytest.mark.core
TWO = pytest.mark.parametrize("family", ["llava", "qwen2_vl"])


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("case", ["ratio 1", "text alone"])
@pytest.mark.parametrize("family", FAMILIES)
def test_where_nothing_is_gated_weight_decay_alone_acts(family, case, decay):
    _, model = tiny_pair(family, pruner_ratio=1.0 if case == "ratio 1" else 0.4, pruner_trained=False)
    model.train_pruner_only()
    inputs = labelled(family, samples_of("padded", family) if case == "ratio 1" else [[9], [5]])
    optimizer = torch.optim.AdamW(model.model.pruner.parameters(), lr=0.1, weight_decay=decay)
    expected = {name: value * (1 - 0.1 * decay) for name, value in model.model.pruner.state_dict().items()}
    model(**inputs).loss.backward()
    optimizer.step()
    for name, value in model.model.pruner.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert not model.config.pruner_trained


@TWO
@pytest.mark.parametrize("kind", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_gradient_marks_the_pruner_as_trained_whatever_optimizer_follows(family, kind):
    _, model = tiny_pair(family, pruner_trained=False)
    model.train_pruner_only()
    optimizer = torch.optim.AdamW(model.model.pruner.parameters(), lr=0.1, **kind)
    before = model.model.pruner.hidden.weight.clone()
    model(**labelled(family, samples_of("padded", family))).loss.backward()
    optimizer.step()
    assert not torch.equal(model.model.pruner.hidden.weight, before)
    assert model.config.pruner_trained


@TWO
def test_a_saliency_in_evaluation_is_no_training(family):
    _, model = tiny_pair(family, pruner_trained=False)
    model(**labelled(family, samples_of("padded", family))).loss.backward()
    assert all(parameter.grad is None for parameter in model.model.pruner.parameters())
    assert not model.config.pruner_trained


@TWO
def test_a_loop_hears_of_a_missing_gradient_at_its_third_step(family, caplog):
    """Its variable holds the output of the step before until the forward has returned."""
    logging.Logger.warning_once.cache_clear()
    caplog.set_level("WARNING")
    _, model = tiny_pair(family)
    model.train()
    inputs = build_inputs(family, samples_of("padded", family))
    told = []
    for _ in range(4):
        outputs = model(**inputs)
        told.append("gave it no gradient" in caplog.text)
        (model.lm_head.weight.square().sum() + outputs.logits.detach().sum()).backward()
    assert told == [False, False, True, True]
    assert caplog.text.count("gave it no gradient") == 1


@TWO
@pytest.mark.parametrize("named", [False, True], ids=["frozen by LoRA", "modules_to_save"])
def test_how_long_a_pruner_stays_frozen(family, named):
    """PEFT makes what `modules_to_save` names trainable again behind each `disable_adapter`; the guide says so."""
    _, model = tiny_pair(family)
    config = LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["pruner"] if named else None)
    policy = get_peft_model(model, config).train()
    model.model.pruner.requires_grad_(False)
    inputs = build_inputs(family, samples_of("padded", family))
    assert policy(**inputs).kept_mask
    with policy.disable_adapter(), torch.no_grad():
        assert policy(**inputs).kept_mask
    assert (policy(**inputs).kept_mask is None) == named
