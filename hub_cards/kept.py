# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What a repository that is pushed to has already, and what of it is as true of what is pushed: that stays."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, logging
from yaml import YAMLError

from learnpruner.configuration_learnpruner import PrunerConfig

from .card import PICTURE, README, TAGS
from .checks import OWN_WEIGHTS
from .records import TRAINING, digests_of, read_results, read_training, weights_digest
from .repository import RESULTS, There

logger = logging.get_logger(__name__)

# Of a configuration: which base a pruner is of, and what decides which tokens it keeps.
BASE = ("base_model_name_or_path", "base_model_revision")
PRUNED = tuple(field.name for field in fields(PrunerConfig) if field.name.startswith("pruner_"))


def download(api: HfApi, there: There, name: str) -> Path:
    return Path(api.hf_hub_download(there.repo_id, name, revision=there.commit))


def card_there(api: HfApi, there: There, license: str | None, tags: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    """License and tags for the new card: what is not given is that of the card in a repository."""
    if README not in there.files:
        return license, tags
    try:
        data = ModelCard.load(download(api, there, README)).data
    except (ValueError, YAMLError) as error:
        logger.warning(f"License and tags of {there.repo_id} are not kept: its card cannot be read ({error}).")
        return license, tags
    own = [tag for tag in data.tags or () if tag not in TAGS]
    return license or data.license, tags or own


def config_there(api: HfApi, there: There) -> dict:
    """The configuration in a repository, or nothing where it has none that can be read."""
    if CONFIG_NAME not in there.files:
        return {}
    try:
        content = json.loads(download(api, there, CONFIG_NAME).read_text())
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def agree(before: Mapping, written: Mapping, fields: Sequence[str]) -> bool:
    return all(name in before and before[name] == written[name] for name in fields)


def results_there(
    api: HfApi, there: There, model: PreTrainedModel, replaced: set[str], of_base: bool
) -> tuple[dict[str, dict], set[str]]:
    """Name -> record, of those in a repository that are of the model's weights and settings; and the paths of those
    that are not. What is no record of this project is neither.

    Args:
        of_base (`bool`): Whether the repository is a pruner alone, as it will be, of the very base. That was compared
            with its records before, and here may be loaded in another dtype, or quantised.
    """
    records = {}
    for name in there.files:
        file = Path(name)
        if file.parent.as_posix() == RESULTS and file.suffix == ".json" and file.name not in replaced:
            try:
                records |= read_results([download(api, there, name)])
            except ValueError:
                logger.warning(f"{name} in {there.repo_id} is no record of benchmarks/, and is left as it is.")
    if not records:
        return {}, set()
    weights = {"pruner_sha256": weights_digest(model, pruner=True)}
    if not of_base:
        weights["base_sha256"] = weights_digest(model)

    def holds(record: Mapping) -> bool:
        if any(record[field] != weights[field] for field in digests_of(record) if field in weights):
            return False
        fields = record.get("fields", {}) if record["pruner_sha256"] else {}
        return all(getattr(model.config, field) == value for field, value in fields.items())

    kept = {name: record for name, record in records.items() if holds(record)}
    return kept, {f"{RESULTS}/{name}" for name in records if name not in kept}


def training_there(api: HfApi, there: There, model: PreTrainedModel) -> dict | None:
    """What a repository says of the training, where it is of the model's pruner."""
    if TRAINING not in there.files:
        return None
    try:
        record = read_training(download(api, there, TRAINING))
    except ValueError:
        return None
    return record if record["pruner_sha256"] == weights_digest(model, pruner=True) else None


def picture_stays(there: There, folder: Path) -> bool:
    """Whether there is a picture in a repository to stay, and the weights in `folder` are those that it has."""
    if PICTURE not in there.files or (folder / PICTURE).exists():
        return False
    weights = [path for path in folder.iterdir() if OWN_WEIGHTS.fullmatch(path.name)]
    files = [(there.files.get(path.name), CommitOperationAdd(path.name, path)) for path in weights]
    return all(file and file.lfs and file.lfs.sha256 == add.upload_info.sha256.hex() for file, add in files)
