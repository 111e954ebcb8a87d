"""The plain Trainer trains the pruner from the shipped forward, and nothing else."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import Trainer, TrainingArguments

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.cuts_learnpruner import LearnedScore, learnpruner_schedule

import oracles
from tiny_models import (
    FAMILIES,
    IMAGE,
    LAYERS,
    QWEN,
    VIDEO,
    build_inputs,
    image_tokens,
    labelled,
    row_alone,
    samples_of,
    tiny_pair,
)

pytestmark = pytest.mark.core
# What both Qwen families share with each other is tried on one of them.
ONE_OF_EACH = pytest.mark.parametrize("family", ["llava", "qwen2_vl"])


@pytest.fixture
def base(tmp_path, family):
    tiny_pair(family)[0].save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trainer_for(model, folder, family, **arguments):
    data = [labelled(family, [[2, (32, 32), 8]], seed=seed) for seed in range(8)]
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 12,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_steps": 6,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        **arguments,
    }

    def collate(rows):
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    return Trainer(
        model=model,
        args=TrainingArguments(str(folder), **settings),
        train_dataset=data,
        eval_dataset=data[:4],
        data_collator=collate,
    )


SHIFT = "model.pruner.output.bias"


def training_loss(model, trainer):
    """Mean loss of the training-mode forward over the whole training set."""
    model.train()
    with torch.no_grad():
        return sum(model(**row).loss.item() for row in trainer.train_dataset) / len(trainer.train_dataset)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_trainer(family, base, tmp_path):
    model = LearnPrunerForConditionalGeneration.from_pretrained(base, pruner_ratio=0.2).train_pruner_only()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_for(model, tmp_path / "run", family)
    loss_before = training_loss(model, trainer)
    trainer.train()
    assert training_loss(model, trainer) < loss_before
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    # The budget undoes a shift of all scores.
    assert changed | {SHIFT} == {name for name in before if ".pruner." in name}
    assert model.config.pruner_trained

    # Evaluation cuts for real, and its logits have the labels' length.
    prediction = trainer.predict(trainer.eval_dataset)
    assert prediction.predictions.shape[:2] == prediction.label_ids.shape
    # Rows of dropped tokens are zeros, in each sample, and no text row is.
    zeros = ~prediction.predictions.any(-1)
    assert zeros.any(1).all()
    assert not zeros.all(1).any()

    checkpoint = tmp_path / "run" / "checkpoint-12"
    loaded = LearnPrunerForConditionalGeneration.from_pretrained(checkpoint)
    assert loaded.config.pruner_trained
    inputs = build_inputs(family, samples_of("padded", family))
    assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)
    pruner = sum(parameter.numel() for parameter in model.model.pruner.parameters())
    assert (checkpoint / "model.safetensors").stat().st_size < 4 * pruner + 1000


@ONE_OF_EACH
def test_resume_gives_the_same_weights(family, base, tmp_path):
    def fresh():
        torch.manual_seed(0)
        return LearnPrunerForConditionalGeneration.from_pretrained(base, pruner_ratio=0.2).train_pruner_only()

    whole = trainer_for(fresh(), tmp_path / "whole", family)
    whole.train()
    resumed = trainer_for(fresh(), tmp_path / "whole", family)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters()):
        assert torch.equal(one, other), name


@ONE_OF_EACH
def test_best_model_at_end(family, base, tmp_path):
    model = LearnPrunerForConditionalGeneration.from_pretrained(base, pruner_ratio=0.2).train_pruner_only()
    trainer = trainer_for(
        model, tmp_path / "run", family, eval_strategy="steps", eval_steps=6, load_best_model_at_end=True
    )
    trainer.train()
    best = LearnPrunerForConditionalGeneration.from_pretrained(trainer.state.best_model_checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(best.parameters(), model.parameters()))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_forward(family, checkpointing, base):
    """Full length, nothing cut, gates that sum to the budget, cross-entropy; gradients in the pruner alone."""
    model = LearnPrunerForConditionalGeneration.from_pretrained(base, pruner_ratio=0.3).train_pruner_only()
    if checkpointing:
        name = "activation_checkpointing_enable"  # up to 5.22 the other
        getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
    batch = labelled(family, [[2, (32, 32), 8], [1, (32, 32), 3, (32, 32), 6], [9]])
    seen, read = [], []
    model.model.pruner.register_forward_pre_hook(lambda module, args: read.append(args[0].detach()))
    model.model.language_model.layers[-1].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    outputs = model(**batch)
    assert outputs.kept_mask is None
    assert seen[0][1] == batch["input_ids"].shape[1]
    assert not model.config.pruner_trained
    outputs.loss.backward()
    assert model.config.pruner_trained
    for name, parameter in model.named_parameters():
        trained = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert trained == (".pruner." in name) or name == SHIFT, name

    logits, targets = outputs.logits[:, :-1], batch["labels"][:, 1:]
    entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert outputs.loss.item() == pytest.approx(entropy.item(), rel=1e-5)
    # The first cut's count, by hand, of each image; structure is no patch.
    for image, size, gates in zip(read[-1], [image_tokens(family, 32, 32)] * 3, gates_of(model, batch)):
        first, _ = oracles.keep_counts(size, 0.3, LAYERS, model.config.pruner_layer, 3.0)
        assert len(gates) == int((~image[:size].isnan().any(-1)).sum())
        assert gates.sum().item() == pytest.approx(min(first, len(gates)), abs=1e-3)


def gates_of(model, batch, ratio=0.3):
    """The gates of each part of a batch."""
    gate = RecordedGates(0.1)
    cuts = learnpruner_schedule(model.config, ratio)
    with torch.no_grad():
        model(**batch, schedule=(replace(cuts[0], score=gate), *cuts[1:]))
    return gate.gates


class RecordedGates(LearnedScore):
    def gate(self, scores, shares):
        self.gates = super().gate(scores, shares)
        return self.gates


@pytest.mark.parametrize("per_frame", [True, False])
@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_the_budget_of_videos(family, per_frame, base):
    """One for each group of frames, or for each clip, beside those of images."""
    model = LearnPrunerForConditionalGeneration.from_pretrained(base, pruner_ratio=0.3, pruner_per_frame=per_frame)
    model.train_pruner_only()
    batch = labelled(family, [[2, (3, 24, 32), 8], [1, (16, 24), 3, (2, 32, 32), 6]])
    parts = [6] + ([12] * 3 + [16] * 2 if per_frame else [36, 32])
    gates = gates_of(model, batch)
    assert [len(gate) for gate in gates] == parts
    for gate, tokens in zip(gates, parts):
        first, _ = oracles.keep_counts(tokens, 0.3, LAYERS, model.config.pruner_layer, 3.0)
        assert gate.sum().item() == pytest.approx(first, abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_are_the_stock_model(family, base):
    stock, _ = tiny_pair(family)
    model = LearnPrunerForConditionalGeneration.from_pretrained(base, pruner_ratio=0.3).train_pruner_only()
    batch = labelled(family, [[2, (32, 32), 8], [5]])
    valid = batch["attention_mask"].bool()
    first, *_ = learnpruner_schedule(model.config, 0.3)
    opened = model(**batch, schedule=(replace(first, score=OpenGate(diversity=0.0)),)).logits
    assert (opened - stock(**batch).logits)[valid].abs().max() < 1e-5


class OpenGate(LearnedScore):
    def gate(self, scores, shares):
        return [torch.ones_like(score) for score in scores]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_closed_gates_are_the_cut(family, attention, base):
    """Training at gates of 0 and 1 is evaluation with the same tokens cut, for every row of text."""
    model = LearnPrunerForConditionalGeneration.from_pretrained(
        base, attn_implementation=attention, pruner_trained=True
    )
    images = [[2, (32, 32), 8], [1, (32, 32), 3, (32, 32), 6], [9]]
    batch = labelled(family, samples_of("image_and_video", family) if family in QWEN else images)
    first = learnpruner_schedule(model.config, 0.3)[0]
    hard = HardGate(diversity=0.0)
    cut = model.eval()(**batch, schedule=(replace(first, score=hard),))
    soft = model.train()(**batch, schedule=(replace(first, score=hard),))
    text = ~torch.isin(batch["input_ids"], torch.tensor([IMAGE, VIDEO])) & batch["attention_mask"].bool()
    if family == "llava_next":
        # Newlines are no patches: the cut drops them here, training leaves them open.
        assert (soft.logits - cut.logits)[2][text[2]].abs().max() < 1e-4
        return
    assert (soft.logits - cut.logits)[text].abs().max() < 1e-4
    unpruned = model.eval()(**batch, pruner_ratio=1.0)
    assert (unpruned.logits - cut.logits)[text].abs().max() > 1e-2


@dataclass(unsafe_hash=True)
class HardGate(LearnedScore):
    """The selection of evaluation without diversity, as gates."""

    def gate(self, scores, shares):
        kept = [round(share * len(score)) for score, share in zip(scores, shares)]
        return [(score >= score.topk(count).values[-1]).float() for score, count in zip(scores, kept)]


@ONE_OF_EACH
def test_training_needs_a_backend_that_weighs_keys(family, base):
    model = LearnPrunerForConditionalGeneration.from_pretrained(base).train_pruner_only()
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        model(**labelled(family, [[2, (32, 32), 8]]))


@ONE_OF_EACH
def test_text_only_batches_have_a_gradient(family, base):
    """Of zero, and through every layer: processes that share the layers wait for each other on the way back."""
    model = LearnPrunerForConditionalGeneration.from_pretrained(base).train_pruner_only()
    batch = labelled(family, [[9], [7]])
    seen = []
    for number, layer in enumerate(model.model.language_model.layers):
        layer.register_full_backward_hook(lambda *args, number=number: seen.append(number))
    loss = model(**batch).loss
    loss.backward()
    assert math.isfinite(loss.item())
    assert torch.equal(loss, tiny_pair(family)[0].train()(**batch).loss)
    assert sorted(seen) == list(range(LAYERS))
    assert all(not parameter.grad.any() for parameter in model.model.pruner.parameters())
    assert not model.config.pruner_trained


@ONE_OF_EACH
def test_accumulation_does_not_weigh_the_budget_twice(family, base):
    """Two micro-batches of half the items weigh like one batch of all."""
    model = LearnPrunerForConditionalGeneration.from_pretrained(base, pruner_ratio=0.3).train_pruner_only()
    samples = [[2, (32, 32), 8], [2, (32, 32), 8]]
    batch = labelled(family, samples)
    items = (batch["labels"][:, 1:] != -100).sum()
    together = model(**batch, num_items_in_batch=items).loss
    halves = sum(
        model(
            **row_alone(family, batch, samples, row)[0],
            labels=batch["labels"][row : row + 1],
            num_items_in_batch=items,
        ).loss
        for row in range(2)
    )
    assert halves.item() == pytest.approx(together.item(), rel=1e-4)
    assert model(**batch).loss.item() == pytest.approx(together.item(), rel=1e-4)
