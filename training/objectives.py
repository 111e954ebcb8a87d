# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""How a pruner learns what to keep: gates that stand in for the first cut while the prompt stays whole.

A gate turns an image's scores into keep probabilities, which weigh its vision tokens in the shipped forward. It is a
[`LearnedScore`] of its own, so that a training step is an ordinary call with another schedule:

    model(**batch, schedule=with_gate(model.config, TopKGate(temperature=1.0), ratio))

The paper (LearnPruner, arXiv 2604.23950) gives a straight-through argmax over {drop, keep} and no budget term, no
schedule and no learning rate.
"""

import math
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig

from learnpruner.cuts_learnpruner import Cut, LearnedScore, learnpruner_schedule

BISECTIONS = 40


@dataclass(unsafe_hash=True)
class ArgmaxGate(LearnedScore):
    """The paper's: forward the hard argmax over {drop, keep}, backward its softmax (straight-through).

    A dropped token keeps a trace in the softmax (`GATE_FLOOR`), so that it still gets a gradient. The budget term of
    the shipped forward (Dynamic-LLaVA, arXiv 2412.00876) asks for the mean of these gates; that form is an assumption.
    """

    def gate(self, scores: list[torch.Tensor], shares: list[float]) -> list[torch.Tensor]:
        return [(score > 0).float() + (p - p.detach()) for score, p in zip(scores, self.soft(scores, shares))]

    def soft(self, scores: list[torch.Tensor], shares: list[float]) -> list[torch.Tensor]:
        return super().gate(scores, shares)


@dataclass(unsafe_hash=True)
class TopKGate(LearnedScore):
    """An exact budget, differentiable: p = sigmoid(score / temperature + t), with t such that p sums to the budget
    (bisection; VisionSelector, arXiv 2510.16598). The budget term of the shipped forward is then zero by itself.

    Args:
        temperature (`float`): Annealed towards 0, where p is the hard top-k.
    """

    temperature: float = 1.0

    def gate(self, scores: list[torch.Tensor], shares: list[float]) -> list[torch.Tensor]:
        return [soft_top_k(score / self.temperature, share * len(score)) for score, share in zip(scores, shares)]


@dataclass(unsafe_hash=True)
class RecordedGate(LearnedScore):
    """Another gate. For each image `record` gets three numbers: the share it was to keep, the mean gate, and the mean
    entropy of the keep probabilities, in bits."""

    inner: ArgmaxGate | TopKGate
    record: list[torch.Tensor]

    def gate(self, scores: list[torch.Tensor], shares: list[float]) -> list[torch.Tensor]:
        gates = self.inner.gate(scores, shares)
        with torch.no_grad():
            # Straight-through gates are hard; the others are probabilities themselves.
            hard = isinstance(self.inner, ArgmaxGate)
            for gate, soft, share in zip(gates, self.inner.soft(scores, shares) if hard else gates, shares):
                entropy = (torch.special.entr(soft) + torch.special.entr(1 - soft)).mean() / math.log(2)
                self.record.append(torch.stack([torch.full_like(entropy, share), gate.mean(), entropy]))
        return gates


def soft_top_k(scores: torch.Tensor, count: float) -> torch.Tensor:
    """Probabilities that sum to `count`, by one shift of all logits.

    Args:
        scores (`torch.Tensor` of shape `(tokens,)`, float32): Logits.
        count (`float`): In (0, tokens).

    Returns:
        `torch.Tensor` of shape `(tokens,)`, float32, differentiable in `scores`: raising one score lowers all other
        probabilities, for the shift depends on every score.
    """
    with torch.no_grad():
        # Between these two shifts every probability goes from below count / tokens to above it.
        middle = torch.logit(torch.tensor(count / len(scores), device=scores.device))
        low, high = middle - scores.max(), middle - scores.min()
        for _ in range(BISECTIONS):
            shift = (low + high) / 2
            above = torch.sigmoid(scores + shift).sum() > count
            low, high = torch.where(above, low, shift), torch.where(above, shift, high)
        probabilities = torch.sigmoid(scores + shift)
        slopes = probabilities * (1 - probabilities)
        weights = slopes / slopes.sum().clamp_min(torch.finfo(scores.dtype).tiny)
    # The implicit derivative of the shift: the value is left as it is, its gradient is -weights.
    shift = shift - (weights * (scores - scores.detach())).sum()
    return torch.sigmoid(scores + shift)


def with_gate(config: PreTrainedConfig, gate: LearnedScore, ratio: float | None = None) -> tuple[Cut, ...]:
    """LearnPruner's schedule at a ratio, its learned score replaced by one that gates in its own way."""
    return tuple(
        replace(cut, score=gate) if isinstance(cut.score, LearnedScore) else cut
        for cut in learnpruner_schedule(config, ratio)
    )
