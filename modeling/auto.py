# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The factory: any supported checkpoint, stock or pruned, by its configuration, or a stock model in memory."""

from transformers import PreTrainedConfig

from .families import FAMILIES, model_class


def pruned_class(pretrained_model_name_or_path, config=None, adapter_kwargs=None, **place) -> type:
    """The class for a checkpoint, stock or pruned, by its configuration.

    Args:
        pretrained_model_name_or_path (`str`): A Hub id or a folder, of a model or of an adapter for one.
        config (`PreTrainedConfig` or `str`, *optional*): In place of the configuration there.
        adapter_kwargs (`dict`, *optional*): As in the stock `from_pretrained`.
        place: Where to find it, for example `revision` or `token`.

    Raises:
        `ValueError`: where no class fits the checkpoint.
    """
    from transformers.integrations.peft import maybe_load_adapters  # seconds of import

    path = pretrained_model_name_or_path
    if isinstance(config, PreTrainedConfig):
        return class_of_type(config.model_type, path)
    try:
        _, path, _ = maybe_load_adapters(path, place, **(adapter_kwargs or {}))
        found, _ = PreTrainedConfig.get_config_dict(path if config is None else config, **place)
    except OSError as error:
        raise OSError(
            f"No checkpoint at {path!r}: it is no folder with a config.json, and no Hub "
            f"repository that can be reached ({str(error).splitlines()[0]})"
        ) from error
    return class_of_type(found.get("model_type"), path)


def class_of_type(model_type: str | None, source) -> type:
    """The class for a `model_type`, stock or pruned. Raises `ValueError`, which names the `source`, where none fits."""
    config_classes = {
        name: config_class
        for config_class in FAMILIES
        for name in (config_class.base_model_type, config_class.model_type)
    }
    if not isinstance(model_type, str) or model_type not in config_classes:
        raise ValueError(f"{source} is of type {model_type!r}; LearnPruner supports {sorted(config_classes)}.")
    return model_class(config_classes[model_type])


class LearnPrunerForConditionalGeneration:
    """Picks the class for a checkpoint. Not to be instantiated: call [`from_pretrained`] or [`from_base`]."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs):
        """Loads a stock base with a fresh pruner, or a pruned checkpoint, full or pruner-only.

        Args:
            pretrained_model_name_or_path (`str`): A Hub id or a folder.
            kwargs: As in the class's own method, for example `pruner_ratio=0.1`, `dtype`, `device_map`.

        Raises:
            `ValueError`: where no class fits the checkpoint.
        """
        from .hub_learnpruner import PLACE  # seconds of import

        place = {name: kwargs[name] for name in (*PLACE, "config", "adapter_kwargs") if name in kwargs}
        cls = pruned_class(pretrained_model_name_or_path, **place)
        return cls.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @staticmethod
    def from_base(model, **fields):
        """A pruned model of a stock one that is in memory. They share their weights, and no weight is copied: who
        trains or freezes one does so with both. Apart from that the stock model stays as it is.

        `train_pruner_only` lets `save_pretrained` leave out the weights of a base that can be named. That is the
        checkpoint which the stock model was loaded from, if the model still has its weights.

        Args:
            model (`PreTrainedModel`): Of a stock class for conditional generation of a supported family.
            fields: The pruner's, for example `pruner_ratio=0.1`.

        Raises:
            `ValueError`: where the model is of another class, or offloaded.
            `TypeError`: for fields that the pruner does not have.
        """
        from .in_memory import share  # seconds of import

        return share(model, class_of_type(model.config.model_type, type(model).__name__), fields)
