# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Pushing a pruner: a repository is made whole in a temporary folder, checked, and uploaded in one commit."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.constants import REGEX_COMMIT_OID
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils import CONFIG_NAME, cached_file, logging
from transformers.utils.hub import extract_commit_hash

from learnpruner.auto import LearnPrunerForConditionalGeneration
from learnpruner.hub_learnpruner import HubMixin

from .card import EVALUATIONS, PICTURE, write_card
from .checks import OWN_WEIGHTS, check_code, hub_reached, refuse_weights
from .records import TRAINING, check_recorded_of, check_training, read_results

logger = logging.get_logger(__name__)

RESULTS = "results"


@dataclass(frozen=True)
class Push:
    """What was pushed.

    Attributes:
        repo_id (`str`).
        files (`dict[str, int]`): Path in the repository -> bytes.
        commit ([`CommitInfo`] or `None`): `None` after a dry run.
    """

    repo_id: str
    files: dict[str, int]
    commit: CommitInfo | None

    def __str__(self) -> str:
        total = f"{len(self.files)} files, {sum(self.files.values()):,} bytes"
        done = "nothing was uploaded" if self.commit is None else self.commit.pr_url or self.commit.commit_url
        width = max(map(len, self.files))
        return "\n".join(
            [
                f"{self.repo_id}: {total}; {done}",
                *(f"{name:<{width}} {size:>14,}" for name, size in sorted(self.files.items())),
            ]
        )


def push_pruner(
    model: PreTrainedModel,
    repo_id: str,
    *,
    processor: ProcessorMixin | None = None,
    results: Sequence[str | Path] = (),
    training: dict | None = None,
    picture: str | Path | None = None,
    merged: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str = "Upload pruner",
    commit_description: str | None = None,
    max_shard_size: int | str = "50GB",
    tags: Sequence[str] = (),
    dry_run: bool = False,
) -> Push:
    """Pushes weights, configuration, processor, code, card and results in one commit. What an earlier push left in the
    repository and this one does not have (results of other weights, shards, code) is deleted in the same commit.

    `model.push_to_hub(repo_id, ...)` is this, and returns the commit.

    > What is pushed

    Args:
        model: A model of this project.
        repo_id (`str`): `user/name`, or `name` in the namespace of the token. Made where it does not exist.
        processor ([`ProcessorMixin`], *optional*): Defaults to that of the base.
        results (`list[str]`, *optional*): JSON files of benchmarks/accuracy.py and benchmarks/speed.py.
        training (`dict`, *optional*): A `training.json`. Defaults to that of the [`PrunerTrainer`] that trained the
            model, or of the folder that it was loaded from, where that is of these weights.
        picture (`str`, *optional*): PNG of kept tokens, as [`learnpruner.compare.save_picture`] draws it.
        merged (`bool`): All weights, not the pruner's alone.
        max_shard_size, tags: As in `PreTrainedModel.push_to_hub`; shards are for `merged`.

    > Where

    Args:
        private (`bool`, *optional*): Of a repository that is made.
        revision (`str`, *optional*): Branch, made where it does not exist.
        create_pr (`bool`): A pull request.
        token, commit_message, commit_description: As in `PreTrainedModel.push_to_hub`.
        dry_run (`bool`): Everything but the upload.

    Raises:
        `OSError`: without a token, without rights, and where the Hub does not take the upload. A repository that was
            made for it is removed again.
        `ValueError`: for another model, a name that is not allowed, results or code that are not of this model and
            release, a base that others cannot find, other trainable weights than the pruner's without `merged`, and a
            repository that is public or holds other weights.
    """
    if not isinstance(model, HubMixin):
        raise ValueError(f"{type(model).__name__} is no model of LearnPrunerForConditionalGeneration.")
    validate_repo_id(repo_id)
    if picture is not None and not _is_png(Path(picture)):
        raise ValueError(f"The picture is a PNG file, and {picture} is none.")
    if not dry_run and not (token if isinstance(token, str) else get_token()):
        raise OSError("No token to push with: run `hf auth login`, or set HF_TOKEN (with the right to write).")
    records = read_results(map(Path, results))
    check_recorded_of(model, records)
    training = _training_of(model, training)
    base, base_revision = pushed_base(model, merged, token)
    api = HfApi(token=token)
    with hub_reached(), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "/" not in repo_id and not dry_run:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        if processor is None:
            processor = _processor_of(model, token)
        model.save_pretrained(folder, pruner_only=not merged, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
        for path in map(Path, results):
            (folder / RESULTS).mkdir(exist_ok=True)
            shutil.copy(path, folder / RESULTS)
        if training is not None:
            (folder / TRAINING).write_text(json.dumps(training, indent=1) + "\n")
        if picture is not None:
            shutil.copy(picture, folder / PICTURE)
        write_card(folder, repo_id, model, check_code(folder), records, training, base, base_revision, merged, tags)
        files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
        if dry_run:
            return Push(repo_id, files, None)
        with _repository(api, repo_id, private, None if create_pr else revision) as there:
            added = [CommitOperationAdd(name, folder / name) for name in files]
            stale = [CommitOperationDelete(name) for name in there if _is_own(name) and name not in files]
            commit = api.create_commit(
                repo_id,
                added + stale,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
    return Push(repo_id, files, commit)


def _is_png(path: Path) -> bool:
    return path.is_file() and path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def _is_own(name: str) -> bool:
    """Whether a file of a repository is of a push, and goes where another push does not have it."""
    folder, _, file = name.rpartition("/")
    if folder:
        return folder in (RESULTS, EVALUATIONS)
    own = (PICTURE, TRAINING, "model.safetensors.index.json")
    return file in own or file.endswith(".py") or OWN_WEIGHTS.fullmatch(file) is not None


def _training_of(model: PreTrainedModel, given: dict | None) -> dict | None:
    """The record of the training, with no path of this machine in it. One that is not given is left out, with a
    warning, where it is of other weights: the model may have been trained further since."""
    record = given
    beside = Path(model.name_or_path) / TRAINING
    if given is None:
        record = model._training
        if record is None and beside.is_file():
            record = json.loads(beside.read_text())
    if record is None:
        return None
    try:
        if "pruner_sha256" not in record:
            raise ValueError(f"{TRAINING} does not say of which weights it is (pruner_sha256).")
        check_training(record)
        check_recorded_of(model, {TRAINING: record})
    except ValueError as error:
        if given is not None:
            raise
        logger.warning(f"The card will have no training: {error}")
        return None
    base = record.get("base")
    return {**record, "base": Path(base).name if base and _is_path(base) else base}


def _is_path(base: str) -> bool:
    return os.path.isdir(base) or os.path.isabs(base) or base.startswith(".")


def pushed_base(model: PreTrainedModel, merged: bool, token) -> tuple[str | None, str | None]:
    """The base's Hub id and commit; both `None` where all weights are pushed and it has no Hub id. A revision that
    moves, or none, is pinned in the model's configuration to the commit that it stands for."""
    config = model.config
    named = config.base_model_name_or_path is not None
    base, revision = (config.base_model_name_or_path, config.base_model_revision) if named else model._base
    if merged:
        return (None, None) if base is None or _is_path(base) else (base, revision)
    if not named:
        raise ValueError(
            "No base to name in a repository of a pruner alone: train one on a stock checkpoint "
            "(model.train_pruner_only()), or push all weights, merged=True (--merged)."
        )
    if any(parameter.requires_grad for parameter in model._base_parameters()):
        raise ValueError("More than the pruner is trainable, and would be lost: push all weights, merged=True.")
    if _is_path(base):
        raise ValueError(
            f"The base is {base}, a folder that nobody else has. Load the pruner on the base's copy on the Hub, "
            "from_pretrained(..., base_model_name_or_path='user/base') (--base user/base), or push all weights, "
            "merged=True (--merged)."
        )
    if not REGEX_COMMIT_OID.fullmatch(revision or ""):
        revision = extract_commit_hash(cached_file(base, CONFIG_NAME, revision=revision, token=token), None)
        config.base_model_revision = revision
    return base, revision


def _processor_of(model: PreTrainedModel, token) -> ProcessorMixin:
    config = model.config
    base, revision = config.base_model_name_or_path, config.base_model_revision
    where = base or model.name_or_path
    try:
        place = {"revision": revision} if revision else {}
        return AutoProcessor.from_pretrained(where, token=token, trust_remote_code=False, **place)
    except (OSError, ValueError) as error:
        raise ValueError(f"No processor at {where}: pass one, processor=... ({error})") from error


@contextmanager
def _repository(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> Iterator[list[str]]:
    """Makes what does not exist, and yields the files that are there. If the upload fails, a repository that was made
    for it goes again."""
    made = not api.repo_exists(repo_id)
    if made:
        api.create_repo(repo_id, private=private)
    elif private and not api.model_info(repo_id).private:
        raise ValueError(f"{repo_id} is public: make it private in its settings, or push to a new one.")
    try:
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision)
        refuse_weights(there, repo_id)
        yield there
    except BaseException:
        # What went wrong is raised, not what else does. A commit may have arrived though its answer did not.
        with suppress(HTTPError):
            if made and set(api.list_repo_files(repo_id)) <= {".gitattributes"}:
                api.delete_repo(repo_id)
        raise


def push_checkpoint(checkpoint: str, repo_id: str, base: str | None = None, **options) -> Push:
    """The `learnpruner push` command: a folder or a Hub id to a repository.

    Args:
        base (`str`, *optional*): Hub id of the base, in place of what the checkpoint names.
        options: Those of [`push_pruner`].
    """
    read_results(map(Path, options.get("results", ())))  # before any weight is read
    folder = Path(checkpoint)
    if folder.is_dir():
        refuse_weights([path.name for path in folder.iterdir() if path.is_file()], checkpoint, folder)
        check_code(folder)
    options_of_base = {} if base is None else {"base_model_name_or_path": base}
    model = LearnPrunerForConditionalGeneration.from_pretrained(checkpoint, dtype="auto", **options_of_base)
    return push_pruner(model, repo_id, **options)
