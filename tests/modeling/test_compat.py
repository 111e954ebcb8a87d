"""Names of transformers: signatures derived from stock classes, both names of the cache, and the next rename."""

import inspect
import re
import subprocess
import sys
import warnings
from dataclasses import fields
from functools import wraps

import pytest
import torch
from transformers import DynamicCache
from transformers.utils import logging

from learnpruner.compat_learnpruner import CACHE, CACHE_NAMES, RECORDS
from learnpruner.keys_learnpruner import LOST_CACHE

from oracles import masked
from tiny_models import (
    FAMILIES,
    LAYERS,
    NO_PLACEHOLDERS,
    PRUNED,
    STOCK,
    build_inputs,
    positions,
    samples_of,
    tiny_pair,
    with_answer,
)

pytestmark = pytest.mark.core
NEW = {"max_new_tokens": 4, "do_sample": False, **NO_PLACEHOLDERS}
TWO = pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
OTHER = next(name for name in CACHE_NAMES if name != CACHE)
OWN = {
    "head": ["pruner_ratio", "schedule", "query_mask"],
    "model": ["pruner_ratio", "schedule", "query_mask"],
}


def classes(family, kind):
    """The stock class and ours, with the head or without."""
    stock, pruned = STOCK[family], PRUNED[family]
    if kind == "head":
        return stock, pruned
    return next(each for each in pruned.model_class.__mro__ if each.__module__.startswith("transformers.")), (
        pruned.model_class
    )


# --- Signatures


@pytest.mark.parametrize("kind", ["head", "model"])
@pytest.mark.parametrize("family", FAMILIES)
def test_signature(family, kind):
    stock, ours = (inspect.signature(each.forward) for each in classes(family, kind))
    named = [each for each in stock.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    (rest,) = [each for each in stock.parameters.values() if each.kind is inspect.Parameter.VAR_KEYWORD]
    found = list(ours.parameters.values())
    # Parameters are equal in name, kind, default and annotation.
    assert found[: len(named)] == named
    assert found[-1] == rest
    assert rest.annotation is not inspect.Parameter.empty
    added = found[len(named) : -1]
    assert [each.name for each in added] == OWN[kind]
    assert {(each.kind, each.default) for each in added} == {(inspect.Parameter.KEYWORD_ONLY, None)}
    assert ours.return_annotation == stock.return_annotation


@pytest.mark.parametrize("kind", ["head", "model"])
@pytest.mark.parametrize("family", FAMILIES)
def test_positional_arguments(family, kind):
    _, model = tiny_pair(family)
    model = model if kind == "head" else model.model
    inputs = build_inputs(family, samples_of("padded", family))
    expected = model(**inputs)
    names = [name for name in inspect.signature(model.forward).parameters if name not in (*OWN[kind], "kwargs")]
    places = max(names.index(name) for name in inputs if name in names) + 1
    for count in (1, 2, places):
        given = [inputs.get(name) for name in names[:count]]
        found = model(*given, **{name: value for name, value in inputs.items() if name not in names[:count]})
        assert torch.equal(found[0], expected[0])
        assert all(torch.equal(*pair) for pair in zip(found.kept_mask, expected.kept_mask, strict=True))
    with pytest.raises(TypeError, match="positional"):
        model(*[None] * (len(names) + 1))
    with pytest.raises(TypeError, match="multiple values"):
        model(inputs["input_ids"], **inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_an_evaluation_does_not_gather(family):
    _, model = tiny_pair(family)
    outputs = model(**build_inputs(family, samples_of("one", family)))
    names = [each.name for each in fields(outputs)]
    ignored = type(model.config).keys_to_ignore_at_inference
    assert sorted(ignored) == sorted(set(names) - {"loss", "logits"})
    assert set(RECORDS) <= set(ignored)
    assert names[-2:] == list(RECORDS)


# --- Both names of the cache


@pytest.fixture
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        yield


def next_token(family, stock, inputs):
    rows = len(inputs["input_ids"])
    mask = torch.cat([inputs["attention_mask"], torch.ones(rows, 1, dtype=torch.long)], dim=1)
    where = positions(family, stock, inputs, 1)[..., -1:]
    return {"input_ids": torch.full((rows, 1), 7), "attention_mask": mask, "position_ids": where}


@pytest.mark.parametrize("kind", ["head", "model"])
@pytest.mark.usefixtures("_warnings_are_errors")
@TWO
def test_forward_takes_both_names(family, kind):
    stock, model = tiny_pair(family)
    model = model if kind == "head" else model.model
    inputs = build_inputs(family, samples_of("padded", family))
    expected, step, steps = model(**inputs), next_token(family, stock, inputs), []
    for name, more in ((CACHE, {}), (OTHER, {}), (CACHE, {OTHER: None}), (OTHER, {CACHE: None})):
        cache = DynamicCache(config=model.config.text_config)
        prompt = model(**inputs, **{name: cache}, **more)
        assert torch.equal(prompt[0], expected[0])
        assert prompt[CACHE].layers is cache.layers
        steps.append(model(**step, **{name: prompt[CACHE]}, **more)[0])
    assert all(torch.equal(found, steps[0]) for found in steps)
    same = DynamicCache(config=model.config.text_config)
    assert torch.equal(model(**inputs, **{CACHE: same, OTHER: same})[0], expected[0])
    with pytest.raises(TypeError, match="Two different caches"):
        model(**inputs, cache=DynamicCache(), past_key_values=DynamicCache())


@pytest.mark.usefixtures("_warnings_are_errors")
@TWO
def test_generate_takes_both_names(family):
    _, model = tiny_pair(family)
    inputs = build_inputs(family, samples_of("padded", family))
    expected = model.generate(**inputs, **NEW)
    for name, more in ((CACHE, {}), (OTHER, {}), (CACHE, {OTHER: None}), (OTHER, {CACHE: None})):
        cache = DynamicCache(config=model.config.text_config)
        assert torch.equal(model.generate(**inputs, **NEW, **{name: cache}, **more), expected)
        assert cache.get_seq_length() == expected.shape[1] - 1
    with pytest.raises(TypeError, match="Two different caches"):
        model.generate(**inputs, **NEW, cache=DynamicCache(), past_key_values=DynamicCache())


@pytest.mark.usefixtures("_warnings_are_errors")
@pytest.mark.parametrize("family", FAMILIES)
def test_our_calls_bring_no_warning(family):
    _, model = tiny_pair(family)
    inputs = build_inputs(family, samples_of("padded", family))
    model(**inputs)
    model.generate(**inputs, **NEW)
    model.generate(**inputs, **NEW, num_beams=2)
    model.train()(**inputs, labels=inputs["input_ids"])


# --- The trap: a cache that is lost on its way


def assert_answers_as_the_oracle(stock, model, family, inputs):
    """Greedy tokens of `generate` are those of the masked stock model; `stock` is not wrapped."""
    found = model.generate(**inputs, **NEW, return_dict_in_generate=True, output_logits=True)
    prompt, steps = inputs["input_ids"].shape[1], NEW["max_new_tokens"]
    answer = torch.ones(len(found.sequences), steps, dtype=torch.bool)
    kept_mask = [torch.cat([kept, answer], dim=1) for kept in found[CACHE].kept_mask]
    whole = with_answer(inputs, found.sequences)
    where = positions(family, stock, inputs, steps)
    with masked(stock, kept_mask, (0, model.config.pruner_layer), whole["attention_mask"], LAYERS):
        expected = stock(**whole, position_ids=where).logits[:, prompt - 1 : -1]
    assert (torch.stack(found.logits, dim=1) - expected).abs().max() < 1e-4


def renamed(forward):
    """A stock forward of a release that calls the cache `kv`, and swallows it under the old names."""
    names = [name for name in inspect.signature(forward).parameters if name != "self"]

    @wraps(forward)
    def wrapper(self, *args, kv=None, **kwargs):
        for name in CACHE_NAMES:
            kwargs.pop(name, None)
        return forward(self, **dict(zip(names, args)), **kwargs, **{CACHE: kv})

    parameters = [
        each.replace(name="kv") if each.name == CACHE else each
        for each in inspect.signature(forward).parameters.values()
    ]
    wrapper.__signature__ = inspect.signature(forward).replace(parameters=parameters)
    return wrapper


def passes_as_kv(forward, when=lambda self, kwargs: True):
    """A caller inside stock code that names the cache `kv`; what is called knows it by the installed name."""

    @wraps(forward)
    def wrapper(self, *args, **kwargs):
        if when(self, kwargs):
            kwargs["kv"] = kwargs.pop(CACHE, None)
        return forward(self, *args, **kwargs)

    return wrapper


def output_renamed(forward):
    """The output has the cache under another name."""

    @wraps(forward)
    def wrapper(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        outputs[CACHE] = None
        return outputs

    return wrapper


def decoding(self, kwargs):
    """Whether it is a step of an answer."""
    given = kwargs.get("inputs_embeds")
    given = kwargs.get("input_ids", kwargs.get("hidden_states")) if given is None else given
    return given.shape[1] == 1


def prefill(self, kwargs):
    return not decoding(self, kwargs)


PLACES = {
    "text model, argument lost": ("text", passes_as_kv),
    "text model, argument lost in the answer": ("text", lambda forward: passes_as_kv(forward, decoding)),
    "text model, argument lost in the prompt": ("text", lambda forward: passes_as_kv(forward, prefill)),
    "layers, argument lost in the answer": ("layer", lambda forward: passes_as_kv(forward, decoding)),
    "attention, argument lost in the answer": ("attention", lambda forward: passes_as_kv(forward, decoding)),
    "text model, argument renamed": ("text", renamed),
    "text model, output renamed": ("text", output_renamed),
    "layers, argument lost": ("layer", passes_as_kv),
    "layers, argument renamed": ("layer", renamed),
    "one layer, argument lost": (
        "layer",
        lambda forward: passes_as_kv(forward, lambda self, kwargs: is_layer(self, 1)),
    ),
    "last layer, argument lost": (
        "layer",
        lambda forward: passes_as_kv(forward, lambda self, kwargs: is_layer(self, LAYERS - 1)),
    ),
    "attention, argument lost": ("attention", passes_as_kv),
    "stock model, argument lost": ("model", passes_as_kv),
    "stock model, argument lost in the answer": ("model", lambda forward: passes_as_kv(forward, decoding)),
    "stock model, argument renamed": ("model", renamed),
    "stock model, output renamed": ("model", output_renamed),
    "stock head, argument lost": ("head", passes_as_kv),
    "stock head, argument lost in the answer": ("head", lambda forward: passes_as_kv(forward, decoding)),
    "stock head, argument renamed": ("head", renamed),
    "stock head, output renamed": ("head", output_renamed),
}


# What stops the answer where it is not the hooks' own check. A padded batch has a mask: where the cache is lost in the
# text model or below, torch's attention is the first to see that the mask is of more keys.
SHAPES = "output with shape .* doesn't match the broadcast shape"
STOPPED_BY = {
    ("stock head, argument lost in the answer", "padded"): "attention_mask has .* columns .* and no cache came",
    ("text model, argument lost in the answer", "padded"): SHAPES,
    ("layers, argument lost in the answer", "padded"): SHAPES,
    ("attention, argument lost in the answer", "padded"): SHAPES,
}


def is_layer(layer, number):
    return layer.self_attn.layer_idx == number


# A batch that is padded has masks, whose shapes give some losses away; one sample has none.
@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("place", PLACES)
@TWO
def test_a_renamed_cache_never_answers_other_text(family, place, batch, monkeypatch):
    where, change = PLACES[place]
    stock, model = tiny_pair(family)
    inputs = build_inputs(family, samples_of(batch, family))
    assert_answers_as_the_oracle(stock, model, family, inputs)
    layer = model.model.language_model.layers[0]
    kind = {
        "text": type(model.model.language_model),
        "layer": type(layer),
        "attention": type(layer.self_attn),
        "model": classes(family, "model")[0],
        "head": STOCK[family],
    }[where]
    untouched = kind.forward
    changed, calls = change(untouched), []
    names = [name for name in inspect.signature(untouched).parameters if name != "self"]

    @wraps(changed)
    def counted(self, *args, **kwargs):
        kwargs |= dict(zip(names, args))
        # The oracle's own model is stock as it is installed.
        if not any(self is module for module in pruned_modules):
            return untouched(self, **kwargs)
        calls.append(self)
        return changed(self, **kwargs)

    if hasattr(changed, "__signature__"):
        counted.__signature__ = changed.__signature__
    pruned_modules = list(model.modules())
    monkeypatch.setattr(kind, "forward", counted)
    with pytest.raises((RuntimeError, ValueError), match=STOPPED_BY.get((place, batch), re.escape(LOST_CACHE))):
        assert_answers_as_the_oracle(stock, model, family, inputs)
    assert calls


@pytest.mark.parametrize("kind", ["head", "model"])
@TWO
def test_a_mask_longer_than_the_rows_without_a_cache(family, kind):
    stock, model = tiny_pair(family)
    model = model if kind == "head" else model.model
    step = next_token(family, stock, build_inputs(family, samples_of("one", family)))
    with pytest.raises(ValueError, match="no cache"):
        model(**step)


@TWO
def test_a_cache_that_layers_never_see(family, monkeypatch):
    """The stock model makes the cache, and hands it to its layers under another name."""
    _, model = tiny_pair(family)
    kind = type(model.model.language_model.layers[0])
    call = kind.__call__

    def renamed(self, *args, **kwargs):
        kwargs["kv"] = kwargs.pop(CACHE)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", renamed)
    inputs = build_inputs(family, samples_of("one", family))
    for each in (model, model.model):
        with pytest.raises(RuntimeError, match="cache"):
            each(**inputs)


@TWO
def test_a_swapped_cache(family, monkeypatch):
    """Between head and text model, another cache of the same size."""
    stock, model = tiny_pair(family)
    inputs = build_inputs(family, samples_of("one", family))
    caches = [model(**inputs)[CACHE] for _ in range(2)] + [DynamicCache(config=model.config.text_config)]
    kind = classes(family, "model")[0]
    forward = kind.forward

    @wraps(forward)
    def swaps(self, *args, **kwargs):
        return forward(self, *args, **{**kwargs, CACHE: caches.pop()})

    monkeypatch.setattr(kind, "forward", swaps)
    with pytest.raises(RuntimeError, match="lost or swapped"):
        model(**inputs, **{CACHE: DynamicCache(config=model.config.text_config)})
    with pytest.raises(RuntimeError, match="lost or swapped"):
        model(**next_token(family, stock, inputs), **{CACHE: caches[0]})


NEXT_RELEASE = """
import functools, inspect, sys
import transformers
from transformers import LlamaModel, LlavaForConditionalGeneration, LlavaModel

everywhere = (LlamaModel, LlavaModel, LlavaForConditionalGeneration)
for kind in everywhere if sys.argv[1] == "everywhere" else (LlavaModel,):
    known = inspect.signature(kind.forward)
    names = {"cache": "kv", "past_key_values": "kv"}
    renamed = [each.replace(name=names.get(each.name, each.name)) for each in known.parameters.values()]
    kind.forward.__signature__ = known.replace(parameters=renamed)
try:
    import learnpruner.modeling_learnpruner_llava
except TypeError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("where", ["everywhere", "above"])
def test_a_release_with_another_name_is_named_at_import(where):
    """As a release that renames the argument once more would bring it: before this package is imported."""
    run = subprocess.run([sys.executable, "-c", NEXT_RELEASE, where], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "refused: LlavaModel.forward takes none of ('cache', 'past_key_values')" in run.stdout
    assert "pip install -U learnpruner" in run.stdout


def test_what_transformers_announces_in_its_log_fails_a_test():
    with pytest.raises(AssertionError, match="deprecates something the project uses: `x` is deprecated"):
        logging.get_logger("transformers.models.llava").warning("`x` is deprecated")
