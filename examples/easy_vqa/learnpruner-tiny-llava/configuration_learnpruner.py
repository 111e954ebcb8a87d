# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The pruner's configuration: the fields that LearnPruner adds to a stock configuration, and one class per family."""

import math
from dataclasses import dataclass

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig, LlavaNextConfig, PreTrainedConfig, Qwen2_5_VLConfig, Qwen2VLConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as SERVED

__version__ = "0.2.0.dev0"

# Release that changed defaults -> what they were before it, or what older ones did without a field that it added: a
# stored configuration that lacks a field behaves as under the release that wrote it.
DEFAULTS_BEFORE: dict[str, dict] = {}


def check_pruner_field(name: str, value, num_layers: int | None = None) -> None:
    """Raises `ValueError` where a field does not allow `value` in a model of `num_layers` layers; other names pass."""
    if name == "pruner_ratio" and not (isinstance(value, int | float) and 0 < value <= 1):
        raise ValueError(f"pruner_ratio is the mean share of vision tokens kept, in (0, 1] (1: all), got {value!r}.")
    if name == "pruner_layer" and value is not None and not 1 <= value <= (num_layers or math.inf):
        raise ValueError(f"pruner_layer counts the layers before the second cut, 1 to {num_layers or 'all'}: {value}.")
    if name == "pruner_stage_ratio" and not (1 <= value < math.inf):
        raise ValueError(f"pruner_stage_ratio is R1/R2, at least 1, got {value}.")
    if name == "pruner_diversity" and not 0 <= value <= 1:
        raise ValueError(f"pruner_diversity is the share of R1 filled by diversity, in [0, 1], got {value}.")
    if name in ("pruner_hidden_size", "pruner_min_tokens") and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    if name == "pruner_query" and value not in ("all", "last"):
        raise ValueError(f"pruner_query must be 'all' or 'last', got {value!r}.")


def minor_release(version: str) -> tuple[int, int]:
    """`"0.1.0"` -> `(0, 1)`: releases that agree in these read each other's files. Raises `ValueError` for others."""
    parts = str(version).split(".")
    if len(parts) < 2 or not (parts[0].isdecimal() and parts[1].isdecimal()):
        raise ValueError(f"learnpruner_version is a release such as 0.1.0, got {version!r}.")
    return int(parts[0]), int(parts[1])


def defaults_of(version: str) -> dict:
    """Those defaults of a release that are others today."""
    # From new to old: of several changes of one field, the first behind the release counts.
    later = (changed for changed in DEFAULTS_BEFORE if minor_release(version) < minor_release(changed))
    newest_first = sorted(later, key=minor_release, reverse=True)
    return {name: value for changed in newest_first for name, value in DEFAULTS_BEFORE[changed].items()}


def _without_identity(config_dict: dict) -> dict:
    identity = ("model_type", "architectures", "transformers_version", "auto_map")
    return {name: value for name, value in config_dict.items() if name not in identity}


@dataclass(kw_only=True, repr=False)
class PrunerConfig:
    """The pruner's fields, flat, so that `from_pretrained(path, pruner_ratio=0.1)` overrides them.

    Args:
        pruner_ratio (`float`, defaults to 1/9): Mean share of vision tokens kept over the decoder's layers, in (0, 1],
            as papers report it. 1.0 switches pruning off. May be changed at any time; acts from the next call.
        pruner_layer (`int`, *optional*): Number of decoder layers before the second cut, which see R1 tokens. Defaults
            to the paper's 12 of 32, scaled to the model's depth. Equal to the depth: no second cut.
        pruner_stage_ratio (`float`, defaults to 3.0): R1 / R2, at least 1.
        pruner_diversity (`float`, defaults to 0.1): Share of R1 that goes to the tokens least similar to those chosen.
        pruner_min_tokens (`int`, defaults to 1): So many of each image, or group of a video's frames, survive the first
            cut, or all where it has fewer; the second keeps no fewer of a sample's images together. Raises the mean.
        pruner_query (`"all"` or `"last"`, defaults to `"all"`): Text rows whose attention decides the second cut.
        pruner_hidden_size (`int`, defaults to 512): Width of the learned module's hidden layer.
        pruner_trained (`bool`, defaults to `False`): Whether it has been trained; until then, cut 1 is training-free.
        base_model_name_or_path, base_model_revision (`str`, *optional*): In a pruner-only checkpoint, the model with
            every weight but the pruner's, and its revision on the Hub.
        learnpruner_version (`str`): Release that wrote the configuration; loading and saving keep it.
    """

    pruner_ratio: float | int = 1 / 9
    pruner_layer: int | None = None
    pruner_stage_ratio: float | int = 3.0
    pruner_diversity: float | int = 0.1
    pruner_min_tokens: int = 1
    pruner_hidden_size: int = 512
    pruner_query: str = "all"
    pruner_trained: bool = False
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    learnpruner_version: str = __version__

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "model_type" in vars(cls):  # `transformers serve --trust-remote-code` looks for the type and the class there
            SERVED[cls.model_type] = cls.__name__.replace("Config", "ForConditionalGeneration")

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if minor_release(self.learnpruner_version) > minor_release(__version__):
            versions = f"learnpruner {self.learnpruner_version} wrote this configuration, and {__version__} reads it"
            raise ValueError(f"{versions}: run `pip install -U learnpruner`.")
        self.pruner_layer = self.pruner_layer  # now that the depth is known: the default, or a check

    def __setattr__(self, name, value):
        text_config = vars(self).get("text_config")  # a plain dict until it has been built
        depth = text_config.num_hidden_layers if isinstance(text_config, PreTrainedConfig) else None
        if name == "pruner_layer" and value is None and depth is not None:
            value = max(1, math.floor(depth * 12 / 32 + 0.5))  # 12 of 32 in the paper (arXiv 2604.23950)
        check_pruner_field(name, value, depth)
        super().__setattr__(name, value)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        stored, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return (_without_identity(stored) if stored.get("model_type") == cls.base_model_type else stored), kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        defaults = defaults_of(config_dict.get("learnpruner_version", __version__))
        return super().from_dict({**defaults, **config_dict}, **kwargs)

    @classmethod
    def is_stock(cls, stored: dict, source) -> bool:
        """Whether a configuration is the stock one. Raises `ValueError` where that of `source` is of another family."""
        found, own = stored.get("model_type"), (cls.base_model_type, cls.model_type)
        if found not in own:
            wrong = f"{cls.__name__} extends {own[0]!r} configurations, and {source} is of type {found!r}"
            raise ValueError(f"{wrong}. LearnPrunerForConditionalGeneration picks the class.")
        return found == own[0]

    @classmethod
    def from_base_config(cls, base_config: PreTrainedConfig, **fields):
        """Builds a pruned model's configuration from a stock one, which is left unchanged, and fields of the pruner,
        such as `pruner_ratio=0.1`. Raises `ValueError` where the stock one is of another family."""
        cls.is_stock(base_config.to_dict(), "it")
        config = cls(**{**_without_identity(base_config.to_dict()), **fields})
        parts = {"": base_config, **{name: getattr(base_config, name) for name in base_config.sub_configs}}
        config._attn_implementation = {name: part._attn_implementation for name, part in parts.items()}
        return config


@strict
class LearnPrunerLlavaConfig(PrunerConfig, LlavaConfig):
    """[`LlavaConfig`] with the fields of [`PrunerConfig`]."""

    model_type = "learnpruner_llava"
    base_model_type = "llava"


@strict
class LearnPrunerLlavaNextConfig(PrunerConfig, LlavaNextConfig):
    """[`LlavaNextConfig`] with the fields of [`PrunerConfig`]."""

    model_type = "learnpruner_llava_next"
    base_model_type = "llava_next"


@dataclass(kw_only=True, repr=False)
class VideoPrunerConfig(PrunerConfig):
    """The fields of [`PrunerConfig`], and for videos `pruner_per_frame` (`bool`, defaults to `True`): whether each pair
    of a video's frames has a budget, or the clip."""

    pruner_per_frame: bool = True


@strict
class LearnPrunerQwen2VLConfig(VideoPrunerConfig, Qwen2VLConfig):
    """[`Qwen2VLConfig`] with the fields of [`VideoPrunerConfig`]."""

    model_type = "learnpruner_qwen2_vl"
    base_model_type = "qwen2_vl"


@strict
class LearnPrunerQwen2_5_VLConfig(VideoPrunerConfig, Qwen2_5_VLConfig):
    """[`Qwen2_5_VLConfig`] with the fields of [`VideoPrunerConfig`]."""

    model_type = "learnpruner_qwen2_5_vl"
    base_model_type = "qwen2_5_vl"
