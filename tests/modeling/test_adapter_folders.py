"""Adapters of a pruned model or its base, opened as the pruned class; a pruner that comes with one was trained."""

import copy
import pickle
import shutil
from functools import partial

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText
from transformers.integrations.peft import MIN_PEFT_VERSION

from learnpruner import LearnPrunerForConditionalGeneration as Pruned

from tiny_models import FAMILIES, PRUNED, STOCK, build_inputs, samples_of, tiny_pair

pytestmark = pytest.mark.core
LORA = partial(LoraConfig, r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
# Not ours: transformers' own `load_adapter` refuses an older one.
opened_by_transformers = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason=f"this transformers needs peft {MIN_PEFT_VERSION}"
)
LOADERS = (Pruned.from_pretrained, AutoModelForImageTextToText.from_pretrained)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def folders(family, tmp_path):
    tiny_pair(family)[0].save_pretrained(tmp_path / "stock")
    model = Pruned.from_pretrained(tmp_path / "stock", pruner_ratio=0.3)
    model.save_pretrained(tmp_path / "full")
    model.train_pruner_only().save_pretrained(tmp_path / "light")
    return tmp_path


def logits(family, model, **arguments):
    with torch.no_grad():
        return model.eval()(**build_inputs(family, samples_of("padded", family)), **arguments).logits


def adapter_with_a_pruner(family, base, folder):
    """What training of adapter and pruner together saves; returns the answers."""
    model = get_peft_model(Pruned.from_pretrained(base), LORA(modules_to_save=["pruner"]))
    for parameter in model.base_model.model.model.pruner.modules_to_save.parameters():
        parameter.data.normal_()
    model.get_base_model().config.pruner_trained = True  # as soon as it has a gradient
    model.save_pretrained(folder)
    return logits(family, model)


@pytest.mark.parametrize("base", ["stock", "full", "light"])
def test_an_adapter_over_a_pruned_base(family, folders, base):
    expected = adapter_with_a_pruner(family, folders / base, folders / "adapter")
    fresh = Pruned.from_pretrained(folders / base)
    assert not fresh.config.pruner_trained
    model = PeftModel.from_pretrained(fresh, folders / "adapter")
    assert fresh.config.pruner_trained
    ratio = {"pruner_ratio": 1 / 9} if base == "stock" else {}
    assert torch.equal(logits(family, model, **ratio), expected)


@opened_by_transformers
@pytest.mark.parametrize("base", ["stock", "full", "light"])
def test_an_adapter_folder_with_a_pruner(family, folders, base):
    expected = adapter_with_a_pruner(family, folders / base, folders / "adapter")
    for load in LOADERS[:1] if base == "stock" else LOADERS:
        model = load(folders / "adapter")
        assert type(model) is PRUNED[family]
        assert model.config.pruner_trained
        assert torch.equal(logits(family, model), expected)
    model = Pruned.from_pretrained(folders / base)
    model.load_adapter(str(folders / "adapter"), "second")
    assert model.config.pruner_trained
    assert torch.equal(logits(family, model), expected)


@opened_by_transformers
@pytest.mark.parametrize("base", ["stock", "full", "light"])
def test_an_adapter_folder_without_a_pruner(family, folders, base):
    model = (STOCK[family] if base == "stock" else Pruned).from_pretrained(folders / base)
    model.add_adapter(LORA())
    model.save_pretrained(folders / "adapter")
    expected = logits(family, model, **({} if base == "stock" else {"pruner_ratio": 1.0}))
    for load in LOADERS[:1] if base == "stock" else LOADERS:
        opened = load(folders / "adapter")
        assert type(opened) is PRUNED[family]
        assert not opened.config.pruner_trained
        assert torch.equal(logits(family, opened, pruner_ratio=1.0), expected)
    named = Pruned.from_pretrained(folders / "adapter", adapter_name="mine", pruner_ratio=0.5)
    assert named.active_adapters() == ["mine"]
    assert named.config.pruner_ratio == 0.5


@opened_by_transformers
@pytest.mark.parametrize("base", ["full", "light"])
def test_an_adapter_beside_its_model(family, folders, base):
    shutil.copytree(folders / base, folders / "both")
    model = Pruned.from_pretrained(folders / base)
    model.add_adapter(LORA())
    model.save_pretrained(folders / "both")
    for load in LOADERS:
        assert torch.equal(logits(family, load(folders / "both")), logits(family, model))


def test_a_state_dict_that_brings_a_pruner(family, folders):
    stock, _ = tiny_pair(family)
    for name in ("stock", "full", "light"):
        assert not Pruned.from_pretrained(folders / name).config.pruner_trained
    trained = Pruned.from_pretrained(folders / "stock", pruner_trained=True).train_pruner_only()
    trained.save_pretrained(folders / "trained")
    assert Pruned.from_pretrained(folders / "trained").config.pruner_trained
    model = Pruned.from_pretrained(folders / "full")
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for each in (model, *copies):
        each.load_state_dict(stock.state_dict(), strict=False)
        assert not each.config.pruner_trained
    for each in copies:  # each marks its own configuration
        each.load_state_dict(trained.state_dict())
        assert each.config.pruner_trained
    assert not model.config.pruner_trained
    model.model.load_state_dict(trained.model.state_dict())
    assert model.config.pruner_trained
