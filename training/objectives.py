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
from torch.nn import functional as F
from transformers import PreTrainedConfig

from learnpruner.cuts_learnpruner import Cut, LearnedScore, learnpruner_schedule
from learnpruner.scores_learnpruner import soft_top_k

# Weight of the squared budget error in the training loss, as in Dynamic-LLaVA (arXiv 2412.00876). The paper gives none.
BUDGET_WEIGHT = 100.0


@dataclass(unsafe_hash=True)
class ArgmaxGate(LearnedScore):
    """The paper's: forward the hard argmax over {drop, keep}, backward its softmax (straight-through).

    A dropped token gets the gradient that it would have with its keep probability as its gate. These gates do not sum
    to the budget: [`budget_loss`] asks for it.
    """

    def gate(self, scores: list[torch.Tensor], shares: list[float]) -> list[torch.Tensor]:
        return [score.sigmoid() for score in scores]

    def harden(self, gates: list[torch.Tensor], shares: list[float]) -> list[torch.Tensor]:
        return [gate > 0.5 for gate in gates]


@dataclass(unsafe_hash=True)
class TopKGate(LearnedScore):
    """An exact budget, differentiable: p = sigmoid(score / temperature + t), with t such that p sums to the budget
    (bisection; VisionSelector, arXiv 2510.16598).

    Args:
        temperature (`float`): Annealed towards 0, where p is the hard top-k.
    """

    temperature: float = 1.0

    def gate(self, scores: list[torch.Tensor], shares: list[float]) -> list[torch.Tensor]:
        return [soft_top_k(score / self.temperature, share * len(score)) for score, share in zip(scores, shares)]


@dataclass(unsafe_hash=True)
class HardTopKGate(TopKGate):
    """Forward the top-k itself, so that nothing leaks; backward the gates of [`TopKGate`] (straight-through): a dropped
    token gets the gradient that it would have with its probability as its gate.

    Scores are standardised per image first (mean 0, variance 1), so that a temperature means the same for all images.

    Args:
        hard (`bool`): Whether the forward is hard already; soft until then.
    """

    hard: bool = True

    def gate(self, scores: list[torch.Tensor], shares: list[float]) -> list[torch.Tensor]:
        return super().gate([F.layer_norm(score, score.shape) for score in scores], shares)

    def harden(self, gates: list[torch.Tensor], shares: list[float]) -> list[torch.Tensor] | None:
        if not self.hard:
            return None
        best = [
            gate.argsort(descending=True, stable=True)[: round(share * len(gate))] for gate, share in zip(gates, shares)
        ]
        return [torch.zeros_like(gate, dtype=torch.bool).index_fill(0, top, True) for gate, top in zip(gates, best)]


@dataclass(unsafe_hash=True)
class RecordedGate(LearnedScore):
    """Another gate. For each image `record` gets three numbers: the share it was to keep, the mean gate (of a hard one
    the share kept, with the gradient of its probabilities), and the mean entropy of the keep probabilities, in bits."""

    inner: ArgmaxGate | TopKGate
    record: list[torch.Tensor]

    def gate(self, scores: list[torch.Tensor], shares: list[float]) -> list[torch.Tensor]:
        gates = self.inner.gate(scores, shares)
        hard = self.inner.harden(gates, shares)
        for number, (gate, share) in enumerate(zip(gates, shares)):
            with torch.no_grad():
                entropy = (torch.special.entr(gate) + torch.special.entr(1 - gate)).mean() / math.log(2)
            mean = gate.mean() if hard is None else hard[number].float().mean() + gate.mean() - gate.mean().detach()
            self.record.append(torch.stack([torch.full_like(entropy, share), mean, entropy]))
        return gates

    def harden(self, gates: list[torch.Tensor], shares: list[float]) -> list[torch.Tensor] | None:
        return self.inner.harden(gates, shares)


def budget_loss(recorded: list[torch.Tensor]) -> torch.Tensor:
    """Squared error between each image's mean gate and its share, as [`RecordedGate`] noted them; [`BUDGET_WEIGHT`]
    times its mean over the images."""
    shares, means, _ = torch.stack(recorded).unbind(1)
    return BUDGET_WEIGHT * (means - shares).square().mean()


def with_gate(config: PreTrainedConfig, gate: LearnedScore, ratio: float | None = None) -> tuple[Cut, ...]:
    """LearnPruner's schedule at a ratio, its learned score replaced by one that gates in its own way."""
    return tuple(
        replace(cut, score=gate) if isinstance(cut.score, LearnedScore) else cut
        for cut in learnpruner_schedule(config, ratio)
    )
