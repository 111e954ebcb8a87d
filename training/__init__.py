# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Training of the pruner alone, its objectives, and the metrics that judge it."""

from .arguments import PrunerTrainingArguments
from .data import PrunerCollator, load_samples
from .metrics import METRICS
from .objectives import ArgmaxGate, TopKGate, with_gate
from .trainer import PrunerTrainer

__all__ = [
    "METRICS",
    "ArgmaxGate",
    "PrunerCollator",
    "PrunerTrainer",
    "PrunerTrainingArguments",
    "TopKGate",
    "load_samples",
    "with_gate",
]
