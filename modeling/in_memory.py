# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""A pruned model that shares the weights of a stock one."""

from copy import deepcopy
from dataclasses import fields as fields_of
from itertools import chain
from types import MethodType

import torch
from accelerate.hooks import add_hook_to_module
from safetensors import safe_open
from transformers import PreTrainedModel

from .hub_learnpruner import Base, HubMixin, find_weights, sample_of


def share(model: PreTrainedModel, cls: type[HubMixin], fields: dict) -> HubMixin:
    """`model`, of the stock class of `cls`, as one of `cls` with a new pruner. See
    [`LearnPrunerForConditionalGeneration.from_base`]."""
    stock_class, config_class = cls.__bases__[-1], cls.config_class
    if type(model) is not stock_class:
        raise ValueError(
            f"from_base takes a {stock_class.__name__} and got a {type(model).__name__}: give the stock model with its "
            "head, before PEFT or torch.compile wrap it. A pruned model needs no from_base."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("from_base takes a model that is in memory, and this one is offloaded: use from_pretrained.")
    for part in map(vars, (model, model.model)):
        if "forward" in part and ("_old_forward" not in part or "_original_forward" in part):
            raise ValueError(
                "The stock model's forward was replaced (Accelerator.prepare does so): use from_base first."
            )
    known = {each.name for each in fields_of(config_class)} - {each.name for each in fields_of(type(model.config))}
    if unknown := sorted(fields.keys() - known):
        raise TypeError(f"{unknown} are no fields of the pruner, which has {sorted(known)}.")
    name, revision = fields.pop("base_model_name_or_path", None), fields.pop("base_model_revision", None)
    config = config_class.from_base_config(model.config, **fields)
    # What stands for a part of the stock model in its copy: the same tensors, and the new configuration.
    stands_for = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    stands_for[id(model.config)] = config
    for part in config.sub_configs:
        stands_for[id(getattr(model.config, part))] = getattr(config, part)
    pruned = deepcopy(model, stands_for)
    pruned.__class__ = cls
    with torch.device("meta"):  # where nothing is drawn yet
        pruned.model = cls.model_class.adopt(pruned.model)
        pruned.post_init()
    tower = next(model.parameters())
    pruner = pruned.model.pruner.to_empty(device=tower.device)
    pruned.initialize_weights()
    pruner.float().train(model.training)
    for part in (pruned, pruned.model):
        if "_old_forward" in vars(part):  # what accelerate's hook runs was the stock class's
            part._old_forward = MethodType(type(part).forward, part)
            add_hook_to_module(part, part._hf_hook)
    if name is None:
        name, revision = checkpoint_of(model)
    pruned.base = Base.of(pruned, name, revision)
    return pruned


def checkpoint_of(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """The folder, or the Hub id and its revision, whose weights the model has; `None` where it is no longer known, or
    where they were changed."""
    path, here = model.name_or_path, {"local_files_only": True}
    if not path:
        return None, None
    try:
        files, name = find_weights(path, None, here), HubMixin.name_base(path, here)
    except OSError:  # moved, or of another format: what cannot be read cannot be compared
        return None, None
    tensors = {key: tensor for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
    dtypes, stored = {tensor.dtype for tensor in tensors.values()}, set()
    for file in files:
        with safe_open(file, framework="pt") as weights:
            # Names may be of another release: what is compared is the values.
            for tensor in map(weights.get_tensor, weights.keys()):
                stored |= {(tensor.shape, dtype, tuple(sample_of(tensor).to(dtype).tolist())) for dtype in dtypes}
    same = all((tensor.shape, tensor.dtype, tuple(sample_of(tensor).tolist())) in stored for tensor in tensors.values())
    return name if same else (None, None)
