# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The families, by their configurations, and their entries in transformers' registries.

A model class is loaded when it is used. What it needs of transformers takes seconds to import.
"""

import copyreg
from importlib import import_module

from transformers import AutoConfig, AutoModel
from transformers.models.auto import modeling_auto, tokenization_auto

from . import configuration_learnpruner as configurations

FAMILIES = (
    configurations.LearnPrunerLlavaConfig,
    configurations.LearnPrunerLlavaNextConfig,
    configurations.LearnPrunerQwen2VLConfig,
    configurations.LearnPrunerQwen2_5_VLConfig,
)


def model_module(config_class: type) -> str:
    """Name of the module, in this package, that holds a family's classes."""
    return f"modeling_{config_class.model_type}"


def model_name(config_class: type) -> str:
    """Name of a family's model class."""
    return f"{config_class.__name__.removesuffix('Config')}ForConditionalGeneration"


def model_class(config_class: type) -> type:
    """A family's model class, loaded now."""
    module = import_module(f"{__package__}.{model_module(config_class)}")
    return getattr(module, model_name(config_class))


class StandIn(type):
    """The type of a class that stands for a family's model class in transformers' registries.

    Such a class knows its `config_class`. For anything else (`from_pretrained`, `_from_config`, a call, `isinstance`)
    it loads the family and asks the model class. Pickled, it is the model class.
    """

    def __new__(cls, config_class: type):
        described = {"config_class": config_class, "__module__": __name__, "__doc__": cls.__doc__}
        return super().__new__(cls, model_name(config_class), (), described)

    def __init__(cls, config_class: type):
        super().__init__(model_name(config_class), (), {})

    def __getattr__(cls, name: str):
        return getattr(model_class(cls.config_class), name)

    def __call__(cls, *args, **kwargs):
        return model_class(cls.config_class)(*args, **kwargs)

    def __instancecheck__(cls, instance) -> bool:
        return isinstance(instance, model_class(cls.config_class))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, model_class(cls.config_class))


def _reduce_stand_in(stand_in: StandIn):
    return model_class, (stand_in.config_class,)


def auto_classes(config_class: type) -> list[type]:
    """transformers' Auto classes for models that know the stock family: ours is to be found wherever it is."""
    stock, kinds = config_class.__bases__[-1], AutoModel.__bases__
    classes = [auto for auto in vars(modeling_auto).values() if isinstance(auto, type) and issubclass(auto, kinds)]
    return [auto for auto in classes if auto._model_mapping is not None and stock in auto._model_mapping]


def register() -> None:
    """Registers the families with transformers' Auto classes."""
    copyreg.pickle(StandIn, _reduce_stand_in)
    tokenizers = tokenization_auto.TOKENIZER_MAPPING_NAMES
    incorrect = tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    for config_class in FAMILIES:
        stand_in, ours, base = StandIn(config_class), config_class.model_type, config_class.base_model_type
        AutoConfig.register(ours, config_class, exist_ok=True)
        for auto in auto_classes(config_class):
            auto.register(config_class, stand_in, exist_ok=True)
            # What pipelines and `transformers serve` ask, by names, is this table.
            auto._model_mapping._model_mapping[ours] = stand_in.__name__
        # Files of a base's tokenizer are read as they are for the base.
        tokenizers.update({ours: tokenizers[base]} if base in tokenizers else {})
        incorrect.update({ours} if base in incorrect else ())
