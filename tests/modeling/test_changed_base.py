"""A base that is no longer what was loaded: a pruner alone would lose it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from learnpruner import LearnPrunerForConditionalGeneration

from tiny_models import tiny_pair

pytestmark = pytest.mark.core
LORA = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)


@pytest.fixture(params=["llava", "qwen2_vl"])
def base(request, tmp_path):
    tiny_pair(request.param)[0].save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder):
    return LearnPrunerForConditionalGeneration.from_pretrained(folder)


def is_light(folder):
    names = load_file(folder / "model.safetensors")
    return all(name.startswith("model.pruner.") for name in names)


def test_a_merged_adapter_is_not_lost(base, tmp_path, caplog):
    load(base).train_pruner_only().save_pretrained(tmp_path / "light")
    assert is_light(tmp_path / "light")
    model = get_peft_model(load(tmp_path / "light"), LORA).merge_and_unload()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="base was changed"):
        model.save_pretrained(tmp_path / "alone", pruner_only=True)
    model.save_pretrained(tmp_path / "whole")
    assert "The base was changed: saving all weights" in caplog.text
    again = load(tmp_path / "whole").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_a_merged_adapter_has_no_base_to_name(base, tmp_path, caplog):
    model = get_peft_model(load(base), LORA).merge_and_unload().train_pruner_only()
    assert model.config.base_model_name_or_path is None
    assert "no longer has its weights" in caplog.text
    model.save_pretrained(tmp_path / "whole")
    assert not is_light(tmp_path / "whole")


def test_an_adapter_that_is_still_there_is_not_lost(base, tmp_path):
    model = load(base).train_pruner_only()
    get_peft_model(model, LORA).requires_grad_(False)
    with pytest.raises(ValueError, match="base was changed"):
        model.save_pretrained(tmp_path / "alone", pruner_only=True)


def test_one_changed_matrix_is_enough(base, tmp_path):
    model = load(base).train_pruner_only()
    with torch.no_grad():
        model.lm_head.weight.mul_(1 + 2**-10)
    model.save_pretrained(tmp_path / "whole")
    assert not is_light(tmp_path / "whole")


def test_another_precision_is_no_change(base, tmp_path):
    load(base).train_pruner_only().to(torch.bfloat16).save_pretrained(tmp_path / "light")
    assert is_light(tmp_path / "light")
    model = LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "light", dtype=torch.bfloat16)
    model.float().save_pretrained(tmp_path / "again", pruner_only=True)
    assert is_light(tmp_path / "again")


def test_weights_that_are_elsewhere_are_no_change(base, tmp_path):
    model = load(base).train_pruner_only()
    # As offloading leaves it: the values are with the hooks.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to("meta"), requires_grad=False)
    assert not model.base.changed(model)
