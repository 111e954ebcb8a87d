"""Invariant 2: physical cutting equals masking, for the prompt's text rows and for every generated token."""

import pytest
import torch
import transformers

from learnpruner.compat_learnpruner import CACHE

from oracles import masked
from tiny_models import (
    FAMILIES,
    LAYERS,
    NO_PLACEHOLDERS,
    PRUNED,
    TEXT_MODELS,
    build_inputs,
    covering,
    positions,
    samples_of,
    tiny_config,
    tiny_pair,
    with_answer,
    with_videos,
)

pytestmark = pytest.mark.core
BATCHES = ("one", "padded", "two_images", "mixed", "image_first", "image_last")
ATTENTION = ("sdpa", "eager")
# Each family with each batch and both backends; each of the three with each ratio and layer, and these with each other.
FLOAT32 = covering(
    [(family, batch, attention) for family, batch in with_videos(BATCHES) for attention in ATTENTION],
    (0.1, 0.4, 0.8),
    (1, 2, 3),
)
BFLOAT16 = covering(with_videos(("one", "padded", "two_images", "mixed")), ATTENTION, (0.2, 0.6), (1, 3))


def oracle_logits(stock, inputs, kept_mask, layer):
    with masked(stock, kept_mask, (0, layer), inputs["attention_mask"], LAYERS):
        return stock(**inputs).logits


def surviving(inputs, outputs):
    """Rows whose logits count: not padding, not dropped."""
    return outputs.kept_mask[-1] & inputs["attention_mask"].bool()


@pytest.mark.parametrize(("family", "batch", "attention", "ratio", "layer"), FLOAT32)
def test_prompt_float32(family, batch, ratio, layer, attention):
    stock, pruned = tiny_pair(family, attention=attention, pruner_ratio=ratio, pruner_layer=layer)
    inputs = build_inputs(family, samples_of(batch, family))
    outputs = pruned(**inputs)
    expected = oracle_logits(stock, inputs, outputs.kept_mask, layer)
    rows = surviving(inputs, outputs)
    assert (outputs.logits - expected)[rows].abs().max() < 1e-4
    assert outputs.logits.shape == expected.shape
    assert not outputs.logits[~outputs.kept_mask[-1]].any()
    # The proof can fail: what was dropped mattered.
    unpruned = stock(**inputs).logits
    assert (outputs.logits - unpruned)[rows].abs().max() > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "text"), TEXT_MODELS)
def test_text_models_and_padding_sides(family, text, side):
    stock, pruned = tiny_pair(family, text=text)
    inputs = build_inputs(family, samples_of("mixed", family), side=side)
    outputs = pruned(**inputs)
    expected = oracle_logits(stock, inputs, outputs.kept_mask, pruned.config.pruner_layer)
    assert (outputs.logits - expected)[surviving(inputs, outputs)].abs().max() < 1e-4


@pytest.mark.parametrize(("family", "batch", "attention", "ratio", "layer"), BFLOAT16)
def test_prompt_bfloat16(family, batch, ratio, layer, attention):
    """Against a float32 oracle at the same kept sets: at most twice the stock model's own bfloat16 error there."""
    stock, pruned = tiny_pair(family, attention=attention, dtype=torch.bfloat16, pruner_ratio=ratio, pruner_layer=layer)
    inputs = build_inputs(family, samples_of(batch, family), dtype=torch.bfloat16)
    assert_within_stock_error(stock, pruned, inputs)


@pytest.mark.parametrize("kind", ["stock", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_of_a_bfloat16_base_with_its_float32_pruner(family, kind, tmp_path):
    """As from_pretrained loads them: a stock checkpoint with a new pruner, and a saved one with its own."""
    stock, _ = tiny_pair(family, dtype=torch.bfloat16)
    stock.save_pretrained(tmp_path)
    pruned = PRUNED[family].from_pretrained(tmp_path, dtype=torch.bfloat16, pruner_ratio=0.3).eval()
    if kind == "full":
        pruned.save_pretrained(tmp_path / "full")
        pruned = PRUNED[family].from_pretrained(tmp_path / "full", dtype=torch.bfloat16).eval()
    assert {parameter.dtype for parameter in pruned.model.pruner.parameters()} == {torch.float32}
    assert {parameter.dtype for name, parameter in pruned.named_parameters() if ".pruner." not in name} == {
        torch.bfloat16
    }
    # Pixels in float32, as a processor returns them.
    assert_within_stock_error(stock, pruned, build_inputs(family, samples_of("mixed", family)))


def assert_within_stock_error(stock, pruned, inputs):
    layer = pruned.config.pruner_layer
    outputs = pruned(**inputs)
    rows = surviving(inputs, outputs)
    own = oracle_logits(stock, inputs, outputs.kept_mask, layer).float()
    full = stock.float()
    inputs |= {name: value.float() for name, value in inputs.items() if value.is_floating_point()}
    expected = oracle_logits(full, inputs, outputs.kept_mask, layer)
    stock_error = (own - expected)[rows].abs().max()
    assert (outputs.logits.float() - expected)[rows].abs().max() <= 2 * stock_error


@pytest.mark.parametrize(("family", "batch", "attention"), covering(with_videos(BATCHES), ATTENTION))
def test_generated_tokens(family, attention, batch):
    """Every step of cached greedy decoding against one masked, uncached run over prompt and answer."""
    stock, pruned = tiny_pair(family, attention=attention)
    inputs = build_inputs(family, samples_of(batch, family))
    steps = 8
    arguments = {"max_new_tokens": steps, "do_sample": False, **NO_PLACEHOLDERS}
    generated = pruned.generate(**inputs, **arguments, return_dict_in_generate=True, output_logits=True)
    prompt = inputs["input_ids"].shape[1]
    answer = torch.ones(len(generated.sequences), steps, dtype=torch.bool)
    kept_mask = [torch.cat([kept, answer], dim=1) for kept in generated[CACHE].kept_mask]
    whole = with_answer(inputs, generated.sequences)
    where = positions(family, stock, inputs, steps)
    with masked(stock, kept_mask, (0, pruned.config.pruner_layer), whole["attention_mask"], LAYERS):
        expected = stock(**whole, position_ids=where).logits[:, prompt - 1 : -1]
    assert (torch.stack(generated.logits, dim=1) - expected).abs().max() < 1e-4


# What LLaVA checkpoints may have beside those of the other tests: norms of queries and keys (Qwen3, OLMo 2), one
# projection for both (Phi-3), scaled embeddings (Gemma), scaled residuals (Granite).
OTHERS = {
    "gemma": (transformers.GemmaConfig, {"head_dim": 8, "tie_word_embeddings": False}),
    "granite": (transformers.GraniteConfig, {}),
    "olmo2": (transformers.Olmo2Config, {}),
    "phi3": (transformers.Phi3Config, {"sliding_window": None}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 8}),
}


@pytest.mark.parametrize("text", OTHERS)
def test_other_text_models(text):
    config_class, fields = OTHERS[text]
    base = tiny_config("llava")
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shared += ("num_key_value_heads", "max_position_embeddings", "initializer_range", "pad_token_id", "bos_token_id")
    base.text_config = config_class(**{name: getattr(base.text_config, name) for name in shared}, **fields)
    stock, pruned = tiny_pair("llava", config=base)
    inputs = build_inputs("llava", samples_of("mixed", "llava"))
    outputs = pruned(**inputs)
    expected = oracle_logits(stock, inputs, outputs.kept_mask, pruned.config.pruner_layer)
    rows = surviving(inputs, outputs)
    assert (outputs.logits - expected)[rows].abs().max() < 1e-4
    assert (stock(**inputs).logits - expected)[rows].abs().max() > 1e-2
