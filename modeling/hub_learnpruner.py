# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Loading a stock base, and loading and saving checkpoints: full, or pruner-only on a base that is named."""

import os
from copy import copy
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from importlib.util import find_spec

import torch
from huggingface_hub.file_download import REGEX_COMMIT_HASH
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file, logging
from transformers.utils.hub import extract_commit_hash

from .compat_learnpruner import check_transformers
from .guards_learnpruner import refuse_zero3

logger = logging.get_logger(__name__)

PRUNER = "model.pruner."
RELATIVE = ("./", "../")
# What of from_pretrained's arguments says where a repository's files are, and what must not follow to the base.
PLACE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
OF_ONE_REPOSITORY = ("revision", "subfolder", "code_revision", "adapter_kwargs", "trust_remote_code")
# Pushes with a card. In the installed package it lies beside this file; in a checkpoint's folder there is none.
HUB_CARDS = f"{__package__}.hub_cards"


def find_base(path, base: str | None, subfolder: str = "") -> str | None:
    """Where the base is that a checkpoint at `path` names: a Hub id, a folder, or a folder relative to the checkpoint,
    which raises `ValueError` for a checkpoint of the Hub."""
    if base is None or not base.startswith(RELATIVE):
        return base
    if not os.path.isdir(path):
        raise ValueError(f"{path} names its base model by the relative path {base!r}, which only a local folder may.")
    return os.path.abspath(os.path.join(path, subfolder, base))


@dataclass(frozen=True)
class Base:
    """The weights that a pruner was put on: the stock checkpoint's `name` and `revision`, if it can be named, and up to
    64 values of each tensor when it was loaded, on the CPU (`None` for one that is offloaded or sharded)."""

    name: str | None = None
    revision: str | None = None
    sample: dict[str, torch.Tensor | None] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: nn.Module, name: str | None = None, revision: str | None = None) -> "Base":
        base = {key: value for key, value in model.state_dict().items() if not key.startswith(PRUNER)}
        for key, value in base.items():
            whole = type(value) is torch.Tensor and not value.is_meta
            base[key] = value.flatten()[:: value.numel() // 64 + 1].clone().cpu() if whole else None
        return cls(name, revision, base)

    def changed(self, model: nn.Module) -> bool:
        """Whether the model has other weights by now, by a merged adapter for one; precision does not count."""
        now = Base.of(model).sample
        pairs = [(old, now.get(key, torch.empty(0))) for key, old in self.sample.items()]
        return any(not old.to(new.dtype).equal(new) for old, new in pairs if old is not None and new is not None)


def trains_base(model: nn.Module) -> bool:
    """Whether more than the pruner is trainable."""
    return any(p.requires_grad for name, p in model.named_parameters() if not name.startswith(PRUNER))


class HubMixin:
    """Loading and saving. `base` is what the model was loaded with, `training_record` what trained the pruner, as
    training.json has it. `config.base_model_name_or_path` is set exactly while the model saves pruner-only."""

    # save_pretrained copies the code and names it for AutoModelForImageTextToText; `save_pretrained` adds the others.
    _auto_class = "AutoModelForImageTextToText"
    base = Base()
    training_record: dict | None = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # transformers renames a checkpoint's keys for its own classes and types alone, and would leave the language
        # model of a subclass newly initialised.
        for kind in (cls, cls.model_class):
            names = (kind.__bases__[-1].__name__, cls.config_class.base_model_type)
            mapping = next(filter(None, map(get_checkpoint_conversion_mapping, names)))
            register_checkpoint_conversion_mapping(kind.__name__, mapping, overwrite=True)

    def post_init(self):
        super().post_init()
        self._follow_base_model_field()

    def _follow_base_model_field(self) -> None:
        keys = () if self.config.base_model_name_or_path is None else self.state_dict()
        # What Trainer compares with when it resumes from a pruner-only checkpoint.
        self._keys_to_ignore_on_save = {key for key in keys if not key.startswith(PRUNER)}
        # The base brings no pruner; `from_pretrained` loads it next.
        self._keys_to_ignore_on_load_missing = {r"^model\.pruner\."} if keys else set()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Loads a stock checkpoint with a new pruner, a full checkpoint of this class, or a pruner-only one, from a Hub
        id or a folder. `config` is read from the checkpoint where it is not given; `kwargs` are the stock method's, and
        pruner fields such as `pruner_ratio=0.1`.

        Raises `OSError` where a pruner-only checkpoint's base cannot be found, `RuntimeError` where any weight but a
        new pruner's is missing or of another shape, `ValueError` where the checkpoint is of another family.
        """
        check_transformers()
        refuse_zero3()
        path, with_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # not ignored: `_check_loaded` names them
        place = {name: kwargs[name] for name in PLACE if name in kwargs}
        stored, config_class = PreTrainedConfig.get_config_dict(path, **place)[0], cls.config_class
        found, types = stored.get("model_type"), (config_class.base_model_type, config_class.model_type)
        # Given for this call, a folder is relative to where the caller stands.
        given = kwargs.get("base_model_name_or_path") if config is None else None
        if given not in (None, stored.get("base_model_name_or_path")):
            kwargs.setdefault("base_model_revision", None)  # the stored one is of another base
        if config is None:
            if found not in types:
                raise ValueError(
                    f"{cls.__name__} loads checkpoints of type {' or '.join(types)}, and {path} is of type {found!r}. "
                    "LearnPrunerForConditionalGeneration picks the class."
                )
            # "auto" is for the model to resolve; the configuration would take it as it is.
            names = {one.name for one in fields(config_class)} - {"dtype"}
            overrides = {name: kwargs.pop(name) for name in names & set(kwargs)}
            config = config_class.from_pretrained(path, **place, **overrides)
        elif config.model_type == types[0]:
            config = config_class.from_base_config(config)
        base = given or find_base(path, config.base_model_name_or_path, place.get("subfolder", ""))
        config.base_model_name_or_path, stock = base, base is None and found == types[0]
        if base is None:
            model, info = super().from_pretrained(path, *model_args, config=config, output_loading_info=True, **kwargs)
            model._check_loaded(path, info, stock)
        else:
            model, info = cls._from_base(path, config, place, model_args, kwargs)
        model.base = Base.of(model, *(cls._name_base(path, place) if stock else ()))
        return (model, info) if with_info else model

    @classmethod
    def _from_base(cls, path, config, place: dict, model_args, kwargs: dict):
        base, revision = config.base_model_name_or_path, config.base_model_revision
        weights_file = cached_file(path, SAFE_WEIGHTS_NAME, **place)
        kwargs = {name: value for name, value in kwargs.items() if name not in OF_ONE_REPOSITORY}
        try:
            if not REGEX_COMMIT_HASH.fullmatch(revision or ""):
                revision = cls._name_base(base, {**place, "revision": revision, "subfolder": ""})[1]
            if revision is not None:
                config.base_model_revision = kwargs["revision"] = revision
            model, info = super().from_pretrained(base, *model_args, config=config, output_loading_info=True, **kwargs)
        except OSError as error:
            raise OSError(
                f"{path} holds a pruner alone. Its base {base!r} (revision: {revision}) cannot be loaded: {error}. "
                "Download it, or point to a copy: from_pretrained(..., base_model_name_or_path='<folder or Hub id>')."
            ) from error
        model._check_loaded(base, info)
        weights = load_file(weights_file)
        expected = {name: value.shape for name, value in model.state_dict().items() if name.startswith(PRUNER)}
        found = {name: value.shape for name, value in weights.items()}
        if found != expected:
            raise RuntimeError(f"The pruner in {path} does not fit its base model: expected {expected}, found {found}.")
        model.load_state_dict(weights, strict=False)
        model.name_or_path = str(path)  # not the base's
        model._freeze_base()
        return model, info

    @staticmethod
    def _name_base(path, place: dict) -> tuple[str | None, str | None]:
        """What a pruner-only checkpoint will name: a folder, found from anywhere, or a Hub id at its revision."""
        if os.path.isdir(path):
            return os.path.abspath(os.path.join(path, place.get("subfolder", ""))), None
        if place.get("subfolder"):
            return None, None
        return str(path), extract_commit_hash(cached_file(path, CONFIG_NAME, **place), None)

    def _check_loaded(self, path, info: dict, new_pruner: bool = False) -> None:
        pruner = self.model.pruner
        if any(parameter.is_meta for parameter in pruner.parameters()):
            raise ValueError("The device map offloads the pruner: give 'model.pruner' a device of its own there.")
        if type(pruner.hidden) is not nn.Linear:
            raise ValueError(
                "The quantization_config covers the pruner, which must rank exactly: give llm_int8_skip_modules="
                "['model.pruner', 'lm_head', 'model.vision_tower', 'model.multi_modal_projector'], Qwen: 'model.visual'"
            )
        # transformers keeps a loaded pruner in float32, but initialises a missing one in the model's precision.
        pruner.float()
        missing = sorted(name for name in info["missing_keys"] if not (new_pruner and name.startswith(PRUNER)))
        mismatched = sorted(map(str, info["mismatched_keys"]))
        if missing or mismatched:
            raise RuntimeError(
                f"{path} lacks weights, which would be random: {len(missing)} are missing ({missing[:8]}), "
                f"{len(mismatched)} of another shape ({mismatched[:8]}). It is incomplete, or of another model."
            )

    def train_pruner_only(self) -> "HubMixin":
        """Freezes all but the pruner, and returns the model in training mode. `save_pretrained` now names the base that
        was loaded, and leaves its weights out; where there is none, checkpoints stay full."""
        self._freeze_base()
        if self.base.name is not None and not self.base.changed(self):
            self.config.base_model_name_or_path, self.config.base_model_revision = self.base.name, self.base.revision
            self._follow_base_model_field()
        elif self.config.base_model_name_or_path is None:
            logger.warning(
                "Checkpoints will hold all weights: the model has no stock base, or no longer has its weights."
            )
        return self.train()

    def leave_base(self) -> tuple[str | None, str | None]:
        """From now on checkpoints hold all weights. Returns the base that the model had, and its revision."""
        base = self.config.base_model_name_or_path, self.config.base_model_revision
        base = (self.base.name, self.base.revision) if base[0] is None else base
        self.base = replace(self.base, name=None, revision=None)
        self.config.base_model_name_or_path = self.config.base_model_revision = None
        self._follow_base_model_field()
        return base

    def train(self, mode: bool = True) -> "HubMixin":
        """As stock; a frozen base drops nothing out. Its layers stay in training mode, for gradient checkpointing."""
        super().train(mode)
        layers = self.modules() if mode and not trains_base(self) else ()
        for layer in (layer for layer in layers if isinstance(layer, GradientCheckpointingLayer)):
            nn.ModuleList(layer.children()).eval()
        return self

    def _freeze_base(self) -> None:
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(PRUNER))

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters are trained, of how many."""
        every, trained = self.num_parameters(), self.num_parameters(only_trainable=True)
        print(f"trainable params: {trained:,} || all params: {every:,} || trainable%: {100 * trained / every:.4f}")

    def push_to_hub(self, repo_id: str, **options):
        """Pushes the model with its processor and card, and returns the commit; `options` as in
        `learnpruner.hub_cards.push_pruner`. Code that came with a checkpoint pushes as transformers does."""
        if not find_spec(HUB_CARDS):
            return super().push_to_hub(repo_id, **options)
        return import_module(HUB_CARDS).push_pruner(self, repo_id, **options).commit

    def save_pretrained(self, save_directory, *args, pruner_only: bool | None = None, **kwargs):
        """Saves weights, configuration and code; the folder opens with `trust_remote_code=True`.

        `pruner_only` (`bool`, *optional*) saves the pruner alone, and names the base in the configuration. Default:
        `True` after `train_pruner_only`, or where the model was loaded so, while only the pruner is trainable and the
        base unchanged; else `False`, all weights. Raises `ValueError` where a pruner-only checkpoint has no base to
        name, would lose changes of it or replace it, and with `push_to_hub` in the installed package."""
        if (kwargs.get("push_to_hub") or any(args[2:3])) and find_spec(HUB_CARDS):
            raise ValueError("Use model.push_to_hub(repo_id): save_pretrained would push no card, and check nothing.")
        base = self.config.base_model_name_or_path
        if pruner_only and base is None:
            raise ValueError("No base to name in a pruner-only checkpoint: load a stock one, call train_pruner_only().")
        changed = base is not None and pruner_only is not False and self.base.changed(self)
        if pruner_only and changed:
            raise ValueError("The base was changed, which the pruner alone would lose: save all, pruner_only=False.")
        if pruner_only is None:
            pruner_only = base is not None and not changed and not trains_base(self)
            if base is not None and not pruner_only:
                why = "The base was changed" if changed else "More than the pruner is trainable"
                logger.warning(f"{why}: saving all weights, not the pruner alone.")
        if pruner_only:
            base = os.path.join(save_directory, base) if base.startswith(RELATIVE) else base
            if os.path.realpath(save_directory) == os.path.realpath(base):
                raise ValueError(f"{save_directory} holds the base model, which the pruner's weights would replace.")
            # One file: `from_pretrained` reads no index, and Trainer resumes from none.
            kwargs.pop("max_shard_size", None)
        code = f"{type(self).__module__.rsplit('.', 1)[-1]}.{type(self).__name__}"
        configuration = f"configuration_learnpruner.{self.config_class.__name__}"
        self.config.auto_map = {"AutoConfig": configuration, "AutoModel": code}
        config, self.config = self.config, copy(self.config)
        if pruner_only:
            # How the base was quantised here is no part of the pruner: it opens on any copy of the base.
            vars(self.config).pop("quantization_config", None)
        else:
            self.config.base_model_name_or_path = self.config.base_model_revision = None
        self._follow_base_model_field()
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config = config
            self._follow_base_model_field()
