# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The factory: any supported checkpoint, or stock model in memory, by its configuration."""

from .families import FAMILIES, model_class


def pruned_class(pretrained_model_name_or_path, config=None, adapter_kwargs=None, **place) -> type:
    """The class for a checkpoint, stock or pruned, by its configuration.

    Args:
        pretrained_model_name_or_path (`str`, *optional*): A Hub id or a folder, of a model or of an adapter for one.
        config (`PreTrainedConfig` or `str`, *optional*): The configuration, or where it is, if not there.
        adapter_kwargs (`dict`, *optional*): Where to find the adapter, if not there.
        place: Where to find them, for example `revision` or `token`.

    Raises:
        `ValueError`: where no class fits the checkpoint.
    """
    from .hub_learnpruner import find_model, read_config  # seconds of import

    path = pretrained_model_name_or_path
    try:
        source = find_model(path, place, adapter_kwargs)[1] if config is None else config
        model_type = read_config(source, place).get("model_type")
    except OSError as error:
        raise OSError(
            f"No checkpoint at {path!r}: it is no folder with a config.json, and no Hub "
            f"repository that can be reached ({str(error).splitlines()[0]})"
        ) from error
    return class_for(model_type, path)
