# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Runs that are killed and go on, and runs that are finished: what is written down of them, and compared."""

import json
import os
from dataclasses import replace
from pathlib import Path

from torch import nn
from transformers import TrainerCallback

from learnpruner.hub_learnpruner import RELATIVE, HubMixin, find_base

# In each checkpoint, written last: what run it is of.
RUN_FILE = "pruner_run.json"
# Beside the finished pruner, written last: settings, cost and log.
RECORD = "training.json"


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters a model has, and how many of them are trained."""
    parameters = [*model.parameters()]
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint in a folder: one that was being written when the run was killed is passed over."""
    found = [path.parent for path in Path(folder).glob(f"checkpoint-*/{RUN_FILE}")]
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2]))) if found else None


def is_finished(folder: str | Path) -> bool:
    """Whether a folder holds a finished run, not a checkpoint of one."""
    return (Path(folder) / RECORD).exists()


def read_run(folder: Path, settings: dict) -> dict:
    """The record of a checkpoint or a finished run, which must be of the same settings.

    Raises:
        `ValueError`: where there is none, or it is of another run.
    """
    record = folder / (RECORD if is_finished(folder) else RUN_FILE)
    if not record.exists():
        raise ValueError(
            f"{folder} has no {RUN_FILE}: it is not a whole checkpoint of PrunerTrainer. Take an earlier one."
        )
    before, now = json.loads(record.read_text()), json.loads(json.dumps(settings))
    base = before.get("base")
    if base is not None and base.startswith(RELATIVE) and Path(now["base"] or "").is_dir():
        # As it stands in a pruner that may be moved together with its base.
        found = find_base(folder, base)
        before["base"] = now["base"] if os.path.realpath(found) == os.path.realpath(now["base"]) else base
    differ = [f"{name} {before.get(name)!r}, not {now[name]!r}" for name in now if before.get(name) != now[name]]
    if differ:
        raise ValueError(f"{folder} is of another run ({'; '.join(differ)}): choose another output_dir, or remove it.")
    return before


class RunRecord(TrainerCallback):
    """Writes what the run is into each checkpoint, behind all else that is in it."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        learned = self.trainer.learned()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            record = {**self.trainer.run_settings(), "seconds": round(self.trainer.seconds(), 1), "learned": learned}
            (folder / RUN_FILE).write_text(json.dumps(record, indent=1) + "\n")


def leave_base(model: HubMixin) -> tuple[str | None, str | None]:
    """From now on the model's checkpoints hold all weights. Returns the base that it had, and its revision."""
    config, base = model.config, model.base
    named = config.base_model_name_or_path, config.base_model_revision
    model.base = replace(base, name=None, revision=None)
    config.base_model_name_or_path = config.base_model_revision = None
    model.follow_base_model_field()
    return (base.name, base.revision) if named[0] is None else named
