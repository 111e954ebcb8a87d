# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What TRL's trainers need where a model cuts while they score prompt and answer in one forward."""

from torch import nn
from torch.utils.hooks import RemovableHandle


def rank_by_prompt(model: nn.Module) -> RemovableHandle:
    """From now on the answers in the forwards of TRL's trainers have no say in which vision tokens stay, as in
    `generate`: the rows before the first label rank at the second cut.

    TRL keeps the labels for itself and calls the model without its head. Call this with `trainer.model`, and with the
    `ref_model` that you pass to DPO.

    Returns:
        `RemovableHandle`: `.remove()` undoes it.
    """

    def mark(module, args, kwargs):
        labels = kwargs.get("labels")
        if kwargs.get("fused_lm_head") and labels is not None and kwargs.get("query_mask") is None:
            kwargs["query_mask"] = (labels != -100).cumsum(1) == 0
        return args, kwargs

    return model.register_forward_pre_hook(mark, with_kwargs=True)
