"""What a training step does not do twice, or in vain: the tower, the teacher, and logits that no label asks for."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.training import PrunerTrainer, PrunerTrainingArguments
from learnpruner.training.objectives import with_gate
from learnpruner.training.teacher import at_answers

from tiny_models import FAMILIES, QWEN, build_inputs, tiny_pair

pytestmark = pytest.mark.core


def trainer_for(family, folder, lora=None, **settings):
    tiny_pair(family)[0].save_pretrained(folder / "base")
    torch.manual_seed(0)
    model = LearnPrunerForConditionalGeneration.from_pretrained(folder / "base", pruner_ratio=0.2)
    model = model if lora is None else get_peft_model(model, lora)
    settings = {"budgets": [0.2], "report_to": [], "use_cpu": True, **settings}
    arguments = PrunerTrainingArguments(output_dir=str(folder / "run"), **settings)
    trainer = PrunerTrainer(model, arguments, lambda rows: rows[0], [{}])
    trainer.state.max_steps = 10
    trainer.model.train()
    return trainer


def batch_of(family, samples, answers):
    """A padded batch in which row i has labels on its last `answers[i]` tokens."""
    batch = build_inputs(family, samples, side="right")
    column, ends = torch.arange(batch["input_ids"].shape[1]), batch["attention_mask"].sum(1, keepdim=True)
    labelled = (column < ends) & (column >= ends - torch.tensor(answers).unsqueeze(1))
    return {**batch, "labels": batch["input_ids"].masked_fill(~labelled, -100)}


def images_of(family):
    return ((32, 32), (24, 48)) if family in QWEN else ((32, 32), (32, 32))


def mixed(family):
    """Two rows with images of which one is longer than the other, and text alone between them."""
    one, other = images_of(family)
    return batch_of(family, [[2, one, 8], [30], [1, other, 2, one, 6]], [3, 5, 1])


def watch(trainer, family):
    """Rows of each pass through the tower, the language model and the head."""
    core, seen = trainer._pruned.model, {"tower": [], "layers": [], "logits": []}
    tower = core.visual if family in QWEN else core.vision_tower
    tower.register_forward_pre_hook(lambda *_: seen["tower"].append(1))
    layer = core.language_model.layers[0]
    layer.register_forward_pre_hook(lambda _, given: seen["layers"].append(len(given[0])))
    trainer._pruned.lm_head.register_forward_hook(lambda _, given, logits: seen["logits"].append(tuple(logits.shape)))
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step(family, tmp_path):
    """The tower runs once, the teacher on the rows with images alone, and logits are made where a row has labels."""
    trainer, batch = trainer_for(family, tmp_path), mixed(family)
    seen = watch(trainer, family)
    trainer.compute_loss(trainer.model, batch)
    assert seen["tower"] == [1]
    assert seen["layers"] == [3, 2]  # the student, the teacher
    ends = batch["attention_mask"].sum(1).tolist()
    columns = {end - 1 - k for end, answers in zip(ends, (3, 5, 1)) for k in range(1, answers + 1)}
    vocabulary = trainer.model.config.text_config.vocab_size
    assert len(columns) < batch["input_ids"].shape[1] // 2
    assert seen["logits"] == [(3, len(columns), vocabulary), (2, len(columns), vocabulary)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_and_its_gradient_are_those_of_all_logits(family, tmp_path):
    """Cross-entropy and divergence as they are defined, with a tower, a teacher and logits for every row and token."""
    trainer, batch = trainer_for(family, tmp_path, distillation=0.7), mixed(family)
    gate = trainer.make_gate
    found = trainer.compute_loss(trainer.model, batch)
    found.backward()
    gradients = [parameter.grad.clone() for parameter in trainer.model.model.pruner.parameters()]
    trainer.model.zero_grad()
    model = trainer.model
    student = model(**batch, schedule=with_gate(model.config, gate(), trainer.step_ratio()))
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        teacher = model(**prompt, pruner_ratio=1.0).logits
    rows = batch["labels"][:, 1:] != -100
    logits = [values[:, :-1][rows].float().log_softmax(-1) for values in (student.logits, teacher)]
    expected = student.loss + 0.7 * F.kl_div(*logits, reduction="sum", log_target=True) / rows.sum()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert max(gradient.abs().max() for gradient in gradients) > 1e-4
    for gradient, parameter in zip(gradients, trainer.model.model.pruner.parameters()):
        assert (gradient - parameter.grad).abs().max() < 1e-4 * max(1.0, parameter.grad.abs().max())


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_texts_without_images_have_no_teacher(family, tmp_path):
    trainer = trainer_for(family, tmp_path)
    seen = watch(trainer, family)
    loss = trainer.compute_loss(trainer.model, batch_of(family, [[30], [20]], [3, 5]))
    loss.backward()
    assert seen["tower"] == []
    assert seen["layers"] == [2]
    plain = trainer_for(family, tmp_path, distillation=0.0)
    assert plain.compute_loss(plain.model, batch_of(family, [[30], [20]], [3, 5])).item() == loss.item()


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_the_papers_objective_has_no_teacher(family, tmp_path):
    trainer = trainer_for(family, tmp_path, objective="paper")
    seen = watch(trainer, family)
    trainer.compute_loss(trainer.model, mixed(family))
    assert (len(seen["tower"]), len(seen["layers"]), len(seen["logits"])) == (1, 1, 1)


def test_the_teacher_of_adapters(tmp_path):
    """It answers to text, too, which adapters change; and has its own tower where that is adapted."""
    language, both = r".*language_model.*\.q_proj", r".*\.q_proj"
    for modules, towers in ((language, 1), (both, 2)):
        lora = LoraConfig(r=2, target_modules=modules, modules_to_save=["pruner"])
        trainer = trainer_for("llava", tmp_path, lora)
        seen = watch(trainer, "llava")
        trainer.compute_loss(trainer.model, mixed("llava"))
        assert seen["tower"] == [1] * towers
        assert seen["layers"] == [3, 3]


def test_images_without_labels_are_taught_nothing(tmp_path):
    """Where max_length has cut the answer off, the teacher still gets every image of the batch, in its place."""
    trainer = trainer_for("llava", tmp_path)
    batch = batch_of("llava", [[2, (32, 32), 8], [1, (32, 32), 2, (32, 32), 6], [9]], [0, 2, 1])
    seen = watch(trainer, "llava")
    assert trainer.compute_loss(trainer.model, batch).isfinite()
    assert seen["layers"] == [3, 2]


def test_batches_without_any_label(tmp_path):
    """One of several accumulated batches may have none left, and asks for no logits; a data set must have labels."""
    trainer = trainer_for("llava", tmp_path)
    batch = batch_of("llava", [[2, (32, 32), 8], [9]], [0, 0])
    seen = watch(trainer, "llava")
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(7))
    loss.backward()
    assert loss.item() == 0
    assert [shape[:2] for shape in seen["logits"]] == [(2, 0), (1, 0)]
    with pytest.raises(ValueError, match="no labels"):
        trainer.compute_loss(trainer.model, {name: value for name, value in batch.items() if name != "labels"})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_at_its_answers_cuts_as_the_whole_call(family, tmp_path):
    """Where it cuts, the question alone ranks the tokens, as all labels would have it."""
    model, batch = trainer_for(family, tmp_path).model.eval(), mixed(family)
    model.config.pruner_trained = True
    with torch.no_grad():
        whole, part = model(**batch), model(**at_answers(batch))
    assert len(part.kept_mask) == 2
    assert all(torch.equal(one, other) for one, other in zip(whole.kept_mask, part.kept_mask))
    columns = at_answers(batch)["logits_to_keep"]
    assert (whole.logits[:, columns] - part.logits).abs().max() < 1e-5
    assert part.loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)
