"""A pruned model of a stock one in memory: they share weights, and it is what `from_pretrained` gives."""

import pytest
import torch
from accelerate import Accelerator, dispatch_model
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from learnpruner import LearnPrunerForConditionalGeneration as Pruned

from tiny_models import (
    FAMILIES,
    NO_PLACEHOLDERS,
    PRUNED,
    STOCK,
    build_inputs,
    labelled,
    samples_of,
    tiny_config,
    tiny_pair,
)

pytestmark = pytest.mark.core


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def folder(family, tmp_path):
    tiny_pair(family)[0].save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_it_is_what_from_pretrained_gives(family, folder, attention):
    stock = STOCK[family].from_pretrained(folder, attn_implementation=attention)
    stock.generation_config.max_new_tokens = 5
    torch.manual_seed(3)
    model = Pruned.from_base(stock, pruner_ratio=0.3, pruner_trained=True)
    torch.manual_seed(3)
    loaded = Pruned.from_pretrained(folder, pruner_ratio=0.3, pruner_trained=True, attn_implementation=attention)
    assert type(model) is type(loaded) is PRUNED[family]
    assert model.config.to_dict() == loaded.config.to_dict()
    for part in ("text_config", "vision_config"):
        assert getattr(model.config, part)._attn_implementation == attention
    inputs = build_inputs(family, samples_of("padded", family))
    output, expected = model(**inputs), loaded(**inputs)
    assert torch.equal(output.logits, expected.logits)
    assert all(map(torch.equal, output.kept_mask, expected.kept_mask))
    arguments = {**inputs, "do_sample": False}
    assert torch.equal(model.generate(**arguments), loaded.generate(**arguments, max_new_tokens=5))


def test_weights_are_shared_and_the_stock_model_stays_stock(family, folder):
    stock = STOCK[family].from_pretrained(folder)
    inputs = build_inputs(family, samples_of("padded", family))
    before, modules = stock(**inputs).logits, [type(module) for module in stock.modules()]
    model = Pruned.from_base(stock, pruner_ratio=0.3)
    theirs, ours = dict(stock.named_parameters()), dict(model.named_parameters())
    assert {name for name in ours if name not in theirs} == {name for name in ours if ".pruner." in name}
    assert all(ours[name] is theirs[name] for name in theirs)
    assert all(model.get_buffer(name) is value for name, value in stock.named_buffers())
    assert model(**inputs).kept_mask is not None
    assert torch.equal(model(**inputs, pruner_ratio=1.0).logits, before)
    assert type(stock) is STOCK[family]
    assert [type(module) for module in stock.modules()] == modules
    assert torch.equal(stock(**inputs).logits, before)
    assert not hasattr(stock.config, "pruner_ratio")
    # Two of them do not disturb each other.
    other = Pruned.from_base(stock, pruner_ratio=1.0)
    assert torch.equal(other(**inputs).logits, before)
    assert model.config.pruner_ratio == 0.3


def test_it_saves_the_pruner_alone_on_the_base_that_the_stock_model_came_from(family, folder, tmp_path):
    model = Pruned.from_base(STOCK[family].from_pretrained(folder), pruner_ratio=0.3).train_pruner_only()
    model.eval().save_pretrained(tmp_path / "light")
    assert all("pruner" in name for name in load_file(tmp_path / "light" / "model.safetensors"))
    inputs = build_inputs(family, samples_of("padded", family))
    assert torch.equal(Pruned.from_pretrained(tmp_path / "light")(**inputs).logits, model(**inputs).logits)


def test_a_stock_model_that_was_changed_has_no_base_to_name(family, folder, tmp_path, caplog):
    """What would be lost is saved."""
    stock = STOCK[family].from_pretrained(folder)
    stock.model.language_model.layers[1].mlp.up_proj.weight.data += 1e-3
    model = Pruned.from_base(stock).train_pruner_only()
    assert "Checkpoints will hold all weights" in caplog.text
    model.save_pretrained(tmp_path / "saved")
    again = Pruned.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_precision_sharding_and_mode(family, folder, tmp_path):
    STOCK[family].from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    stock = STOCK[family].from_pretrained(tmp_path / "shards", dtype=torch.bfloat16).train()
    model = Pruned.from_base(stock)
    assert model.base.name == str(tmp_path / "shards")
    assert model.training
    assert model.model.pruner.training
    assert {parameter.dtype for parameter in model.model.pruner.parameters()} == {torch.float32}
    assert model.dtype == torch.bfloat16


def test_a_base_can_be_named(family):
    model = Pruned.from_base(STOCK[family](tiny_config(family)))
    assert model.base.name is None
    model = Pruned.from_base(
        STOCK[family](tiny_config(family)), base_model_name_or_path="user/base", base_model_revision="v1"
    )
    assert (model.base.name, model.base.revision) == ("user/base", "v1")
    assert model.config.base_model_name_or_path is None


def test_what_is_refused(family):
    stock, pruned = tiny_pair(family)
    with pytest.raises(TypeError, match=r"pruner_ratoi.*pruner_ratio"):
        Pruned.from_base(stock, pruner_ratoi=0.5)
    with pytest.raises(ValueError, match="pruner_ratio"):
        Pruned.from_base(stock, pruner_ratio=2)
    for other in (pruned, stock.model, get_peft_model(stock, LoraConfig(target_modules=r".*language_model.*q_proj"))):
        with pytest.raises(ValueError, match=rf"takes a {STOCK[family].__name__}"):
            Pruned.from_base(other)
    with pytest.raises(ValueError, match="supports"):
        Pruned.from_base(tiny_pair("llava")[0].model.language_model)
    with torch.device("meta"):
        empty = STOCK[family](tiny_config(family))
    with pytest.raises(ValueError, match="from_pretrained"):
        Pruned.from_base(empty)


def placed(family):
    """A stock model that accelerate has placed by a map, on one device here, and one that it has not."""
    stock, plain = (tiny_pair(family)[0] for _ in range(2))
    parts = {name: "cpu" for name, _ in stock.model.named_children()}
    if family == "llava_next":
        parts["image_newline"] = "cpu"
    device_map = {f"model.{name}": device for name, device in parts.items()} | {"lm_head": "cpu"}
    return dispatch_model(stock, device_map, main_device="cpu", force_hooks=True), plain


@pytest.mark.parametrize("whole", [False, True])
def test_a_stock_model_with_hooks_of_accelerate(family, whole):
    """As from a `device_map`, on several devices."""
    stock, plain = placed(family)
    if whole:
        stock = dispatch_model(tiny_pair(family)[0], {"": "cpu"}, main_device="cpu", force_hooks=True)
    before = stock(**build_inputs(family, samples_of("one", family))).logits
    model, expected = (Pruned.from_base(one, pruner_ratio=0.3, pruner_trained=True) for one in (stock, plain))
    expected.model.pruner.load_state_dict(model.model.pruner.state_dict())
    assert model._hf_hook is not None
    inputs = labelled(family, samples_of("mixed", family))
    found, right = model(**inputs), expected(**inputs)
    assert torch.equal(found.logits, right.logits)
    assert torch.equal(found.loss, right.loss)
    assert all(map(torch.equal, found.kept_mask, right.kept_mask))
    prompt = build_inputs(family, samples_of("mixed", family))
    new = {"max_new_tokens": 4, "do_sample": False, "pruner_ratio": 0.2, **NO_PLACEHOLDERS}
    assert torch.equal(model.generate(**prompt, **new), expected.generate(**prompt, **new))
    with torch.enable_grad():
        model.train_pruner_only()(**inputs).loss.backward()
    assert all(parameter.grad.any() for parameter in model.model.pruner.parameters())
    # The stock model is as it was.
    assert torch.equal(stock(**build_inputs(family, samples_of("one", family))).logits, before)


def test_a_forward_that_others_replaced_is_refused():
    stock = tiny_pair("llava")[0]
    try:
        Accelerator(cpu=True, mixed_precision="bf16").prepare_model(stock)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="use from_base first"):
        Pruned.from_base(stock)
    stock = tiny_pair("llava")[0]
    stock.model.forward = stock.model.forward
    with pytest.raises(ValueError, match="use from_base first"):
        Pruned.from_base(stock)
