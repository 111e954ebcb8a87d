"""Gates: exact budgets, right gradients, and a training step that is an ordinary call."""

import pytest
import torch

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.budget_learnpruner import keep_counts
from learnpruner.scores_learnpruner import soft_top_k
from learnpruner.training.objectives import (
    ArgmaxGate,
    HardTopKGate,
    RecordedGate,
    TopKGate,
    budget_loss,
    with_gate,
)

from tiny_models import FAMILIES, LAYERS, build_inputs, samples_of, tiny_pair


@pytest.mark.parametrize("count", [1, 7, 7.3, 49])
@pytest.mark.parametrize("scale", [0.01, 1, 50])
def test_soft_top_k_is_exact(count, scale):
    scores = scale * torch.randn(50, generator=torch.Generator().manual_seed(0))
    probabilities = soft_top_k(scores, count)
    assert probabilities.sum().item() == pytest.approx(count, abs=1e-3)
    assert torch.equal(probabilities.argsort(), scores.argsort()) or scale == 50  # those at 0 and 1 tie
    assert ((probabilities >= 0) & (probabilities <= 1)).all()


def test_soft_top_k_gradient():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(20, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(20, generator=generator, dtype=torch.float64)
    (soft_top_k(scores, 4.0) * weight).sum().backward()
    step = 1e-4 * torch.eye(20, dtype=torch.float64)
    with torch.no_grad():
        values = [[(soft_top_k(scores + sign * row, 4.0) * weight).sum() for sign in (1, -1)] for row in step]
    numeric = torch.tensor([(up - down) / 2e-4 for up, down in values])
    assert torch.allclose(scores.grad, numeric, atol=1e-5)
    assert scores.grad.abs().max() > 0.01
    # The budget is fixed: pushing all scores alike changes nothing.
    assert scores.grad.sum().abs() < 1e-9


def test_soft_top_k_anneals_to_the_hard_one():
    scores = torch.randn(50, generator=torch.Generator().manual_seed(2))
    (probabilities,) = TopKGate(diversity=0, temperature=1e-3).gate([scores], [7 / 50])
    hard = torch.zeros(50).scatter(0, scores.topk(7).indices, 1.0)
    assert torch.allclose(probabilities, hard, atol=1e-2)


def test_argmax_gate():
    scores = torch.tensor([-1.0, 0.5, 3.0], requires_grad=True)
    score = ArgmaxGate(diversity=0)
    (gates,) = score.gate([scores], [1 / 3])
    (hard,) = score.harden([gates], [1 / 3])
    assert hard.tolist() == [False, True, True]
    gates.sum().backward()
    soft = scores.detach().sigmoid()
    assert torch.allclose(scores.grad, soft * (1 - soft))


def test_the_budget_term():
    """By hand: of two images, one of hard gates and one of soft ones; its gradient goes through the probabilities."""
    scores = [torch.tensor([-1.0, 0.5, 3.0, 2.0], requires_grad=True), torch.tensor([1.0, 0.1], requires_grad=True)]
    shares, noted = [0.5, 0.5], []
    RecordedGate(0.0, ArgmaxGate(diversity=0), noted).gate(scores, shares)
    loss = budget_loss(noted)
    assert loss.item() == pytest.approx(100 * ((3 / 4 - 0.5) ** 2 + (2 / 2 - 0.5) ** 2) / 2)
    loss.backward()
    for score, error, size in zip(scores, (0.25, 0.5), (4, 2)):
        soft = score.detach().sigmoid()
        assert torch.allclose(score.grad, 100 / 2 * 2 * error / size * soft * (1 - soft))
    noted.clear()
    RecordedGate(0.0, TopKGate(diversity=0), noted).gate(scores, shares)
    assert budget_loss(noted).item() < 1e-6


HARD = HardTopKGate(diversity=0.1, temperature=0.5)


@pytest.mark.parametrize("gate", [ArgmaxGate(diversity=0.1), TopKGate(diversity=0.1, temperature=0.5), HARD])
def test_a_training_step_is_an_ordinary_call(gate, tmp_path):
    tiny_pair("llava")[0].save_pretrained(tmp_path)
    model = LearnPrunerForConditionalGeneration.from_pretrained(tmp_path, pruner_ratio=0.5).train_pruner_only()
    batch = build_inputs("llava", [[2, (32, 32), 8], [9]], side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :-4] = -100
    seen = []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["pruning"]), with_kwargs=True)
    schedule = with_gate(model.config, gate, ratio=0.25)
    assert [cut.layer for cut in schedule] == [0, model.config.pruner_layer]
    loss = model(**batch, labels=labels, schedule=schedule).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if isinstance(gate, TopKGate) and name.endswith("pruner.output.bias"):
            # It shifts all scores alike, which an exact budget undoes.
            assert parameter.grad.abs().max() < 1e-5
            continue
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (".pruner." in name), name
    (call,) = seen
    # Text is never gated.
    vision = batch["input_ids"] == model.config.image_token_id
    assert (call.plan.gates[~vision] == 1).all()
    gates = call.plan.gates[vision]
    first, _ = keep_counts(len(gates), 0.25, num_layers=LAYERS, pruner_layer=model.config.pruner_layer, stage_ratio=3.0)
    if isinstance(gate, TopKGate):
        assert gates.sum().item() == pytest.approx(first, abs=1e-3)
        assert (call.plan.hard is not None) == (gate is HARD)
        assert gate is not HARD or int(call.plan.hard[vision].sum()) == first
    else:
        assert torch.equal(call.plan.hard[vision], gates > 0.5)
        assert call.plan.hard[~vision].all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_hard_gates_are_of_standardised_scores(scale):
    """So that the scale of an image's scores and their mean change nothing."""
    scores = torch.randn(50, generator=torch.Generator().manual_seed(0))
    score = HardTopKGate(diversity=0.0, temperature=0.3)
    (gates,), (other,) = score.gate([scores], [0.14]), score.gate([100 * scale + 30 * scale * scores], [0.14])
    assert torch.allclose(gates, other, atol=0.02)
    assert gates.sum().item() == pytest.approx(7, abs=1e-3)
    (hard,) = score.harden([gates], [0.14])
    assert set(hard.nonzero().flatten().tolist()) == set(scores.topk(7).indices.tolist())
    assert HardTopKGate(0.0, 0.3, hard=False).harden([gates], [0.14]) is None


def test_scores_that_are_all_equal_have_finite_gradients():
    scores = torch.full((9,), 0.3, requires_grad=True)
    (gates,) = HardTopKGate(diversity=0.0).gate([scores], [1 / 3])
    (gates * torch.arange(9)).sum().backward()
    assert scores.grad.isfinite().all()
    assert HardTopKGate(0.0).harden([gates], [1 / 3])[0].sum() == 3


class Noted(HardTopKGate):
    """Lets a test look into the scores of each image, its gates, what they stand for, and their gradients."""

    def gate(self, scores, shares):
        self.scores, self.gates = scores, super().gate(scores, shares)
        for tensor in (*scores, *self.gates) if torch.is_grad_enabled() else ():
            tensor.retain_grad()
        return self.gates

    def harden(self, gates, shares):
        self.hard = super().harden(gates, shares)
        return self.hard


@pytest.mark.parametrize("temperature", [0.5, 0.1])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hard_forward_is_the_first_cut_and_dropped_tokens_have_a_bounded_gradient(family, attention, temperature):
    _, model = tiny_pair(family, attention=attention)
    # Attention whose logits lie far apart, through which the gradient of a dropped key could be of any size.
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.weight.data.mul_(5)
    inputs = build_inputs(family, samples_of("mixed", family), side="right")
    columns = inputs["attention_mask"].cumsum(1)
    answer = (columns > columns.amax(1, keepdim=True) - 3) & inputs["attention_mask"].bool()
    inputs["labels"] = inputs["input_ids"].masked_fill(~answer, -100)
    gate = Noted(0.0, temperature)
    schedule = with_gate(model.config, gate, ratio=0.25)
    with torch.no_grad():
        cut = model(**inputs, schedule=schedule[:1])
        unpruned = model(**inputs, pruner_ratio=1.0)
    outputs = model.train_pruner_only()(**inputs, schedule=schedule)
    text = (model.model.vision_kinds(inputs["input_ids"], None) == 0) & inputs["attention_mask"].bool()
    assert (outputs.logits - cut.logits)[text].abs().max() < 1e-4
    assert (unpruned.logits - cut.logits)[text].abs().max() > 1e-2

    outputs.loss.backward()
    for score, probability, hard in zip(gate.scores, gate.gates, gate.hard):
        assert 0 < hard.sum() < len(hard)
        assert probability.grad[~hard].all()
        assert score.grad[~hard].any()
        assert score.grad.norm() < 10
    assert all(parameter.grad.norm() < 1e3 for parameter in model.model.pruner.parameters())
