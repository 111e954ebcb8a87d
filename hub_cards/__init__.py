# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Pruners on the Hub: pushing one with a card made of what was recorded of it, and verifying one before it runs."""

from .callback import PrunerHubCallback
from .push import Push, push_pruner
from .verify import Verified, verify

__all__ = ["PrunerHubCallback", "Push", "Verified", "push_pruner", "verify"]
