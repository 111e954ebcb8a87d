"""PrunerTrainer: the pruner learns and nothing else does, at every budget, and a killed run goes on."""

import pytest
import torch

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.budget_learnpruner import keep_counts
from learnpruner.training import PrunerTrainer, PrunerTrainingArguments

from tiny_models import LAYERS, build_inputs, tiny_pair

ANSWER = 4


def labelled(seed, samples):
    inputs = build_inputs("llava", samples, seed=seed, side="right")
    labels = inputs["input_ids"].clone()
    labels[:, :-ANSWER] = -100
    return {**inputs, "labels": labels.masked_fill(inputs["attention_mask"] == 0, -100)}


@pytest.fixture
def base(tmp_path):
    tiny_pair("llava")[0].save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trainer_for(base, folder, samples=((2, (32, 32), 8),), **settings):
    torch.manual_seed(0)
    model = LearnPrunerForConditionalGeneration.from_pretrained(base, pruner_ratio=0.2)
    data = [labelled(seed, [list(sample) for sample in samples]) for seed in range(8)]
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }

    def collate(rows):
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    arguments = PrunerTrainingArguments(output_dir=str(folder), **settings)
    return PrunerTrainer(model, arguments, collate, data, data[:2])


@pytest.mark.parametrize("objective", ["default", "paper"])
def test_only_the_pruner_learns(objective, base, tmp_path):
    trainer = trainer_for(base, tmp_path / "run", objective=objective)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".pruner." in name}
    assert trainer.model.config.pruner_trained
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(0 <= entry["gate_entropy"] <= 1 for entry in logs)
    assert (tmp_path / "run" / "checkpoint-6" / "model.safetensors").stat().st_size < 100_000
    if objective == "default":
        # Each step keeps exactly one of the budgets, and all of them come up.
        shares = {
            round(keep_counts(16, budget, num_layers=LAYERS, pruner_layer=2, stage_ratio=3.0)[0] / 16, 4)
            for budget in trainer.args.budgets
        }
        assert trainer.model.config.pruner_layer == 2
        assert {round(entry["keep_rate"], 4) for entry in logs} <= shares
        assert len({trainer_ratio(trainer, step) for step in range(40)}) == len(trainer.args.budgets)


def trainer_ratio(trainer, step):
    trainer.state.global_step = step
    return trainer.step_ratio()


def test_the_gate_anneals(base, tmp_path):
    trainer = trainer_for(base, tmp_path / "run", temperature=2.0, final_temperature=0.02)
    trainer.state.max_steps = 10
    temperatures = []
    for step in (0, 5, 10):
        trainer.state.global_step = step
        temperatures.append(trainer.make_gate().temperature)
    assert temperatures == pytest.approx([2.0, 0.2, 0.02])


def test_distillation_is_the_divergence_from_the_stock_model(base, tmp_path):
    trainer = trainer_for(base, tmp_path / "run")
    batch = labelled(0, [[2, (32, 32), 8], [1, (32, 32), 6]])
    model = trainer.model.train()
    logits = torch.randn(*batch["input_ids"].shape, model.config.text_config.vocab_size)
    stock = tiny_pair("llava")[0]
    with torch.no_grad():
        teacher = stock(**{name: value for name, value in batch.items() if name != "labels"}).logits
    expected, rows = 0.0, 0
    for row, column in (batch["labels"] != -100).nonzero().tolist():
        p, q = teacher[row, column - 1].softmax(-1), logits[row, column - 1].softmax(-1)
        expected += (p * (p / q).log()).sum().item()
        rows += 1
    assert trainer._distillation(model, batch, logits, None).item() == pytest.approx(expected / rows, rel=1e-4)
    assert trainer._distillation(model, batch, logits, 3 * rows).item() == pytest.approx(expected / rows / 3, rel=1e-4)


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_the_loss(weight, base, tmp_path):
    """Cross-entropy on the gated forward, plus the weighted divergence; the exact budget has no budget term."""
    trainer = trainer_for(base, tmp_path / "run", distillation=weight)
    batch = labelled(0, [[2, (32, 32), 8]])
    trainer.state.max_steps = 10
    loss, outputs = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
    teacher = tiny_pair("llava")[0](**{name: value for name, value in batch.items() if name != "labels"}).logits
    rows = batch["labels"][:, 1:] != -100
    student, teacher = outputs.logits[:, :-1][rows].softmax(-1), teacher[:, :-1][rows].softmax(-1)
    entropy = -student.log().gather(1, batch["labels"][:, 1:][rows].unsqueeze(1)).mean()
    divergence = (teacher * (teacher / student).log()).sum(1).mean()
    assert divergence > 1e-4
    assert loss.item() == pytest.approx((entropy + weight * divergence).item(), rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"label_smoothing_factor": 0.1}, "label_smoothing"), ({"seed": 3}, None)],
)
def test_what_it_cannot_train(settings, says, base, tmp_path):
    if says:
        with pytest.raises(ValueError, match=says):
            trainer_for(base, tmp_path / "run", **settings)
    with pytest.raises(ValueError, match="LearnPruner model"):
        PrunerTrainer(tiny_pair("llava")[0], PrunerTrainingArguments(output_dir=str(tmp_path)))


def test_another_run_is_not_continued(base, tmp_path):
    trainer_for(base, tmp_path / "run").train()
    for settings in ({"seed": 5}, {"objective": "paper"}, {"max_steps": 9}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            trainer_for(base, tmp_path / "run", **settings).train(resume_from_checkpoint=True)


def test_resume_gives_the_same_weights(base, tmp_path):
    whole = trainer_for(base, tmp_path / "run")
    whole.train()
    resumed = trainer_for(base, tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters()):
        assert torch.equal(one, other), name


def test_text_only_batches(base, tmp_path):
    trainer = trainer_for(base, tmp_path / "run", samples=((9,), (7,)))
    before = [parameter.clone() for parameter in trainer.model.model.pruner.parameters()]
    trainer.args.weight_decay = 0.0
    trainer.train()
    assert all(torch.equal(*pair) for pair in zip(before, trainer.model.model.pruner.parameters()))


def test_evaluation_cuts(base, tmp_path):
    trainer = trainer_for(base, tmp_path / "run")
    prediction = trainer.predict(trainer.eval_dataset)
    assert prediction.predictions.shape[:2] == prediction.label_ids.shape
    # Rows of dropped tokens are zeros.
    assert (prediction.predictions == 0).all(-1).any()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"objective": "guess"}, "objective"),
        ({"budgets": []}, "budgets"),
        ({"budgets": [0.5, 1.0]}, "budgets"),
        ({"distillation": -1.0}, "distillation"),
        ({"final_temperature": 2.0}, "final_temperature"),
        ({"final_temperature": 0.0}, "final_temperature"),
    ],
)
def test_bad_settings(settings, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        PrunerTrainingArguments(output_dir=str(tmp_path), **settings)
