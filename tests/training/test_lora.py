"""Adapters on the language model, and the pruner with them, by peft."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch._dynamo.eval_frame import OptimizedModule

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.training import PrunerTrainer, PrunerTrainingArguments
from learnpruner.training.command import installed_setting
from learnpruner.training.teacher import at_answers

from tiny_models import labelled, tiny_pair

pytestmark = pytest.mark.core
LORA = LoraConfig(
    r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)", lora_dropout=0.1, modules_to_save=["pruner"]
)


@pytest.fixture
def family():
    return "llava"


@pytest.fixture
def base(tmp_path, family):
    tiny_pair(family)[0].save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trainer_for(base, folder, lora=LORA, family="llava", **settings):
    torch.manual_seed(0)
    model = get_peft_model(LearnPrunerForConditionalGeneration.from_pretrained(base, pruner_ratio=0.2), lora)
    settings = {"max_steps": 4, "save_steps": 2, "learning_rate": 5e-3, **settings}
    arguments = PrunerTrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=1, logging_steps=1, report_to=[], use_cpu=True, **settings
    )
    data = [labelled(family, [[2, (32, 32), 8]], seed) for seed in range(4)]
    return PrunerTrainer(model, arguments, lambda rows: rows[0], data, data[:2])


@pytest.mark.parametrize(("family", "objective"), [("llava", "default"), ("llava", "paper"), ("qwen2_vl", "default")])
def test_adapters_and_pruner_learn_together(family, objective, base, tmp_path):
    trainer = trainer_for(
        base,
        tmp_path / "run",
        family=family,
        objective=objective,
        **{installed_setting("gradient_checkpointing"): True},
    )
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    pruner = {name for name in before if ".pruner.modules_to_save." in name}
    assert changed == pruner | {name for name in before if ".lora_" in name}
    assert trainer.evaluate()["eval_accuracy"] >= 0

    # The checkpoint is an adapter that holds both.
    last = tmp_path / "run" / "checkpoint-4"
    saved = load_file(last / "adapter_model.safetensors")
    assert any("lora_A" in name for name in saved)
    assert sum("pruner" in name for name in saved) == len(pruner)
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    assert (last / "adapter_model.safetensors").stat().st_size < 4 * trained + 10_000
    trainer.model.eval()
    batch = {name: value for name, value in labelled(family, [[2, (32, 32), 8]], seed=9).items() if name != "labels"}
    fresh = LearnPrunerForConditionalGeneration.from_pretrained(base, pruner_ratio=0.2)
    opened = PeftModel.from_pretrained(fresh, last).eval()
    with torch.no_grad():
        expected = trainer.model(**batch)
        assert expected.kept_mask[0].sum() < batch["input_ids"].numel()
        assert (opened(**batch).logits - expected.logits).abs().max() < 1e-5

        # Merged, it is one checkpoint without peft.
        trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
        assert merged.config.pruner_trained
        assert (merged(**batch).logits - expected.logits).abs().max() < 1e-4
    generated = opened.generate(**batch, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, merged.generate(**batch, max_new_tokens=3, do_sample=False))


def test_compiled_it_trains_the_same(base, tmp_path, monkeypatch):
    """By the argument of `Trainer`, which wraps the adapters' model."""
    still = LoraConfig(target_modules=LORA.target_modules, modules_to_save=["pruner"])  # without dropout
    # Where the argument would stay.
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    found = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = trainer_for(base, tmp_path / f"run{len(found)}", still, max_steps=2, **settings)
        trainer.train()
        assert isinstance(trainer.model_wrapped, OptimizedModule) == bool(settings)
        found.append([parameter.detach() for parameter in trainer.model.parameters() if parameter.requires_grad])
    start = [p for p in trainer_for(base, tmp_path / "start", still).model.parameters() if p.requires_grad]
    assert any((one - other).abs().max() > 1e-3 for one, other in zip(start, found[0]))
    assert all((one - other).abs().max() < 1e-5 for one, other in zip(*found))


def test_the_teacher_is_the_base_without_adapters(base, tmp_path):
    trainer = trainer_for(base, tmp_path / "run")
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    batch = labelled("llava", [[2, (32, 32), 8]])
    stock = tiny_pair("llava")[0]
    with torch.no_grad():
        logits = stock(**{name: value for name, value in batch.items() if name != "labels"}).logits
        call = at_answers(batch)
        logits = logits[:, call["logits_to_keep"]]
        found = trainer._distillation(trainer.model.train(), call, logits, None, None)
        assert found.item() == pytest.approx(0, abs=1e-5)


def test_resume_gives_the_same_adapters(base, tmp_path):
    whole, resumed = (trainer_for(base, tmp_path / "run") for _ in range(2))
    for name, parameter in resumed.model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.normal_(parameter)  # had it begun anew, it would end elsewhere
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters()):
        assert torch.equal(one, other), name


def test_another_base_is_not_adapted_further(base, tmp_path):
    trainer_for(base, tmp_path / "run").train()
    base.rename(tmp_path / "other")
    with pytest.raises(ValueError, match=r"another run \(base"):
        trainer_for(tmp_path / "other", tmp_path / "run").train(resume_from_checkpoint=True)


def test_adapters_over_a_trained_pruner_are_merged_in_full(base, tmp_path):
    """A pruner alone on the old base would lose what the adapters learned."""
    pruner = LearnPrunerForConditionalGeneration.from_pretrained(base).train_pruner_only()
    pruner.save_pretrained(tmp_path / "pruner")
    trainer = trainer_for(tmp_path / "pruner", tmp_path / "run")
    trainer.train()
    batch = {name: value for name, value in labelled("llava", [[2, (32, 32), 8]]).items() if name != "labels"}
    merged = trainer.model.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "merged")
    opened = LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert (opened(**batch).logits - merged(**batch).logits).abs().max() < 1e-5


def test_adapters_that_leave_the_pruner_out(base, tmp_path):
    with pytest.raises(ValueError, match="modules_to_save"):
        trainer_for(base, tmp_path / "run", LoraConfig(target_modules=["q_proj"]))
