# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Loading a stock base, and loading and saving checkpoints: full, or pruner-only on a base that is named."""

import os
from copy import copy, deepcopy
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, logging
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, extract_commit_hash, get_checkpoint_shard_files

from .compat_learnpruner import GradientCheckpointingLayer, check_transformers, conversion_mapping, maybe_load_adapters

logger = logging.get_logger(__name__)

PRUNER = "model.pruner."
RELATIVE = ("./", "../")
# What of from_pretrained's arguments says where a repository's files are, and what must not follow to the base.
PLACE = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")
OF_ONE_REPOSITORY = ("revision", "subfolder", "variant", "code_revision", "trust_remote_code")
AUTO_CLASSES = ("AutoModel", "AutoModelForMultimodalLM", "AutoModelForPreTraining")  # beside `_auto_class`
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


def find_file(path, name: str, place: dict) -> str | None:
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **place)


def find_weights(path, variant: str | None, place: dict) -> list[str]:
    """The files that hold a checkpoint's weights. Raises `OSError` where there are none."""
    end = f".{variant}." if variant else "."
    one, index = (end.join(name.rsplit(".", 1)) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    found = None if find_file(path, one, place) else find_file(path, index, place)
    return get_checkpoint_shard_files(path, found, **place)[0] if found else [cached_file(path, one, **place)]


def sample_of(tensor: torch.Tensor) -> torch.Tensor | None:
    whole = type(tensor) is torch.Tensor and not tensor.is_meta
    return tensor.flatten()[:: tensor.numel() // 64 + 1].clone().cpu() if whole else None


@dataclass(frozen=True)
class Base:
    """The weights that a pruner was put on: the stock checkpoint's `name` and `revision`, if it can be named, and up to
    64 values of each tensor when it was loaded, on the CPU (`None` for one that is offloaded or sharded)."""

    name: str | None = None
    revision: str | None = None
    sample: dict[str, torch.Tensor | None] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: nn.Module, name: str | None = None, revision: str | None = None) -> "Base":
        base = {key: sample_of(value) for key, value in model.state_dict().items() if not key.startswith(PRUNER)}
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

    _auto_class = "AutoModelForImageTextToText"  # the stock save_pretrained copies the code and names it for this one
    base = Base()
    training_record: dict | None = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # transformers renames a checkpoint's keys for its own classes and types alone, and would leave the language
        # model of a subclass newly initialised.
        for kind in (cls, cls.model_class):
            names = (kind.__bases__[-1].__name__, cls.config_class.base_model_type)
            mapping = next(filter(None, map(conversion_mapping.get_checkpoint_conversion_mapping, names)), [])
            # Qwen's takes all that was not in `model` at first for the language model's, so an adapter's pruner, too.
            mapping.append(conversion_mapping.WeightRenaming(r"^model\.language_model\.pruner\.", PRUNER))
            conversion_mapping.register_checkpoint_conversion_mapping(kind.__name__, mapping, overwrite=True)

    def post_init(self):
        super().post_init()
        self.follow_base_model_field()

    def follow_base_model_field(self) -> None:
        keys = () if self.config.base_model_name_or_path is None else self.state_dict()
        # What Trainer compares with when it resumes from a pruner-only checkpoint.
        self._keys_to_ignore_on_save = {key for key in keys if not key.startswith(PRUNER)}
        # The base brings no pruner; `from_pretrained` loads it next.
        self._keys_to_ignore_on_load_missing = {r"^model\.pruner\."} if keys else set()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Loads a stock checkpoint with a new pruner, a full checkpoint of this class, a pruner-only one, or an adapter
        of one of these, from a Hub id or a folder. Arguments are the stock method's, and the pruner's fields, such as
        `pruner_ratio=0.1`; `base_model_name_or_path` says where the base of a pruner-only checkpoint is.

        Raises `OSError` where a pruner-only checkpoint's base cannot be found, `RuntimeError` where any weight but a
        new pruner's is missing or of another shape, `ValueError` where the checkpoint is of another family.
        """
        check_transformers()
        with_info, of_adapter = kwargs.pop("output_loading_info", False), kwargs.pop("adapter_kwargs", None) or {}
        kwargs["ignore_mismatched_sizes"] = True  # not ignored: `_check_loaded` names them
        place = {name: kwargs[name] for name in PLACE if name in kwargs}
        adapter, path, of_adapter = maybe_load_adapters(pretrained_model_name_or_path, place, **of_adapter)
        source = path if config is None else config
        given = isinstance(config, PreTrainedConfig)
        read = config.to_dict() if given else PreTrainedConfig.get_config_dict(source, **place)[0]
        stock = cls.config_class.is_stock(read, path)
        named, base = read.get("base_model_name_or_path"), kwargs.pop("base_model_name_or_path", None)
        revision = kwargs.pop("base_model_revision", read.get("base_model_revision") if base in (None, named) else None)
        base = None if path is None else base or find_base(path, named and str(named), place.get("subfolder", ""))
        ours = {"base_model_name_or_path": base, "base_model_revision": base and revision}
        if given:
            config = cls.config_class.from_base_config(config) if stock else deepcopy(config)
            # `pipeline` passes a configuration, and again the fields that it was read with.
            again = [name for name in kwargs if name.startswith("pruner_") and hasattr(config, name)]
            config.update(ours | {name: kwargs.pop(name) for name in again})
        else:
            kwargs |= ours
        if base is not None:
            config = config if given or os.path.isfile(source) else cached_file(source, CONFIG_NAME, **place)
            model, info = cls._from_base(path, config, base, revision, place, model_args, kwargs)
        else:
            if path is not None and config is not None and find_file(path, CONFIG_NAME, place):
                stock = cls.config_class.is_stock(PreTrainedConfig.get_config_dict(path, **place)[0], path)
            if adapter == path:  # beside the model, where the stock method finds it
                adapter, kwargs["adapter_kwargs"] = None, of_adapter
            model, info = super().from_pretrained(path, *model_args, config=config, output_loading_info=True, **kwargs)
            model._check_loaded(path, info, stock)
            model.config.pruner_trained |= any(name.startswith(PRUNER) for name in kwargs.get("state_dict") or ())
        found = base is None and path is not None and stock and kwargs.get("variant") is None
        model.base = Base.of(model, *(cls.name_base(path, place) if found else ()))
        if adapter is not None:
            model.load_adapter(adapter, kwargs.get("adapter_name"), adapter_kwargs=place | of_adapter)
        return (model, info) if with_info else model

    def load_adapter(self, *args, **kwargs):
        """As stock; a pruner that the adapter brings was trained."""
        before = len(self.model.pruner.state_dict())
        info = super().load_adapter(*args, **kwargs)
        self.config.pruner_trained |= len(self.model.pruner.state_dict()) > before
        return info

    @classmethod
    def _from_base(cls, path, config, base: str, revision: str | None, place: dict, model_args, kwargs: dict):
        files = find_weights(path, kwargs.get("variant"), place)
        kwargs = {name: value for name, value in kwargs.items() if name not in OF_ONE_REPOSITORY}
        try:
            base, revision = cls.name_base(base, {**place, "revision": revision, "subfolder": ""})
            kwargs["revision"] = revision or "main"
            model, info = super().from_pretrained(base, *model_args, config=config, output_loading_info=True, **kwargs)
        except OSError as error:
            raise OSError(
                f"{path} holds a pruner alone. Its base {base!r} (revision: {revision}) cannot be loaded: {error}. "
                "Download it, or point to a copy: from_pretrained(..., base_model_name_or_path='<folder or Hub id>')."
            ) from error
        model._check_loaded(base, info)
        model.config.base_model_name_or_path, model.config.base_model_revision = base, revision
        weights = {name: value for file in files for name, value in load_file(file).items()}
        expected = {name: value.shape for name, value in model.state_dict().items() if name.startswith(PRUNER)}
        found = {name: value.shape for name, value in weights.items()}
        if found != expected:
            raise RuntimeError(f"The pruner in {path} does not fit its base model: expected {expected}, found {found}.")
        model.model.pruner.load_state_dict({name.removeprefix(PRUNER): value for name, value in weights.items()})
        if kwargs.get("generation_config") is None and find_file(path, GENERATION_CONFIG_NAME, place):
            model.generation_config = GenerationConfig.from_pretrained(path, **place)
        model.name_or_path = str(path)  # not the base's
        model._freeze_base()
        return model, info

    @staticmethod
    def name_base(path, place: dict) -> tuple[str | None, str | None]:
        """What a pruner-only checkpoint will name: a folder, found from anywhere, or a Hub id at its revision."""
        if os.path.isdir(path):
            return os.path.abspath(os.path.join(path, place.get("subfolder", ""))), None
        commit = extract_commit_hash(cached_file(path, CONFIG_NAME, **place), None)
        return (None, None) if place.get("subfolder") else (str(path), commit)

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
            self.follow_base_model_field()
        elif self.config.base_model_name_or_path is None:
            logger.warning("Checkpoints will hold all weights: it has no stock base, or no longer has its weights.")
        return self.train()

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

    def push_to_hub(self, repo_id: str, **options):
        """As `learnpruner.hub_cards.push_pruner`, and returns the commit; as stock where that is not installed."""
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
        code = f"{type(self).__module__.rsplit('.', 1)[-1]}.{type(self).__name__}"
        configuration = f"configuration_learnpruner.{self.config_class.__name__}"
        self.config.auto_map = {"AutoConfig": configuration, **dict.fromkeys(AUTO_CLASSES, code)}
        config, self.config = self.config, copy(self.config)
        if pruner_only:
            # How the base was quantised here is no part of the pruner: it opens on any copy of the base.
            vars(self.config).pop("quantization_config", None)
        else:
            self.config.base_model_name_or_path = self.config.base_model_revision = None
        self.follow_base_model_field()
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config = config
            self.follow_base_model_field()
