"""PrunerTrainer: the pruner learns and nothing else does, at every budget, and a killed run goes on."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.budget_learnpruner import keep_counts
from learnpruner.cuts_learnpruner import LearnedScore
from learnpruner.training import PrunerTrainer, PrunerTrainingArguments
from learnpruner.training.command import installed_setting
from learnpruner.training.teacher import at_answers

from tiny_models import FAMILIES, LAYERS, QWEN, labelled, row_alone, tiny_pair

pytestmark = pytest.mark.core
# What both Qwen families share with each other is tried on one of them.
ONE_OF_EACH = pytest.mark.parametrize("family", ["llava", "qwen2_vl"])


@pytest.fixture
def family():
    return "llava"


@pytest.fixture
def base(tmp_path, family):
    tiny_pair(family)[0].save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trainer_for(base, folder, samples=((2, (32, 32), 8),), family="llava", fields=None, **settings):
    torch.manual_seed(0)
    model = LearnPrunerForConditionalGeneration.from_pretrained(base, pruner_ratio=0.2, **(fields or {}))
    data = [labelled(family, [list(sample) for sample in samples], seed) for seed in range(8)]
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


@pytest.mark.parametrize("objective", ["default", "hard", "paper"])
def test_only_the_pruner_learns(objective, base, tmp_path):
    trainer = trainer_for(base, tmp_path / "run", objective=objective)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    # An exact budget undoes what shifts all scores alike: the last bias has no gradient but rounding.
    idle = {"model.pruner.output.bias"} if objective != "paper" else set()
    assert changed | idle == {name for name in before if ".pruner." in name}
    assert trainer.model.config.pruner_trained
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(0 <= entry["gate_entropy"] <= 1 for entry in logs)
    assert (tmp_path / "run" / "checkpoint-6" / "model.safetensors").stat().st_size < 100_000
    if objective != "paper":
        # Each step keeps exactly one of the budgets, and all of them come up.
        shares = {
            round(keep_counts(16, budget, num_layers=LAYERS, pruner_layer=2, stage_ratio=3.0)[0] / 16, 4)
            for budget in trainer.args.budgets
        }
        assert trainer.model.config.pruner_layer == 2
        assert {round(entry["keep_rate"], 4) for entry in logs} <= shares
        assert len({trainer_ratio(trainer, step) for step in range(40)}) == len(trainer.args.budgets)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llava"])
def test_other_families(family, base, tmp_path):
    """LLaVA-NeXT: rows that are structure are no patches, and images of several crops. Qwen: sizes as they come."""
    size = (32, 64) if family in QWEN else (30, 60)
    trainer = trainer_for(base, tmp_path / "run", samples=((2, size, 8),), family=family)
    before = trainer.model.model.pruner.hidden.weight.clone()
    trainer.train()
    assert not torch.equal(trainer.model.model.pruner.hidden.weight, before)
    shares = [entry["keep_rate"] for entry in trainer.state.log_history if "keep_rate" in entry]
    assert len(shares) == 6
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("per_frame", [True, False])
@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_videos(family, per_frame, base, tmp_path):
    """What has a budget of its own is gated for itself: a group of frames, or a clip."""
    samples, fields = ((2, (3, 24, 32), 1, (32, 32), 8),), {"pruner_per_frame": per_frame}
    trainer = trainer_for(base, tmp_path / "run", samples, family, fields, max_steps=2)
    gated = []
    trainer.make_gate = lambda make=trainer.make_gate: Counted(0.0, make(), gated)
    before = trainer.model.model.pruner.hidden.weight.clone()
    trainer.train()
    assert not torch.equal(trainer.model.model.pruner.hidden.weight, before)
    # In a batch of two the images come first.
    assert gated == [[16] * 2 + ([12] * 6 if per_frame else [36] * 2)] * 2
    assert trainer.evaluate()["eval_loss"] > 0


@dataclass(unsafe_hash=True)
class Counted(LearnedScore):
    """Another gate, and how many tokens each of its images has."""

    inner: LearnedScore
    sizes: list

    def gate(self, scores, shares):
        self.sizes.append([len(score) for score in scores])
        return self.inner.gate(scores, shares)


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
    batch = labelled("llava", [[2, (32, 32), 8], [1, (32, 32), 6]])
    model, call = trainer.model.train(), at_answers(batch)
    logits = torch.randn(*batch["input_ids"].shape, model.config.text_config.vocab_size)
    kept = logits[:, call["logits_to_keep"]]
    stock = tiny_pair("llava")[0]
    with torch.no_grad():
        teacher = stock(**{name: value for name, value in batch.items() if name != "labels"}).logits
    expected, rows = 0.0, 0
    for row, column in (batch["labels"] != -100).nonzero().tolist():
        p, q = teacher[row, column - 1].softmax(-1), logits[row, column - 1].softmax(-1)
        expected += (p * (p / q).log()).sum().item()
        rows += 1
    for items, divided in ((None, rows), (3 * rows, 3 * rows)):
        found = trainer._distillation(model, call, kept, None, items)
        assert found.item() == pytest.approx(expected / divided, rel=1e-4)


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_the_loss(weight, base, tmp_path):
    """Cross-entropy on the gated forward, plus the weighted divergence; the exact budget has no budget term."""
    trainer = trainer_for(base, tmp_path / "run", distillation=weight)
    batch = labelled("llava", [[2, (32, 32), 8]])
    trainer.state.max_steps = 10
    loss, outputs = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
    teacher = tiny_pair("llava")[0](**{name: value for name, value in batch.items() if name != "labels"}).logits
    rows = batch["labels"][:, 1:] != -100
    own = rows[:, at_answers(batch)["logits_to_keep"]]
    student, teacher = outputs.logits[own].softmax(-1), teacher[:, :-1][rows].softmax(-1)
    entropy = -student.log().gather(1, batch["labels"][:, 1:][rows].unsqueeze(1)).mean()
    divergence = (teacher * (teacher / student).log()).sum(1).mean()
    assert divergence > 1e-4
    assert loss.item() == pytest.approx((entropy + weight * divergence).item(), rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing"),
        ({"budgets": [0.9]}, "drops nothing"),
        ({"objective": "paper", "budgets": [0.9]}, None),
    ],
)
def test_what_it_cannot_train(settings, says, base, tmp_path):
    if says is None:
        trainer_for(base, tmp_path / "run", **settings)
        return
    with pytest.raises(ValueError, match=says):
        trainer_for(base, tmp_path / "run", **settings)


def test_models_and_losses_it_cannot_train(base, tmp_path, monkeypatch):
    arguments = PrunerTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="LearnPruner model"):
        PrunerTrainer(tiny_pair("llava")[0], arguments)
    model = LearnPrunerForConditionalGeneration.from_pretrained(base)
    with pytest.raises(ValueError, match="compute_loss_func"):
        PrunerTrainer(model, arguments, compute_loss_func=lambda *_: 0)
    monkeypatch.setattr(PrunerTrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="accelerate launch"):
        PrunerTrainer(model, arguments)
    monkeypatch.undo()
    model.config.pruner_ratio = 1.0
    with pytest.raises(ValueError, match="drops nothing"):
        PrunerTrainer(model, PrunerTrainingArguments(output_dir=str(tmp_path), objective="paper", report_to=[]))


def test_another_run_is_not_continued(base, tmp_path):
    trainer_for(base, tmp_path / "run").train()
    last = str(tmp_path / "run" / "checkpoint-6")
    for settings in (
        {"seed": 5},
        {"objective": "paper"},
        {"max_steps": 9},
        {"learning_rate": 1e-3},
        {"budgets": [0.2]},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            trainer_for(base, tmp_path / "run", **settings).train(resume_from_checkpoint=True)
        with pytest.raises(ValueError, match=next(iter(settings))):
            trainer_for(base, tmp_path / "elsewhere", **settings).train(resume_from_checkpoint=last)
    other = tmp_path / "other"
    base.rename(other)
    with pytest.raises(ValueError, match=r"another run \(base"):
        trainer_for(other, tmp_path / "run").train(resume_from_checkpoint=True)


@ONE_OF_EACH
def test_resume_gives_the_same_weights(family, base, tmp_path):
    whole = trainer_for(base, tmp_path / "run", family=family)
    whole.train()
    resumed = trainer_for(base, tmp_path / "run", family=family)
    # Had it begun anew, it would end elsewhere.
    torch.nn.init.normal_(resumed.model.model.pruner.hidden.weight)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters()):
        assert torch.equal(one, other), name


def test_a_checkpoint_that_was_being_written_is_passed_over(base, tmp_path):
    whole = trainer_for(base, tmp_path / "run")
    whole.train()
    (tmp_path / "run" / "checkpoint-6" / "pruner_run.json").unlink()
    resumed = trainer_for(base, tmp_path / "run")
    torch.nn.init.normal_(resumed.model.model.pruner.hidden.weight)
    output = resumed.train(resume_from_checkpoint=True)
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters()):
        assert torch.equal(one, other), name
    # What the run cost is what all of its starts took.
    before = json.loads((tmp_path / "run" / "checkpoint-3" / "pruner_run.json").read_text())["seconds"]
    assert output.metrics["seconds"] > before > 0
    (tmp_path / "run" / "checkpoint-6" / "pruner_run.json").unlink()
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    with pytest.raises(ValueError, match="no checkpoint"):
        trainer_for(base, tmp_path / "empty").train(resume_from_checkpoint=True)


@ONE_OF_EACH
def test_text_only_batches(family, base, tmp_path):
    trainer = trainer_for(base, tmp_path / "run", samples=((9,), (7,)), family=family)
    before = [parameter.clone() for parameter in trainer.model.model.pruner.parameters()]
    trainer.args.weight_decay = 0.0
    with pytest.raises(RuntimeError, match="nothing was trained"):
        trainer.train()
    assert trainer.state.global_step == 6
    assert all(torch.equal(*pair) for pair in zip(before, trainer.model.model.pruner.parameters()))


@pytest.mark.parametrize(
    ("objective", "ratios"), [("default", ["1", "0.2", "0.1"]), ("hard", ["1", "0.2", "0.1"]), ("paper", ["1", "0.2"])]
)
def test_accuracy_is_asked_at_each_budget(objective, ratios, base, tmp_path):
    """Of the paper's objective, which learns at the configuration's ratio alone, there."""
    trainer = trainer_for(base, tmp_path / "run", objective=objective, budgets=[0.1, 0.2])
    assert list(trainer.accuracy_at_budgets()) == ratios


def test_evaluation_cuts(base, tmp_path):
    """Accuracy is that of the pruned model, and an answer is right when all of its tokens are."""
    trainer = trainer_for(base, tmp_path / "run")
    model, data = trainer.model.eval(), trainer.eval_dataset
    for ratio in (0.2, 1.0):
        right = []
        for number, row in enumerate(data):
            prompt = {name: value for name, value in row.items() if name != "labels"}
            place = row["labels"] != -100
            with torch.no_grad():
                said = model(**prompt, pruner_ratio=ratio, query_mask=place.cumsum(1) == 0).logits.argmax(-1)
            if ratio == 0.2 and number == 0:
                # Only the pruned model gives this answer, so a metric that did not cut would be found out.
                data[0]["labels"][place] = said[:, :-1][place[:, 1:]]
                row = data[0]
            right.append(bool((said[:, :-1][place[:, 1:]] == row["labels"][place]).all()))
        model.config.pruner_ratio = ratio
        assert trainer.evaluate()["eval_accuracy"] == sum(right) / len(right)
        assert right == ([True, False] if ratio == 0.2 else [False, False])


@ONE_OF_EACH
def test_the_best_is_kept_by_accuracy(family, base, tmp_path, monkeypatch):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    trainer = trainer_for(base, tmp_path / "run", family=family, max_steps=4, **settings)
    said = iter([0.25, 0.75, 0.75, 0.5])
    monkeypatch.setattr(trainer, "compute_metrics", lambda prediction: {"accuracy": next(said)})
    trainer.train()
    assert trainer.state.best_metric == 0.75
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    last = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    state = trainer.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in best.items())
    assert not all(torch.equal(state[name], value) for name, value in last.items())


def test_foreground_recall(base, tmp_path):
    """Of the tokens in boxes, how many the first cut keeps: logged in training, reported by evaluation."""
    trainer = trainer_for(base, tmp_path / "run", budgets=[0.3], max_steps=1)
    model = trainer.model
    generator = torch.Generator().manual_seed(0)
    for row in trainer.train_dataset:
        vision = row["input_ids"] == model.config.image_token_id
        row["foreground"] = vision & (torch.rand(vision.shape, generator=generator) < 0.4)
    assert trainer.eval_dataset[0] is trainer.train_dataset[0]

    def by_hand(rows, ratio):
        kept = known = 0
        for row in rows:
            inputs = {name: value for name, value in row.items() if name != "foreground"}
            with torch.no_grad():
                mask = model.eval()(**inputs, pruner_ratio=ratio).kept_mask[0]
            kept, known = kept + (mask & row["foreground"]).sum().item(), known + row["foreground"].sum().item()
        return kept / known

    assert trainer.evaluate()["eval_foreground_recall"] == pytest.approx(by_hand(trainer.eval_dataset, 0.2))
    # Diversity is for inference: in training the score alone says what would be kept.
    model.config.pruner_diversity = 0.0
    (batch,) = [[trainer.train_dataset[number] for number in next(iter(trainer.get_train_dataloader().batch_sampler))]]
    expected = by_hand(batch, 0.3)
    trainer.train()
    (logged,) = [entry["foreground_recall"] for entry in trainer.state.log_history if "foreground_recall" in entry]
    assert 0 < logged < 1
    assert logged == pytest.approx(expected)


@pytest.mark.parametrize("poison", ["pixel_values", None])
def test_a_loss_that_is_no_number_stops(poison, base, tmp_path):
    trainer = trainer_for(base, tmp_path / "run")
    if poison:
        for row in trainer.train_dataset:
            row[poison] = torch.full_like(row[poison], torch.inf)
    else:
        torch.nn.init.constant_(trainer.model.model.pruner.output.weight, torch.nan)
    with pytest.raises(FloatingPointError, match=r"step 0.*batch-of-step-0-0\.pt"):
        trainer.train()
    batch = torch.load(tmp_path / "run" / "batch-of-step-0-0.pt")
    assert {"input_ids", "pixel_values", "labels"} <= set(batch)


def test_a_frozen_base_drops_nothing_out_and_checkpoints_its_layers(base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["attention_dropout"] = config["vision_config"]["attention_dropout"] = 0.5
    (base / "config.json").write_text(json.dumps(config))
    trainer = trainer_for(base, tmp_path / "run", **{installed_setting("gradient_checkpointing"): True})
    batch = labelled("llava", [[2, (32, 32), 8]])
    trainer.state.max_steps = 10
    name = "activation_checkpointing_enable"  # up to 5.22 the other
    getattr(trainer.model, name if hasattr(trainer.model, name) else "gradient_checkpointing_enable")()
    losses = [trainer.compute_loss(trainer.model.train(), batch).item() for _ in range(2)]
    assert losses[0] == losses[1]
    calls = []
    layer = trainer.model.model.language_model.layers[1]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer.compute_loss(trainer.model, batch).backward()
    # The teacher's, the student's, and the student's again on the way back.
    assert len(calls) == 3
    # A base that is trained, too, keeps its dropout.
    trainer.model.requires_grad_(True).train()
    assert layer.self_attn.training


@pytest.mark.parametrize("setting", ["gradient_checkpointing", "bf16", "gradient_accumulation_steps"])
def test_stock_settings(setting, base, tmp_path):
    value = 2 if setting == "gradient_accumulation_steps" else True
    trainer = trainer_for(base, tmp_path / "run", **{installed_setting(setting): value})
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    output = trainer.train()
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".pruner." in name}
    assert output.metrics["trained_parameters"] == sum(before[name].numel() for name in changed)
    assert output.metrics["peak_memory_bytes"] > 1e8


@pytest.mark.parametrize(("family", "objective"), [("llava", "default"), ("llava", "paper"), ("qwen2_vl", "paper")])
def test_accumulated_batches_are_one_batch(family, objective, base, tmp_path):
    """Also where one of them has more answer tokens than the other. By plain gradient descent: Adam would make much of
    rounding."""
    settings = {"objective": objective, "optim": "sgd", "learning_rate": 0.1, "weight_decay": 0.0}
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    weights = []
    for name, batches in (("whole", {}), ("parts", parts)):
        trainer = trainer_for(base, tmp_path / name, family=family, **settings, **batches)
        for number, row in enumerate(trainer.train_dataset):
            row["labels"][:, : -1 - 3 * (number % 2)] = -100
        start = trainer.model.model.pruner.hidden.weight.clone()
        trainer.train()
        weights.append(trainer.model.model.pruner.state_dict())
        assert (weights[-1]["hidden.weight"] - start).abs().max() > 1e-4
    for name, value in weights[0].items():
        assert (value - weights[1][name]).abs().max() < 1e-5, name


@pytest.mark.parametrize(
    ("family", "samples", "fields"),
    [
        ("llava", [[2, (32, 32), 8], [1, (32, 32), 2, (32, 32), 1, (32, 32), 6]], {}),
        ("qwen2_vl", [[2, (32, 32), 8], [1, (24, 48), 2, (56, 32), 1, (16, 16), 6]], {}),
        ("qwen2_5_vl", [[2, (3, 24, 32), 8], [1, (32, 32), 6]], {}),
        ("qwen2_5_vl", [[2, (3, 24, 32), 1, (24, 32), 8], [1, (2, 32, 32), 6]], {"pruner_per_frame": False}),
    ],
)
def test_accumulated_budgets_weigh_by_images(family, samples, fields, base, tmp_path):
    """Not by rows, of which one has more images, or groups of frames, than the other."""
    trainer = trainer_for(base, tmp_path / "run", family=family, fields=fields, objective="paper")
    whole = labelled(family, samples)
    column, ends = torch.arange(whole["labels"].shape[1]), whole["attention_mask"].sum(1, keepdim=True)
    whole["labels"] = whole["input_ids"].masked_fill((column < ends - 4) | (column >= ends), -100)
    halves = []
    for row in range(2):
        half, valid = row_alone(family, whole, samples, row)
        halves.append({**half, "labels": whole["labels"][row : row + 1, valid]})
    losses = []
    for batches in ([whole], halves):
        batches, items = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
        model = trainer.model.train()
        losses.append(sum(trainer.compute_loss(model, batch, num_items_in_batch=items).item() for batch in batches))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    # The halves' budgets are not the same, so that their weights show.
    terms = [trainer.model(**half).loss.item() for half in halves]
    assert abs(terms[0] - terms[1]) > 1e-2 * losses[0]


def test_tensorboard(base, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer_for(base, tmp_path / "run", report_to=["tensorboard"], max_steps=2).train()
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    reader = accumulator.EventAccumulator(str(events))
    reader.Reload()
    tags = set(reader.Tags()["tensors"]) | set(reader.Tags()["scalars"])
    assert {"train/keep_rate", "train/gate_entropy", "train/loss"} <= tags


def test_no_samples(base, tmp_path):
    model = LearnPrunerForConditionalGeneration.from_pretrained(base)
    arguments = PrunerTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="train data set has no samples"):
        PrunerTrainer(model, arguments, train_dataset=[])


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
