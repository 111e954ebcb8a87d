"""A text model whose loop adds features behind its first layers, and which norms queries and keys (Qwen3-VL)."""

import pytest
import torch
from transformers import DynamicCache, Qwen3VLTextConfig, Qwen3VLTextModel

from learnpruner import Cut, TextAttention
from learnpruner.compat_learnpruner import CACHE
from learnpruner.plan_learnpruner import Plan, PruningCall
from learnpruner.rows_learnpruner import install_hooks

from oracles import HIDDEN_KEYS

pytestmark = pytest.mark.core
LAYERS, SEQUENCE, DEEP = 4, 22, 3
# Each sample: padding on the left, then vision tokens from one column to another, then text.
SAMPLES = [(0, [(3, 14)]), (4, [(6, 12), (13, 19)])]
SCHEDULES = [(0, 2), (0,), (2,), (0, 1, 3)]


class ByPlace:
    """A score that needs no model: columns in an arbitrary order."""

    def __call__(self, state):
        return ((state.index * 7) % 11).float().masked_fill(~state.vision, torch.nan)

    def select(self, scores, state, counts):
        order = scores.masked_fill(~state.vision, -torch.inf).argsort(dim=1, descending=True, stable=True)
        return (order.argsort(dim=1) < counts.unsqueeze(1)) & state.vision


def text_models(seed=0):
    torch.manual_seed(seed)
    config = Qwen3VLTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    )
    stock = Qwen3VLTextModel(config).eval()
    for name, parameter in stock.named_parameters():
        if "norm" in name:  # of ones, they would not show where one is left out
            torch.nn.init.uniform_(parameter, 0.3, 2.0)
    hooked = Qwen3VLTextModel(config).eval()
    hooked.load_state_dict(stock.state_dict())
    install_hooks(hooked)
    return stock, hooked


def prompt(batch):
    samples = SAMPLES[:batch]
    vision, valid = (torch.zeros(batch, SEQUENCE, dtype=torch.bool) for _ in range(2))
    for row, (padding, images) in enumerate(samples):
        valid[row, padding:] = True
        for start, end in images:
            vision[row, start:end] = True
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "inputs_embeds": torch.randn(batch, SEQUENCE, 32, generator=generator),
        "attention_mask": valid.long(),
        "position_ids": (valid.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1),
        "visual_pos_masks": vision,
        "deepstack_visual_embeds": [2 * torch.randn(int(vision.sum()), 32, generator=generator) for _ in range(DEEP)],
    }
    return inputs, vision, valid


def planned(layers, vision, valid, score):
    """A call as the head would have planned it: each cut keeps half of what is left."""
    schedule = tuple(Cut(layer, lambda tokens: tokens // 2, score) for layer in layers)
    counts = []
    for row in range(len(vision)):
        left = [int(vision[row].sum())]
        for _ in layers:
            left.append(left[-1] // 2)
        counts.append([int((valid & ~vision)[row].sum()), *left])
    places = (torch.arange(SEQUENCE) * 5 % 13).float()
    scores = places.expand(len(vision), -1).masked_fill(~vision, torch.nan)
    order = scores.nan_to_num(-1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    kept = (order < torch.tensor(counts)[:, 2:3]) & vision
    call = PruningCall(schedule)
    call.plan = Plan(
        schedule, counts, vision, torch.full((len(vision),), SEQUENCE - 1), kept if layers[0] == 0 else vision, scores
    )
    return call


def oracle(stock, inputs, kept_mask, layers, valid):
    """The stock text model at full length, without the keys of dropped tokens."""
    stock.set_attn_implementation("masked_oracle")
    for layer in range(LAYERS):
        hidden = torch.zeros_like(valid)
        for kept, first in zip(kept_mask, layers, strict=True):
            hidden = ~kept & valid if layer >= first else hidden
        HIDDEN_KEYS.append(hidden)
    try:
        return stock(**inputs).last_hidden_state
    finally:
        HIDDEN_KEYS.clear()
        stock.set_attn_implementation("sdpa")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layers", SCHEDULES)
def test_deepstack_equals_its_masked_oracle(layers, batch, attention):
    stock, hooked = text_models()
    hooked.set_attn_implementation(attention)
    inputs, vision, valid = prompt(batch)
    call = planned(layers, vision, valid, ByPlace())
    outputs = hooked(**inputs, pruning=call)
    kept_mask = call.records()["kept_mask"]
    assert [kept.sum(1).tolist() for kept in kept_mask] == [
        call.plan.lengths(1 + step) for step in range(len(kept_mask))
    ]
    expected = oracle(stock, inputs, kept_mask, layers, valid)
    rows = kept_mask[-1]
    assert (outputs.last_hidden_state - expected)[rows].abs().max() < 1e-4
    # The proof can fail: what was dropped mattered, and so did what is added.
    assert (expected - stock(**inputs).last_hidden_state)[rows].abs().max() > 1e-2
    bare = {name: inputs[name] for name in ("inputs_embeds", "attention_mask", "position_ids")}
    assert (expected - oracle(stock, bare, kept_mask, layers, valid))[rows].abs().max() > 1e-2

    # Four tokens of an answer, on the cache.
    cache, answer = outputs[CACHE], torch.randn(batch, 4, 32)
    whole = {
        "inputs_embeds": torch.cat([inputs["inputs_embeds"], answer], dim=1),
        "attention_mask": torch.cat([valid, torch.ones(batch, 4, dtype=torch.bool)], dim=1).long(),
        "visual_pos_masks": torch.cat([vision, torch.zeros(batch, 4, dtype=torch.bool)], dim=1),
        "deepstack_visual_embeds": inputs["deepstack_visual_embeds"],
    }
    whole["position_ids"] = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
    steps = []
    for end in range(SEQUENCE + 1, SEQUENCE + 5):
        step = {name: whole[name][..., end - 1 : end] for name in ("position_ids",)}
        step["inputs_embeds"] = whole["inputs_embeds"][:, end - 1 : end]
        steps.append(hooked(**step, attention_mask=whole["attention_mask"][:, :end], **{CACHE: cache})[0])
    kept_mask = [torch.cat([kept, torch.ones(batch, 4, dtype=torch.bool)], dim=1) for kept in kept_mask]
    expected = oracle(stock, whole, kept_mask, layers, whole["attention_mask"].bool())
    assert (torch.cat(steps, dim=1) - expected[:, SEQUENCE:]).abs().max() < 1e-4


@pytest.mark.parametrize("batch", [1, 2])
def test_without_a_call_it_is_the_stock_model(batch):
    stock, hooked = text_models()
    inputs, _, _ = prompt(batch)
    assert torch.equal(hooked(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)


@pytest.mark.parametrize("batch", [1, 2])
def test_scores_are_those_of_normed_queries_and_keys(batch):
    """Without the norms they would be off by a fifth, and raise nothing."""
    stock, hooked = text_models()
    inputs, vision, valid = prompt(batch)
    call = planned((2,), vision, valid, TextAttention("all"))
    hooked(**inputs, pruning=call, **{CACHE: DynamicCache(config=hooked.config)})
    stock.set_attn_implementation("eager")
    attention = stock(**inputs, output_attentions=True).attentions[1].mean(1)
    for row in range(batch):
        texts = (valid & ~vision)[row].nonzero().flatten().tolist()
        for column in vision[row].nonzero().flatten().tolist():
            seen = [attention[row, text, column] for text in texts if text > column]
            assert call.records()["vision_scores"][0][row, column] == pytest.approx(
                (sum(seen) / len(seen)).item(), rel=1e-4
            )
