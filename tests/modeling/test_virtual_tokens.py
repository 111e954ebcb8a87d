"""PEFT's virtual tokens (prefix tuning, prompt tuning, p-tuning): equal to a masked stock model with the same ones.

On the Qwen families prompt tuning and p-tuning have no M-RoPE positions, so a call that cuts is refused.
"""

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

from learnpruner.compat_learnpruner import CACHE

from oracles import masked
from tiny_models import (
    FAMILIES,
    LAYERS,
    LLAVA,
    NO_PLACEHOLDERS,
    QWEN,
    build_inputs,
    labelled,
    positions,
    samples_of,
    tiny_pair,
    with_answer,
)

VIRTUAL, NEW = 3, 5
SHARED = {"task_type": "CAUSAL_LM", "num_virtual_tokens": VIRTUAL}
KINDS = {
    "prefix": PrefixTuningConfig(**SHARED),
    "prompt": PromptTuningConfig(**SHARED),
    "p": PromptEncoderConfig(**SHARED, encoder_hidden_size=16),
}
RIGHT = [(family, kind) for family in FAMILIES for kind in KINDS if family in LLAVA or kind == "prefix"]
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **NO_PLACEHOLDERS}
PEFT_KNOWS_THE_CACHE = CACHE == "past_key_values"
# The name that PEFT 0.21 passes to the stock class, as well.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")


def tuned_pair(family, kind):
    """A stock model and a pruned one, both with the same virtual tokens."""
    pair = [get_peft_model(model.train(), KINDS[kind]) for model in tiny_pair(family, pruner_trained=True)]
    stock, pruned = pair
    torch.manual_seed(3)
    for parameter in pruned.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter)
    stock.prompt_encoder.load_state_dict(pruned.prompt_encoder.state_dict())
    return [model.eval() for model in pair]


def where(family, kind, stock, inputs, new=0):
    """Positions as `generate` has them: PEFT moves them behind a prefix, and takes them from other virtual tokens."""
    return {"position_ids": positions(family, stock.get_base_model(), inputs, new)} if kind == "prefix" else {}


def oracle(stock, pruned, kind, inputs, kept_mask, sequence, **arguments):
    """The tuned stock model at full length, the dropped tokens' keys hidden; `kept_mask` is of the first columns."""
    front = VIRTUAL if kind == "prefix" else 0  # the others are columns of the call
    behind = VIRTUAL + sequence - front - kept_mask[0].shape[1]
    kept = [torch.nn.functional.pad(each, (front, behind), value=True) for each in kept_mask]
    everything = torch.ones_like(kept[0])
    with masked(stock.get_base_model(), kept, (0, pruned.config.pruner_layer), everything, LAYERS):
        return stock(**inputs, **arguments)


@pytest.mark.parametrize(("family", "kind"), RIGHT)
@pytest.mark.parametrize("training", [False, True])
def test_forward_and_gradients(family, kind, training):
    """With a frozen pruner a training step cuts, too."""
    stock, pruned = tuned_pair(family, kind)
    stock.train(training)
    pruned.train(training)
    inputs = labelled(family, samples_of("one", family))
    given = where(family, kind, stock, inputs)
    with torch.enable_grad():
        found = pruned(**inputs, **given)
        assert found.kept_mask is not None
        expected = oracle(stock, pruned, kind, inputs, found.kept_mask, inputs["input_ids"].shape[1], **given)
        for outputs in (found, expected):
            outputs.loss.backward()
    text = inputs["labels"] != -100
    rows = found.logits.shape[1] - text.shape[1]
    assert (found.logits[:, rows:][text] - expected.logits[:, rows:][text]).abs().max() < 1e-4
    assert (found.loss - expected.loss).abs() < 1e-5
    for (name, own), other in zip(pruned.prompt_encoder.named_parameters(), stock.prompt_encoder.parameters()):
        assert other.grad.abs().max() > 0, name
        assert (own.grad - other.grad).abs().max() <= 1e-4 * other.grad.abs().max(), name


@pytest.mark.parametrize(("family", "kind"), RIGHT)
@pytest.mark.parametrize("batch", ["one", "padded"])
def test_generate(family, kind, batch):
    stock, pruned = tuned_pair(family, kind)
    inputs = build_inputs(family, samples_of(batch, family))
    output = pruned.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    kept_mask = output[CACHE].kept_mask
    whole = with_answer(inputs, output.sequences)
    given = where(family, kind, stock, inputs, NEW)
    logits = oracle(stock, pruned, kind, whole, kept_mask, output.sequences.shape[1], **given).logits[:, -NEW - 1 : -1]
    logits[..., NO_PLACEHOLDERS["suppress_tokens"]] = -torch.inf
    chosen = logits.gather(-1, output.sequences[:, -NEW:].unsqueeze(-1)).squeeze(-1)
    assert (logits.amax(-1) - chosen).max() < 1e-4
    beams = pruned.generate(**inputs, **GREEDY, num_beams=2, num_return_sequences=2)
    assert beams.shape == (2 * len(output.sequences), output.sequences.shape[1])


@pytest.mark.skipif(not PEFT_KNOWS_THE_CACHE, reason="PEFT 0.21 does not find a stock model's cache")
@pytest.mark.parametrize(("family", "kind"), RIGHT)
def test_generate_at_a_ratio_of_1(family, kind):
    stock, pruned = tuned_pair(family, kind)
    inputs = build_inputs(family, samples_of("padded", family))
    assert torch.equal(pruned.generate(**inputs, **GREEDY, pruner_ratio=1.0), stock.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("kind", ["prompt", "p"])
@pytest.mark.parametrize("types", [True, False])
def test_prompt_tuning_of_qwen_is_refused(family, kind, types):
    _, pruned = tuned_pair(family, kind)
    inputs = build_inputs(family, samples_of("one", family))
    if not types:
        del inputs["mm_token_type_ids"]
    with pytest.raises(ValueError, match=r"use LoRA.* pruner_ratio=1\.0"):
        pruned(**inputs)
    if types:
        with pytest.raises(ValueError, match=r"use LoRA.* pruner_ratio=1\.0"):
            pruned.generate(**inputs, **GREEDY)
    assert pruned(**inputs, pruner_ratio=1.0).logits.isfinite().all()


@pytest.mark.parametrize("family", QWEN)
def test_prefix_tuning_of_qwen_needs_positions(family):
    _, pruned = tuned_pair(family, "prefix")
    inputs = build_inputs(family, samples_of("one", family))
    with pytest.raises(ValueError, match=r"also of prefix tuning.*position_ids"):
        pruned(**inputs)


@pytest.mark.parametrize(("family", "kind"), RIGHT)
def test_beside_a_pruner_in_training(family, kind):
    """Gates weigh the prompt of a call, and a prefix is no part of it."""
    stock, pruned = tuned_pair(family, kind)
    pruned.get_base_model().model.pruner.requires_grad_(True)
    pruned.train()
    inputs = labelled(family, samples_of("one", family))
    given = where(family, kind, stock, inputs)
    with torch.enable_grad():
        if kind == "prefix":
            with pytest.raises(ValueError, match="prefix tuning"):
                pruned(**inputs, **given)
            return
        pruned(**inputs, **given).loss.backward()
    tuned = [*pruned.prompt_encoder.parameters(), pruned.get_base_model().model.pruner.output.weight]
    assert all(parameter.grad.abs().max() > 0 for parameter in tuned)
    assert pruned.get_base_model().config.pruner_trained
