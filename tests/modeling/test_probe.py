"""The probe: queries and keys of a layer on any attention backend, and a configuration read and written through."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from learnpruner import Cut, TextAttention
from learnpruner.attention_learnpruner import PROBE, ProbedConfig

from tiny_models import IMAGE, TEXT_MODELS, build_inputs, samples_of, tiny_pair

pytestmark = pytest.mark.core
TWO = pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
LAYER = 2


@pytest.mark.parametrize("batch", ["padded", "mixed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "text"), [pair for pair in TEXT_MODELS if pair[0] in ("llava", "qwen2_vl")])
def test_scores_are_the_attention_of_an_eager_model(family, text, attention, batch):
    """Two heads of queries share one of keys."""
    stock, model = tiny_pair(family, text=text, attention=attention)
    inputs = build_inputs(family, samples_of(batch, family))
    cut = Cut(LAYER, lambda tokens: tokens // 2, TextAttention("all"))
    (scores,) = model(**inputs, schedule=(cut,)).vision_scores
    stock.set_attn_implementation("eager")
    paid = stock(**inputs, output_attentions=True).attentions[LAYER - 1].mean(1)
    vision, valid, checked = inputs["input_ids"] == IMAGE, inputs["attention_mask"].bool(), 0
    assert torch.equal(scores.isnan(), ~vision)
    for row in range(len(vision)):
        texts = (valid & ~vision)[row].nonzero().flatten().tolist()
        for column in vision[row].nonzero().flatten().tolist():
            seen = [paid[row, text, column] for text in texts if text > column]
            assert scores[row, column] == pytest.approx((sum(seen) / len(seen)).item(), rel=1e-4)
            checked += 1
    assert checked > 20


KERNEL = "kernel_of_a_user"


@pytest.fixture
def kernel_calls():
    """A kernel under a user's own name that reads its module as flash functions do."""
    calls = []

    def kernel(module, query, key, value, attention_mask, **kwargs):
        assert module.config._attn_implementation == KERNEL
        assert module.config.hidden_size == 32
        assert module.is_causal is True
        assert module.training is False
        calls.append(module.layer_idx)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(KERNEL, kernel)
    AttentionMaskInterface.register(KERNEL, sdpa_mask)
    yield calls
    del AttentionInterface._global_mapping[KERNEL], AttentionMaskInterface._global_mapping[KERNEL]


@TWO
def test_a_kernel_reads_its_own_name(family, kernel_calls):
    stock, model = tiny_pair(family)
    inputs = build_inputs(family, samples_of("padded", family))
    expected, new = model(**inputs), {"max_new_tokens": 4, "do_sample": False}
    tokens = model.generate(**inputs, **new)
    model.model.language_model.set_attn_implementation(KERNEL)
    found = model(**inputs)
    assert kernel_calls == [0, 1, 2, 3]
    assert torch.equal(found.logits, expected.logits)
    assert all(torch.equal(*pair) for pair in zip(found.kept_mask, expected.kept_mask, strict=True))
    assert torch.equal(model.generate(**inputs, **new), tokens)
    stock.model.language_model.set_attn_implementation(KERNEL)
    assert torch.equal(model(**inputs, pruner_ratio=1.0).logits, stock(**inputs).logits)


@TWO
def test_a_configuration_reads_and_writes_through(family):
    _, model = tiny_pair(family)
    config, attention = model.config.text_config, model.model.language_model.layers[1].self_attn
    view = attention.config
    assert isinstance(view, ProbedConfig)
    assert view._attn_implementation == PROBE
    assert view.hidden_size == config.hidden_size == 32
    view.attention_dropout = 0.25
    assert config.attention_dropout == 0.25
    config.attention_dropout = 0.5
    assert view.attention_dropout == 0.5
    view._attn_implementation = "eager"
    assert config._attn_implementation == "eager"
    assert view._attn_implementation == PROBE
    assert view.to_dict() == config.to_dict()
    with pytest.raises(AttributeError):
        _ = view.no_such_field
    assert PROBE not in str(model.config)


class Bypass(torch.nn.Module):
    """Attention that does not ask transformers for its function."""

    def forward(self, hidden_states, **kwargs):
        return hidden_states, None


@TWO
def test_attention_past_the_probe(family):
    _, model = tiny_pair(family, pruner_layer=LAYER)
    inputs = build_inputs(family, samples_of("padded", family))
    layers = model.model.language_model.layers
    layers[LAYER - 1].self_attn = Bypass()
    with pytest.raises(RuntimeError, match="queries and keys"):
        model(**inputs, use_cache=False)


@pytest.mark.parametrize("name", ["s_aux", "softcap"])
def test_attention_that_a_score_cannot_follow(name):
    """What changes weights behind the product of queries and keys is refused, not ignored."""
    _, model = tiny_pair()
    inputs = build_inputs("llava", samples_of("one", "llava"))
    with pytest.raises(ValueError, match=name):
        model(**inputs, **{name: 1.0})
