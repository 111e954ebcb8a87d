# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The factory: any supported checkpoint, stock or pruned, by its configuration."""

from transformers import PreTrainedConfig

from .families import FAMILIES, model_class


def pruned_class(pretrained_model_name_or_path, **place) -> type:
    """The class for a checkpoint, stock or pruned, by its configuration.

    Args:
        pretrained_model_name_or_path (`str`): A Hub id or a folder.
        place: Where to find it, for example `revision` or `token`.

    Raises:
        `ValueError`: where no class fits the checkpoint.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **place)
    except OSError as error:
        raise OSError(
            f"No checkpoint at {pretrained_model_name_or_path!r}: it is no folder with a config.json, and no Hub "
            f"repository that can be reached ({str(error).splitlines()[0]})"
        ) from error
    config_classes = {
        model_type: config_class
        for config_class in FAMILIES
        for model_type in (config_class.base_model_type, config_class.model_type)
    }
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in config_classes:
        raise ValueError(
            f"{pretrained_model_name_or_path} is of type {model_type!r}; LearnPruner supports {sorted(config_classes)}."
        )
    return model_class(config_classes[model_type])


class LearnPrunerForConditionalGeneration:
    """Picks the class for a checkpoint. Not to be instantiated: call [`from_pretrained`]."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path, **kwargs):
        """Loads a stock base with a fresh pruner, or a pruned checkpoint, full or pruner-only.

        Args:
            pretrained_model_name_or_path (`str`): A Hub id or a folder.
            kwargs: As in the class's own method, for example `pruner_ratio=0.1`, `dtype`, `device_map`.

        Raises:
            `ValueError`: where no class fits the checkpoint.
        """
        from .hub_learnpruner import PLACE  # seconds of import

        place = {name: kwargs[name] for name in PLACE if name in kwargs}
        cls = pruned_class(pretrained_model_name_or_path, **place)
        return cls.from_pretrained(pretrained_model_name_or_path, **kwargs)
