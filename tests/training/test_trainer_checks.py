"""What PrunerTrainer refuses before the first step, and the first step that trains no pruner."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from learnpruner.training import PrunerTrainer, PrunerTrainingArguments

from tiny_models import labelled, tiny_pair

pytestmark = pytest.mark.core
LORA = LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["pruner"])


def trainer_of(model, folder, kind=PrunerTrainer, **settings):
    arguments = PrunerTrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    data = [labelled("llava", [[2, (32, 32), 8]], seed) for seed in range(2)]
    return kind(model, arguments, lambda rows: rows[0], data)


class LossOfItsOwn(PrunerTrainer):
    """Forgets the model's outputs."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return sum(parameter.square().sum() for name, parameter in model.named_parameters() if "lora" in name)


class Detached(PrunerTrainer):
    """Lets one part of the pruner have no share in the loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return self._pruned.model.pruner.output.bias.sum()


@pytest.mark.parametrize("kind", [LossOfItsOwn, Detached])
def test_the_first_step_without_a_gradient_is_an_error(kind, tmp_path):
    model = tiny_pair("llava")[1]
    wrapped = get_peft_model(model, LORA) if kind is LossOfItsOwn else model
    trainer = trainer_of(wrapped, tmp_path, kind)
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"(?s)gradient.*compute_loss"):
        trainer.train()
    assert all(value.equal(before[name]) for name, value in wrapped.state_dict().items())  # no step was made


def test_a_pruner_frozen_after_the_trainer_was_made(tmp_path):
    model = get_peft_model(tiny_pair("llava")[1], LORA)
    trainer = trainer_of(model, tmp_path)
    model.get_base_model().model.pruner.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"gradient.*frozen"):
        trainer.train()


@pytest.mark.parametrize("accumulated", [1, 2])
def test_text_alone_is_no_missing_gradient_of_a_step(accumulated, tmp_path):
    trainer = trainer_of(tiny_pair("llava")[1], tmp_path, gradient_accumulation_steps=accumulated)
    picture = labelled("llava", [[2, (32, 32), 8]])
    texts = [labelled("llava", [[9]], seed) for seed in range(2 * accumulated - 1)]
    trainer.train_dataset = [picture, *texts]
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("images", [False, True])
def test_a_run_in_which_nothing_is_to_be_cut(images, tmp_path):
    """Texts alone, or images so small that the first cut takes them whole: told at the end, and told again."""
    model = tiny_pair("llava", pruner_trained=False, pruner_min_tokens=1000 if images else 1)[1]
    trainer = trainer_of(model, tmp_path, save_strategy="steps", save_steps=1)
    if not images:
        trainer.train_dataset = [labelled("llava", [[9]], seed) for seed in range(4)]
    with pytest.raises(RuntimeError, match=r"nothing was trained: .*an image"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert not model.config.pruner_trained
    with pytest.raises(RuntimeError, match=r"nothing was trained: .*an image"):
        trainer.train(resume_from_checkpoint=True)
    assert not model.config.pruner_trained


def test_a_run_that_goes_on_with_texts_alone(tmp_path):
    """What its earlier steps learned counts."""
    trainer = trainer_of(tiny_pair("llava")[1], tmp_path, save_strategy="steps", save_steps=1)
    trainer.train_dataset = [labelled("llava", [[2, (32, 32), 8]]), labelled("llava", [[9]])]
    trainer.args.train_sampling_strategy = "sequential"
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("objective", ["default", "paper"])
def test_attention_that_gates_do_not_reach(objective, tmp_path):
    model = tiny_pair("llava")[1]
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"flex_attention.*attn_implementation='sdpa'"):
        trainer_of(model, tmp_path, objective=objective)


@pytest.mark.parametrize("lora", [False, True])
def test_the_papers_objective_in_float16(lora, tmp_path):
    """A dropped key's probability is 0 there, and so is its gradient."""

    def model(dtype=torch.float16):
        _, model = tiny_pair("llava", dtype=dtype)
        return get_peft_model(model, LORA) if lora else model

    with pytest.raises(ValueError, match=r"float16.*bf16"):
        trainer_of(model(), tmp_path, objective="paper")
    trainer_of(model(), tmp_path, objective="default")
    trainer_of(model(torch.bfloat16), tmp_path, objective="paper")
    trainer_of(model(), tmp_path, objective="paper", bf16=True)


def test_the_papers_objective_under_autocast_to_float16(tmp_path, monkeypatch):
    settings = {"objective": "paper", "report_to": [], "use_cpu": True}
    arguments = PrunerTrainingArguments(str(tmp_path), **settings)
    monkeypatch.setattr(arguments, "fp16", True)
    with pytest.raises(ValueError, match=r"float16.*bf16"):
        PrunerTrainer(tiny_pair("llava")[1], arguments)
