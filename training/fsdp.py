# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Checkpoints of a pruner whose base is sharded over processes (FSDP2).

Stock `Trainer` would write the whole base at every save, or nothing. Here the pruner and its optimizer are gathered,
and written and read as they are without sharding, so that a checkpoint opens everywhere and a run goes on with any
number of processes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


@contextmanager
def plain_class(model: PreTrainedModel) -> Iterator[None]:
    """Sharding gives a model a class of its own, under whose name no checkpoint would open: here it has its own again.
    A model that is not sharded has it anyway."""
    sharded = type(model)
    model.__class__ = next(cls for cls in sharded.__mro__ if not issubclass(cls, FSDPModule))
    try:
        yield
    finally:
        model.__class__ = sharded


class ShardedCheckpoints(Trainer):
    """[`Trainer`] that saves and resumes, under FSDP2, what it trains and nothing else. Without FSDP it is the stock
    one."""

    def check_sharding(self) -> None:
        """Raises `ValueError` where FSDP would be of no use, or a checkpoint could not be whole."""
        if not self.is_fsdp_enabled:
            return
        if self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise ValueError("The pruner is trained with FSDP2 alone: fsdp_version 2 in the settings of accelerate.")
        if isinstance(self.model, PeftModel):
            raise ValueError("Adapters and pruner are not trained together with FSDP: use data parallelism.")
        if self.args.push_to_hub:
            raise ValueError("With FSDP the pruner is pushed when it is trained: learnpruner push.")
        if self.model.config.base_model_name_or_path is None:
            raise ValueError("With FSDP a checkpoint is the pruner alone: load a stock checkpoint, which it can name.")

    def share_model(self) -> None:
        """Shares the model as training would, where no training will: accelerate shares no model without its
        optimizer."""
        if self.is_fsdp_enabled and not isinstance(self.model, FSDPModule):
            self.create_optimizer()
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model_wrapped = self.model

    def trained_state(self) -> dict[str, torch.Tensor]:
        """What is trained, whole and on the CPU, in the main process; all processes must call it."""
        return get_model_state_dict(self.model, options=WHOLE)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        state = self.trained_state()
        if self.args.should_save:
            with plain_class(self.model):
                self._save(output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        set_model_state_dict(
            model or self.model, load_file(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME), options=WHOLE
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        set_optimizer_state_dict(self.model, self.optimizer, state, options=WHOLE)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_best_model(self) -> None:
        if not self.is_fsdp_enabled:
            super()._load_best_model()
            return
        self._load_from_checkpoint(self.state.best_model_checkpoint)
