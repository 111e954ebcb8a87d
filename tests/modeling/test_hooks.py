"""The hooks of the text model: recomputed layers, threads, replaced layers, copies, and what stock tools see."""

import copy
import inspect
import pickle
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from accelerate import infer_auto_device_map
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers import DynamicCache

from learnpruner.compat_learnpruner import CACHE
from learnpruner.model_learnpruner import SCHEDULES
from learnpruner.rows_learnpruner import install_hooks

from tiny_models import (
    FAMILIES,
    LAYERS,
    PRUNED,
    STOCK,
    build_inputs,
    samples_of,
    tiny_config,
    tiny_pair,
    with_checkpointing,
)

pytestmark = pytest.mark.core
NEW = {"max_new_tokens": 4, "do_sample": False}
TWO = pytest.mark.parametrize("family", ["llava", "qwen2_vl"])


# --- Layers that run again in the backward pass


def trained_without_pruner(family, **fields):
    """A model in training whose pruner is frozen: it cuts."""
    _, model = tiny_pair(family, **fields)
    model.model.pruner.requires_grad_(False)
    return model.train()


def gradients(model, inputs, **arguments):
    model.zero_grad()
    with torch.enable_grad():
        outputs = model(**inputs, **arguments)
        outputs.logits.float().logsumexp(-1).square().mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return outputs, {name: gradient.clone() for name, gradient in found.items()}


def assert_same_training(expected, found):
    (outputs, wanted), (again, got) = expected, found
    assert all(torch.equal(*pair) for pair in zip(outputs.kept_mask, again.kept_mask, strict=True))
    assert torch.equal(outputs.logits, again.logits)
    assert wanted.keys() == got.keys()
    assert any("language_model.layers.0" in name for name in wanted)
    assert max((wanted[name] - got[name]).abs().max() for name in wanted) < 1e-6


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@TWO
def test_gradient_checkpointing(family, reentrant, use_cache):
    model = trained_without_pruner(family)
    inputs = build_inputs(family, samples_of("padded", family))
    expected = gradients(model, inputs, use_cache=False)
    assert len(expected[0].kept_mask) == 2
    with_checkpointing(model, reentrant)
    runs = []
    model.model.language_model.layers[1].mlp.register_forward_pre_hook(lambda *args: runs.append(args))
    found = gradients(model, inputs, use_cache=use_cache)
    assert len(runs) == 2, "the layer was not run again"
    assert_same_training(expected, found)
    assert found[0].get(CACHE) is None, "keys that the backward pass would add to"


@pytest.mark.parametrize("kind", [CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT])
@TWO
def test_checkpoint_wrapper(family, kind):
    model = trained_without_pruner(family)
    inputs = build_inputs(family, samples_of("padded", family))
    expected = gradients(model, inputs, use_cache=False)
    layers = set(model.model.language_model.layers)
    apply_activation_checkpointing(
        model, lambda module: checkpoint_wrapper(module, checkpoint_impl=kind), check_fn=lambda module: module in layers
    )
    outputs, wrapped = gradients(model, inputs, use_cache=False)
    wrapped = {name.replace("._checkpoint_wrapped_module", ""): gradient for name, gradient in wrapped.items()}
    assert_same_training(expected, (outputs, wrapped))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_of_a_configuration(family):
    config = tiny_config(family)
    config.gradient_checkpointing = True
    ours = PRUNED[family].config_class.from_base_config(config)
    checkpointed = []
    for model in (STOCK[family](config), PRUNED[family](ours)):
        named = model.named_modules()
        checkpointed.append({name for name, module in named if getattr(module, "gradient_checkpointing", False)})
        assert not hasattr(model.config, "gradient_checkpointing"), "it would be saved"
    assert checkpointed[0] == checkpointed[1]
    assert "model.language_model.layers.0" in checkpointed[0]


# --- Threads


def in_threads(*jobs):
    """Runs the jobs at once, each in a thread of its own; raises what they raise."""
    barrier, results, errors = threading.Barrier(len(jobs)), [None] * len(jobs), []

    def run(place, job):
        try:
            with torch.no_grad():  # a thread starts with gradients
                barrier.wait(30)
                results[place] = job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=each) for each in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@TWO
def test_threads_share_a_model(family):
    _, model = tiny_pair(family)
    calls = [
        (build_inputs(family, samples_of("padded", family)), 0.2),
        (build_inputs(family, samples_of("two_images", family), seed=1), 0.6),
        (build_inputs(family, samples_of("mixed", family), seed=2), 1.0),
    ]

    def run(inputs, ratio):
        outputs = model(**inputs, pruner_ratio=ratio)
        return outputs.logits, outputs.kept_mask, model.generate(**inputs, **NEW, pruner_ratio=ratio)

    def same(found, wanted):
        return (
            torch.equal(found[0], wanted[0])
            and torch.equal(found[2], wanted[2])
            and all(torch.equal(*pair) for pair in zip(found[1] or (), wanted[1] or (), strict=True))
        )

    serial = [run(*call) for call in calls]
    found = in_threads(*(lambda call=call: [run(*call) for _ in range(15)] for call in calls))
    assert all(same(one, wanted) for many, wanted in zip(found, serial) for one in many)


@contextmanager
def scheduled(model, schedule):
    """As the block of a method."""
    token = SCHEDULES.set((*SCHEDULES.get(), (model.model, schedule)))
    yield
    SCHEDULES.reset(token)


class OneCut:
    """LearnPruner's cuts at a ratio of its own."""

    def __init__(self, ratio):
        self.ratio = ratio

    def cuts(self, model):
        return model.pruner_schedule(self.ratio)


def test_blocks_of_two_threads_do_not_see_each_other():
    _, model = tiny_pair()
    inputs = build_inputs("llava", samples_of("padded", "llava"))
    ratios = (0.2, 0.7)
    serial = [model(**inputs, pruner_ratio=ratio).kept_mask[-1] for ratio in ratios]
    assert not torch.equal(*serial)
    both_inside = threading.Barrier(2)

    def run(ratio):
        found = []
        for _ in range(15):
            with scheduled(model, OneCut(ratio)):
                both_inside.wait(30)
                found.append(model(**inputs).kept_mask[-1])
                both_inside.wait(30)
        return found

    found = in_threads(*(lambda ratio=ratio: run(ratio) for ratio in ratios))
    assert all(torch.equal(one, wanted) for many, wanted in zip(found, serial) for one in many)
    assert torch.equal(model(**inputs, pruner_ratio=0.4).kept_mask[-1], model(**inputs).kept_mask[-1])


# --- Layers replaced, taken out, hooked twice


@pytest.mark.parametrize("place", range(LAYERS))
@TWO
def test_a_layer_without_its_hook(family, place):
    """Before, at and behind the second cut, which falls in front of layer 2."""
    stock, model = tiny_pair(family, pruner_layer=2)
    inputs = build_inputs(family, samples_of("padded", family))
    expected, tokens = model(**inputs).logits, model.generate(**inputs, **NEW)
    model.model.language_model.layers[place] = stock.model.language_model.layers[place]
    for call in (lambda: model(**inputs), lambda: model.generate(**inputs, **NEW)):
        with pytest.raises(RuntimeError, match="install_hooks"):
            call()
    assert torch.equal(model(**inputs, pruner_ratio=1.0).logits, stock(**inputs).logits)
    install_hooks(model.model.language_model)
    assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(model.generate(**inputs, **NEW), tokens)


@pytest.mark.parametrize("place", [0, 2, LAYERS - 1])
def test_a_layer_replaced_between_prompt_and_answer(place):
    stock, model = tiny_pair()
    inputs = build_inputs("llava", samples_of("padded", "llava"))
    prompt = model(**inputs)
    model.model.language_model.layers[place] = stock.model.language_model.layers[place]
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
    with pytest.raises(RuntimeError, match="install_hooks"):
        model(input_ids=torch.tensor([[7], [8]]), attention_mask=mask, **{CACHE: prompt[CACHE]})


@pytest.mark.parametrize("place", [0, 1, 2, LAYERS - 1])
def test_a_layer_taken_out(place):
    _, model = tiny_pair()
    inputs = build_inputs("llava", samples_of("padded", "llava"))
    del model.model.language_model.layers[place]
    with pytest.raises(RuntimeError, match="install_hooks"):
        model(**inputs)


def test_after_an_error_the_next_call_is_whole():
    """An error inside a layer, in the middle of a pruned prompt, leaves nothing behind."""
    _, model = tiny_pair()
    inputs = build_inputs("llava", samples_of("padded", "llava"))
    expected = model(**inputs).logits

    def fail(*args):
        raise KeyboardInterrupt

    handle = model.model.language_model.layers[2].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs)
    handle.remove()
    assert torch.equal(model(**inputs).logits, expected)


@TWO
def test_installing_twice_changes_nothing(family):
    _, model = tiny_pair(family)
    inputs = build_inputs(family, samples_of("padded", family))
    decoder = model.model.language_model

    def hooks():
        modules = [decoder, *decoder.layers]
        return [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in modules]

    expected, before, configs = model(**inputs).logits, hooks(), [layer.self_attn.config for layer in decoder.layers]
    for _ in range(3):
        install_hooks(decoder)
    assert hooks() == before
    assert all(layer.self_attn.config is config for layer, config in zip(decoder.layers, configs))
    assert torch.equal(model(**inputs).logits, expected)


# --- Copies and pickles


@pytest.mark.parametrize("called", [False, True])
@TWO
def test_a_deep_copy_is_on_its_own(family, called):
    _, model = tiny_pair(family)
    inputs = build_inputs(family, samples_of("padded", family))
    if called:
        model(**inputs)
    twin = copy.deepcopy(model)
    expected = model(**inputs)
    for parameter in model.model.language_model.parameters():
        parameter.add_(1)
    model.config.text_config.num_hidden_layers = 1
    found = twin(**inputs)
    assert torch.equal(found.logits, expected.logits)
    assert all(torch.equal(*pair) for pair in zip(found.kept_mask, expected.kept_mask, strict=True))
    twin.set_attn_implementation("eager")
    assert twin.model.language_model.layers[0].self_attn.config.config is twin.config.text_config
    assert model.config.text_config._attn_implementation == "sdpa"


def test_a_model_pickles():
    """Before and after its first call; LLaVA's stock class does not pickle after one."""
    for family, called in (("llava", False), ("qwen2_vl", False), ("qwen2_vl", True)):
        _, model = tiny_pair(family)
        inputs = build_inputs(family, samples_of("padded", family))
        if called:
            model(**inputs)
        twin = pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
        assert twin.model.language_model.layers[0].self_attn.config.config is twin.config.text_config


@TWO
def test_outputs_pickle(family):
    stock, model = tiny_pair(family)
    inputs = build_inputs(family, samples_of("padded", family))
    for ours, theirs in ((model, stock), (model.model, stock.model)):
        outputs = ours(**inputs)
        again = pickle.loads(pickle.dumps(outputs))
        assert type(again) is type(outputs) is type(ours(**inputs))
        assert isinstance(outputs, type(theirs(**inputs)))
        assert again.keys() == outputs.keys()
        assert torch.equal(again[0], outputs[0])
        assert all(torch.equal(*pair) for pair in zip(again.kept_mask, outputs.kept_mask, strict=True))
        assert again[CACHE].get_seq_length() == outputs[CACHE].get_seq_length()


AGAIN = """
import sys, torch
model, inputs, outputs, head = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    again = model(**inputs)
for found, wanted in ((again, outputs), (model.model(**inputs), head)):
    assert type(found) is type(wanted), (type(found), type(wanted))
    assert (found[0] - wanted[0]).abs().max() < 1e-5
    assert all(torch.equal(*pair) for pair in zip(found.kept_mask, wanted.kept_mask, strict=True))
    print(type(found).__name__)
"""


def test_models_and_outputs_in_another_process(tmp_path):
    """Qwen2-VL: a stock LLaVA that was not constructed in its process finds no hidden states of its tower."""
    _, model = tiny_pair("qwen2_vl")
    inputs = build_inputs("qwen2_vl", samples_of("padded", "qwen2_vl"))
    outputs = model(**inputs), model.model(**inputs)
    torch.save((model, inputs, *outputs), tmp_path / "all.pt")
    command = [sys.executable, "-c", AGAIN, str(tmp_path / "all.pt")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == [type(each).__name__ for each in outputs]


# --- What stock tools see


@pytest.mark.parametrize("family", FAMILIES)
def test_each_part_is_built_once(family, monkeypatch):
    stock, _ = tiny_pair(family)
    tower, *_, decoder = stock.model.children()
    built = {}
    for kind in (type(tower), type(decoder), type(decoder.layers[0]), type(stock.model)):

        def count(self, *args, kind=kind, init=kind.__init__, **kwargs):
            built[kind] = built.get(kind, 0) + 1
            init(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__init__", count)
    PRUNED[family](PRUNED[family].config_class.from_base_config(tiny_config(family)))
    assert built == {type(tower): 1, type(decoder): 1, type(decoder.layers[0]): LAYERS, type(stock.model): 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_inside_are_stock(family):
    """FSDP's policies, `_no_split_modules` and accelerate's device maps go by their names."""
    stock, pruned = tiny_pair(family)
    kinds = {name: type(module) for name, module in stock.named_modules()}
    ours = {name: type(module) for name, module in pruned.named_modules() if "pruner" not in name}
    assert {name for name in kinds if ours[name] is not kinds[name]} == {"", "model"}
    assert ours.keys() == kinds.keys()
    assert pruned._no_split_modules == stock._no_split_modules
    for model in (stock, pruned):
        places = infer_auto_device_map(
            model, {0: "120KB", 1: "120KB", "cpu": "1GB"}, no_split_module_classes=list(model._no_split_modules)
        )
        assert len(set(places.values())) > 1
        whole = [name for name, kind in kinds.items() if kind.__name__ in model._no_split_modules]
        assert len(whole) >= LAYERS
        assert not [place for place in places for name in whole if place.startswith(f"{name}.")]


# --- What would cut nothing, or lose the cache, without a word


@pytest.mark.parametrize("how", ["set_decoder", "attribute", "hooks cleared"])
def test_a_text_model_without_hooks_is_named(how):
    stock, model = tiny_pair("llava")
    inputs = build_inputs("llava", samples_of("one", "llava"))
    if how == "set_decoder":
        model.set_decoder(stock.model.language_model)
    elif how == "attribute":
        model.model.language_model = stock.model.language_model
    else:
        model.model.language_model._forward_pre_hooks.clear()
    for call in (model, lambda **given: model.generate(**given, **NEW)):
        with pytest.raises(RuntimeError, match="install_hooks"):
            call(**inputs)
    # Unpruned, it is the stock model.
    assert torch.equal(model(**inputs, pruner_ratio=1.0).logits, stock(**inputs).logits)


@TWO
def test_the_text_model_takes_arguments_by_position(family):
    stock, model = tiny_pair(family)
    ids = torch.tensor([[1, 7, 8, 9]])
    texts = stock.model.language_model, model.model.language_model
    one, other = (text(ids).last_hidden_state for text in texts)
    assert torch.equal(one, other)
    cache = model(**build_inputs(family, samples_of("one", family)))[CACHE]
    names = list(inspect.signature(texts[1].forward).parameters)
    copies = [copy.deepcopy(cache) for _ in range(2)]
    by_place = [ids, None, None, copies[0]]
    assert names[:4] == ["input_ids", "attention_mask", "position_ids", CACHE]
    by_name = texts[1](input_ids=ids, **{CACHE: copies[1]}).last_hidden_state
    assert torch.equal(texts[1](*by_place).last_hidden_state, by_name)


def test_a_call_without_a_prompt_fails_as_stock_does():
    stock, model = tiny_pair("llava")
    errors = []
    for each in (stock, model):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds") as error:
            each()
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@TWO
def test_the_cache_of_the_caller_stays_the_object_that_it_is(family):
    _, model = tiny_pair(family)
    inputs, cache = build_inputs(family, samples_of("one", family)), DynamicCache()
    outputs = model(**inputs, **{CACHE: cache})
    assert outputs[CACHE] is cache
    assert all(torch.equal(*pair) for pair in zip(cache.kept_mask, outputs.kept_mask, strict=True))


@TWO
def test_a_cache_under_gradient_checkpointing_is_ignored_as_in_stock(family):
    model = trained_without_pruner(family)
    inputs = build_inputs(family, samples_of("one", family))
    expected = gradients(model, inputs, use_cache=False)
    with_checkpointing(model, reentrant=False)
    cache = DynamicCache()
    assert_same_training(expected, gradients(model, inputs, **{CACHE: cache}))
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_schedules_pickle(family):
    _, model = tiny_pair(family)
    schedule = pickle.loads(pickle.dumps(model.model.pruner_schedule()))
    inputs = build_inputs(family, samples_of("mixed", family))
    assert torch.equal(model(**inputs, schedule=schedule).logits, model(**inputs).logits)
