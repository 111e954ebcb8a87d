"""Training in which no labels reach the forward: a pruner that is to be trained is trained on every path."""

import gc
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.compat_learnpruner import CACHE
from learnpruner.methods import METHODS

from tiny_models import FAMILIES, LAYERS, LLAVA, NO_PLACEHOLDERS, build_inputs, labelled, samples_of, tiny_pair

pytestmark = pytest.mark.core
TWO = pytest.mark.parametrize("family", ["llava", "qwen2_vl"])


def trained(family, **fields):
    _, model = tiny_pair(family, pruner_trained=False, **fields)
    return model.train_pruner_only()


def pruner_gradient(model):
    grads = [parameter.grad for name, parameter in model.named_parameters() if ".pruner." in name]
    return None if any(grad is None for grad in grads) else torch.cat([grad.flatten() for grad in grads])


@pytest.fixture(autouse=True)
def _listen(caplog):
    """Each test hears a warning that is said once."""
    logging.Logger.warning_once.cache_clear()
    caplog.set_level("WARNING")


@pytest.mark.parametrize("place", ["head", "model"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_loss_of_ones_own(family, place):
    """From logits, and from the hidden states of the model without its head."""
    model = trained(family)
    inputs = build_inputs(family, samples_of("mixed", family))
    called = model if place == "head" else model.model
    outputs = called(**inputs)
    values = outputs.logits if place == "head" else outputs.last_hidden_state
    assert outputs.kept_mask is None  # nothing was cut
    assert values.shape[1] == inputs["input_ids"].shape[1]
    assert not model.config.pruner_trained
    values[inputs["attention_mask"].bool()].square().mean().backward()
    assert pruner_gradient(model).abs().max() > 0
    assert model.config.pruner_trained
    model.zero_grad()
    # The same as with labels, but for the loss.
    again = model(**inputs, labels=inputs["input_ids"])
    if place == "head":
        assert torch.equal(again.logits, values)


@TWO
def test_gradients_enabled_or_not_the_model_is_the_same(family):
    """Old and new passes of a reinforcement learner."""
    model = trained(family)
    inputs = build_inputs(family, samples_of("mixed", family))
    new = model(**inputs).logits
    with torch.no_grad():
        old = model(**inputs).logits
    assert torch.equal(old, new)
    assert not torch.equal(old, model.eval()(**inputs).logits)


@TWO
def test_generate_cuts_in_training(family):
    model = trained(family)
    inputs = build_inputs(family, samples_of("padded", family))
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, **NO_PLACEHOLDERS}
    found = model.generate(**inputs, **options)
    expected = model.eval().generate(**inputs, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found[CACHE].kept_mask, expected[CACHE].kept_mask, strict=True):
        assert torch.equal(one, other)
        assert not one.all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_pruner_cuts(family):
    """And gradients flow through the rows that stay, as in evaluation mode."""
    _, model = tiny_pair(family)
    model.model.pruner.requires_grad_(False)
    batch = labelled(family, samples_of("mixed", family))
    loss = {}
    for mode in (True, False):
        model.train(mode).zero_grad()
        outputs = model(**batch)
        assert len(outputs.kept_mask) == 2
        outputs.loss.backward()
        loss[mode] = outputs.loss.item(), model.lm_head.weight.grad.clone()
    assert loss[True][0] == loss[False][0]
    assert torch.equal(loss[True][1], loss[False][1])
    assert model.lm_head.weight.grad.any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ["ratio 1", "text alone"])
def test_where_nothing_is_gated_the_stock_model_runs(family, case):
    """The pruner has a gradient of zeros all the same, so that processes and optimizers find one."""
    stock, _ = tiny_pair(family)
    model = trained(family)
    batch = "padded" if case == "ratio 1" else "text"
    samples = samples_of(batch, family) if case == "ratio 1" else [[9], [5]]
    inputs = build_inputs(family, samples)
    outputs = model(**inputs, pruner_ratio=1.0) if case == "ratio 1" else model(**inputs)
    with torch.no_grad():
        assert torch.equal(outputs.logits, stock(**inputs).logits)
    outputs.logits.sum().backward()
    assert not pruner_gradient(model).any()
    assert not model.config.pruner_trained


@TWO
def test_every_layer_takes_part_in_a_batch_of_text(family):
    model = trained(family)
    passed = []
    for number, layer in enumerate(model.model.language_model.layers):
        layer.register_full_backward_hook(lambda *_, number=number: passed.append(number))
    model(**build_inputs(family, [[9], [5]])).logits.sum().backward()
    assert sorted(passed) == list(range(LAYERS))


@TWO
def test_an_adapter_switched_off_is_the_same_kind_of_model(family):
    """The reference of preference training is gated as the policy is."""
    _, model = tiny_pair(family, pruner_trained=False)
    config = LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["pruner"])
    policy = get_peft_model(model, config).train()
    inputs = build_inputs(family, samples_of("padded", family))
    found = policy(**inputs).logits
    with policy.disable_adapter(), torch.no_grad():
        reference = policy(**inputs)
    assert reference.kept_mask is None
    assert torch.equal(reference.logits, found)  # an adapter begins as nothing
    found.sum().backward()
    assert model.config.pruner_trained


def test_a_cache_of_a_gated_prompt_is_not_made():
    """A step on it would be neither gated nor cut."""
    model = trained("llava")
    inputs = build_inputs("llava", samples_of("padded", "llava"))
    assert model(**inputs).get(CACHE) is None
    with torch.no_grad():
        assert model(**inputs, use_cache=True).get(CACHE) is None
        assert model.eval()(**inputs)[CACHE].get_seq_length() == inputs["input_ids"].shape[1]


@TWO
@pytest.mark.parametrize("lora", ["modules_to_save", "of its own layers"])
def test_a_reference_with_gradients(family, lora):
    """As the policy, whose pruner is trained or frozen, in front of it or behind."""
    _, model = tiny_pair(family, pruner_trained=True)
    options = {"target_modules": r".*language_model.*q_proj", "modules_to_save": ["pruner"]}
    if lora != "modules_to_save":
        options = {"target_modules": r".*(q_proj|pruner\.hidden)"}
    policy = get_peft_model(model, LoraConfig(**options)).train()
    inputs = build_inputs(family, samples_of("padded", family))
    with policy.disable_adapter():
        reference = policy(**inputs)
    assert reference.kept_mask is None
    assert torch.equal(policy(**inputs).logits, reference.logits)
    model.model.pruner.requires_grad_(False)
    found = policy(**inputs)
    with policy.disable_adapter():
        reference = policy(**inputs)
    assert reference.kept_mask
    assert torch.equal(found.logits, reference.logits)


@TWO
@pytest.mark.parametrize("targets", ["all-linear", r".*pruner\.output"])
def test_adapters_on_the_layers_of_an_untrained_pruner_are_refused(family, targets):
    """They would be trained over random weights, which are not saved."""
    _, model = tiny_pair(family, pruner_trained=False)
    inputs = build_inputs(family, samples_of("padded", family))
    with pytest.raises(ValueError, match="modules_to_save"):
        get_peft_model(model, LoraConfig(target_modules=targets)).train()(**inputs)


@TWO
def test_a_model_that_is_gone_before_its_backward_pass(family):
    model = trained(family)
    config, inputs = model.config, build_inputs(family, samples_of("padded", family))
    loss = model(**inputs).logits.square().mean()
    del model
    gc.collect()
    loss.backward()
    assert config.pruner_trained


def test_a_pruner_without_parameters_of_its_own():
    """As FSDP1 flattens them: cutting in silence would train nothing."""
    model = trained("llava")
    model.model.pruner.parameters = lambda recurse=True: iter(())
    inputs = build_inputs("llava", samples_of("padded", "llava"))
    with pytest.raises(ValueError, match="use_orig_params=True"):
        model(**inputs)
    assert model.eval()(**inputs).kept_mask


def replica_of(module):
    """As `torch.nn.parallel.replicate` makes one: no parameters, and their values as attributes that have a history."""
    copies = {one: one._replicate_for_data_parallel() for one in module.modules()}
    for one, copied in copies.items():
        for name, child in one._modules.items():
            copied._modules[name] = None if child is None else copies[child]
            setattr(copied, name, copied._modules[name])
        for name, parameter in one._parameters.items():
            setattr(copied, name, None if parameter is None else parameter * 1)
    return copies[module]


@pytest.mark.parametrize("family", LLAVA)  # stock Qwen asks its replicas for a precision, which is one of parameters
def test_a_training_step_of_a_replica(family):
    model = trained(family)
    for samples in (samples_of("padded", family), [[9], [5]]):
        inputs = build_inputs(family, samples)
        model.zero_grad()
        model(**inputs).logits.square().mean().backward()
        expected = pruner_gradient(model)
        model.zero_grad()
        replica = replica_of(model)
        assert not list(replica.parameters())
        replica(**inputs).logits.square().mean().backward()
        assert torch.allclose(pruner_gradient(model), expected)
    assert model.config.pruner_trained


def test_a_replica_of_data_parallel():
    """It has no parameters of its own: the model that it was made of says whether it trains."""
    model = trained("llava")
    inputs = build_inputs("llava", samples_of("padded", "llava"))
    for frozen in (False, True):
        model.model.pruner.requires_grad_(not frozen)
        replica = model.model._replicate_for_data_parallel()
        pruner = model.model.pruner._replicate_for_data_parallel()
        pruner.parameters = lambda recurse=True: iter(())
        replica._modules["pruner"] = pruner
        for name, child in model.model.pruner.named_modules():
            if name:
                pruner._modules[name] = child
        assert replica.trains_pruner() == (not frozen)
    model.model.pruner.requires_grad_(True)
    assert model(**inputs).kept_mask is None


def trainer_of(model, folder, family, peft=False, **options):
    loss = options.pop("compute_loss_func", None)
    settings = TrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=1,
        learning_rate=0.01,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    rows = [labelled(family, [[2, (32, 32), 8]], seed=seed) for seed in range(4)]
    return Trainer(model, settings, train_dataset=rows, data_collator=lambda rows: rows[0], compute_loss_func=loss)


def own_loss(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


SMOOTHING, OWN_LOSS = {"label_smoothing_factor": 0.1}, {"compute_loss_func": own_loss}


@pytest.mark.parametrize(
    ("family", "lora", "option"),
    [
        *((family, False, SMOOTHING) for family in FAMILIES),
        *((family, True, OWN_LOSS) for family in FAMILIES),
        ("llava", True, SMOOTHING),
        ("llava", False, OWN_LOSS),
    ],
)
def test_the_plain_trainer_takes_the_labels_away(family, lora, option, tmp_path):
    model = trained(family)
    wrapped = model
    if lora:
        config = LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["pruner"])
        wrapped = get_peft_model(model, config)
    before = {name: value.clone() for name, value in wrapped.named_parameters() if value.requires_grad}
    trainer_of(wrapped, tmp_path, family, **option).train()
    moved = {name for name, value in wrapped.named_parameters() if name in before and not value.equal(before[name])}
    assert any("pruner" in name for name in moved)
    assert any("lora" in name for name in moved) == lora
    assert model.config.pruner_trained


@TWO
def test_a_pruner_without_a_gradient_is_told(family, caplog):
    """Not at the first call, whose loss may be to come; as soon as one is sure never to bring any."""
    _, model = tiny_pair(family, pruner_trained=False)
    model.train()
    inputs = build_inputs(family, samples_of("padded", family))

    def step(loss_of):
        outputs = model(**inputs)
        loss_of(outputs).backward()

    def elsewhere(outputs):
        return model.lm_head.weight.square().sum()

    step(elsewhere)
    gc.collect()
    assert "gave it no gradient" not in caplog.text
    step(elsewhere)
    assert "gave it no gradient" in caplog.text
    assert not model.config.pruner_trained


@TWO
def test_accumulated_losses_are_no_missing_gradient(family, caplog):
    model = trained(family)
    inputs = build_inputs(family, samples_of("padded", family))
    losses = [model(**inputs).logits.square().mean() for _ in range(3)]
    sum(losses).backward()
    with torch.no_grad():
        model(**inputs)
    model(**inputs)
    gc.collect()
    model(**inputs)  # the one before is gone, but gradients came before
    assert "gave it no gradient" not in caplog.text
    assert model.config.pruner_trained


@TWO
def test_a_schedule_without_a_learned_cut_cannot_train(family):
    model = trained(family)
    inputs = build_inputs(family, samples_of("padded", family))
    for method in ("random", "fastv"):
        method = METHODS[method](ratio=0.5)
        with pytest.raises(ValueError, match="no learned cut"):
            model(**inputs, schedule=method)
        with method(model), pytest.raises(ValueError, match="no learned cut"):
            model(**inputs)
    assert model.eval()(**inputs, schedule=METHODS["random"](ratio=0.5)).kept_mask
    model.train().model.pruner.requires_grad_(False)
    assert model(**inputs, schedule=METHODS["random"](ratio=0.5)).kept_mask


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_answer_in_one_forward(family, caplog):
    """By query_mask or labels they are scored as generate has them; without, it is said that they may not be."""
    _, model = tiny_pair(family, pruner_ratio=0.2)
    inputs = build_inputs(family, samples_of("one", family))
    with torch.no_grad():
        options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        answer = model.generate(**inputs, **options, **NO_PLACEHOLDERS)
        assert "choose its own evidence" not in caplog.text
        length, sequence = inputs["input_ids"].shape[1], answer.sequences
        whole = {**inputs, "input_ids": sequence, "attention_mask": torch.ones_like(sequence)}
        if "mm_token_type_ids" in whole:
            whole["mm_token_type_ids"] = F.pad(whole["mm_token_type_ids"], (0, 6))
        query = torch.arange(sequence.shape[1]).expand_as(sequence) < length
        labels = sequence.masked_fill(query, -100)
        wrote = torch.stack(answer.logits, dim=1)
        for how in ({"query_mask": query}, {"labels": labels}):
            scored = model(**whole, **how).logits[:, length - 1 : -1]
            assert (scored - wrote).abs().max() < 1e-4
        assert "choose its own evidence" not in caplog.text
        model(**whole)
        assert caplog.text.count("choose its own evidence") == 1
        for quiet in ({"pruner_ratio": 1.0}, {"schedule": METHODS["random"](ratio=0.5)}):
            caplog.clear()
            model(**whole, **quiet)
            assert "choose its own evidence" not in caplog.text


def test_a_checkpoint_says_that_it_is_trained(tmp_path):
    tiny_pair("llava")[0].save_pretrained(tmp_path / "base")
    model = LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "base").train_pruner_only()
    model(**build_inputs("llava", samples_of("one", "llava"))).logits.mean().backward()
    model.save_pretrained(tmp_path / "pruner")
    assert LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "pruner").config.pruner_trained
