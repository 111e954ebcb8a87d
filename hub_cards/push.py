# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Pushing a pruner: a repository is made whole in a temporary folder, checked, and uploaded in one commit."""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HTTPError
from huggingface_hub.file_download import REGEX_COMMIT_HASH
from huggingface_hub.utils import validate_repo_id
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils import CONFIG_NAME, cached_file, logging
from transformers.utils.hub import extract_commit_hash

from learnpruner.auto import LearnPrunerForConditionalGeneration
from learnpruner.hub_learnpruner import HubMixin, trains_base

from .card import PICTURE, write_card
from .checks import PROCESSOR_FILES, check_code, hub_reached, refuse_processor_code, refuse_weights
from .kept import BASE, PRUNED, agree, card_there, config_there, download, picture_stays, results_there, training_there
from .records import TRAINING, check_recorded_of, check_training, read_results, read_training
from .repository import RESULTS, There, find, is_own, open_for_push, signed_in, writable

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Push:
    """What was pushed.

    Attributes:
        repo_id (`str`).
        files (`dict[str, int]`): Path in the repository -> bytes.
        commit ([`CommitInfo`] or `None`): `None` after a dry run.
        deleted (`list[str]` or `None`): Paths that were in the repository and are not in the commit. `None` after a
            dry run that could not read it.
    """

    repo_id: str
    files: dict[str, int]
    commit: CommitInfo | None
    deleted: list[str] | None

    def __str__(self) -> str:
        total = f"{len(self.files)} files, {sum(self.files.values()):,} bytes"
        done = "nothing was uploaded" if self.commit is None else self.commit.pr_url or self.commit.commit_url
        unknown = "; what it would delete is not known: the repository could not be read" * (self.deleted is None)
        rows = [(name, f"{size:,}") for name, size in sorted(self.files.items())]
        rows += [(name, "deleted") for name in self.deleted or ()]
        width = max(len(name) for name, _ in rows)
        return "\n".join(
            [f"{self.repo_id}: {total}; {done}{unknown}", *(f"{name:<{width}} {text:>14}" for name, text in rows)]
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
    license: str | None = None,
    dry_run: bool = False,
) -> Push:
    """Pushes weights, configuration, processor, code, card and results in one commit.

    Where the repository has results, picture or training of these very weights, they stay, and are on the new card;
    those of other weights, and what else an earlier push left (shards, code, processor files), are deleted in the same
    commit and listed in [`Push`]. The card is written anew each time, over whatever stood in README.md. Files that no
    push writes are left alone. A push by somebody else in the meantime is an error, and nothing is overwritten.

    `model.push_to_hub(repo_id, ...)` is this, and returns the commit.

    > What is pushed

    Args:
        model: A model of this project.
        repo_id (`str`): `user/name`, or `name` in the namespace of the token. Made where it does not exist.
        processor ([`ProcessorMixin`], *optional*): Of a stock class. Defaults to that of the checkpoint that the model
            was loaded from, or of its base where that has none.
        results (`list[str]`, *optional*): JSON files of benchmarks/accuracy.py and benchmarks/speed.py.
        training (`dict`, *optional*): A `training.json`. Defaults to that of the [`PrunerTrainer`] that trained the
            model, or of the folder that it was loaded from, where that is of these weights.
        picture (`str`, *optional*): PNG of kept tokens, as [`learnpruner.compare.save_picture`] draws it.
        merged (`bool`): All weights, not the pruner's alone.
        max_shard_size, tags: As in `PreTrainedModel.push_to_hub`; shards are for `merged`.
        license (`str`, *optional*): SPDX identifier, for the card. It and `tags` default to those of the card that the
            repository has.

    > Where

    Args:
        private (`bool`, *optional*): Of a repository that is made.
        revision (`str`, *optional*): Branch, made where it does not exist.
        create_pr (`bool`): A pull request, to `revision`.
        token, commit_message, commit_description: As in `PreTrainedModel.push_to_hub`.
        dry_run (`bool`): Everything but the upload. Needs no token for a public repository, and no Hub for a base that
            is in the cache.

    Raises:
        `OSError`: without a token, without rights, where somebody else pushed meanwhile, and where the Hub does not
            take the upload. A repository or branch that was made for it is removed again.
        `ValueError`: for another model, a name that is not allowed, results or code that are not of this model and
            release, a base that others cannot find, without `merged` a base that was changed (by a merged adapter) or
            is trainable, a processor with code of its own, and a repository that is public, or holds other weights,
            code of others or a `.gitignore`.
    """
    check_model(model)
    validate_repo_id(repo_id)
    if picture is not None and not _is_png(Path(picture)):
        raise ValueError(f"The picture is a PNG file, and {picture} is none.")
    records = read_results(map(Path, results))
    check_recorded_of(model, records)
    training = _training_of(model, training)
    base, base_revision = pin_base(model, merged, token)
    api = HfApi(token=token)
    with hub_reached(), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if dry_run:
            there = _found_for_dry_run(api, repo_id, revision, private, create_pr)
        else:
            repo_id = writable(api, repo_id, create_pr)
            there = find(api, repo_id, revision, private, create_pr)
        if processor is None:
            processor = _processor_of(model, token)
        _check_stock(processor)
        model.save_pretrained(folder, pruner_only=not merged, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
        for path in map(Path, results):
            (folder / RESULTS).mkdir(exist_ok=True)
            shutil.copy(path, folder / RESULTS)
        if picture is not None:
            shutil.copy(picture, folder / PICTURE)
        outdated: set[str] = set()
        if there is not None and there.files:
            before = config_there(api, there)
            written = json.loads((folder / CONFIG_NAME).read_text())
            of_base = not merged and agree(before, written, BASE)
            kept, outdated = results_there(api, there, model, set(records), of_base)
            records |= kept
            if training is None:
                training = training_there(api, there, model)
            license, tags = card_there(api, there, license, tags)
            stays = agree(before, written, BASE + PRUNED) and picture_stays(there, folder)
            for name in [f"{RESULTS}/{name}" for name in kept] + [PICTURE] * stays:
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copy(download(api, there, name), folder / name)
        if training is not None:
            (folder / TRAINING).write_text(json.dumps(training, indent=1) + "\n")
        code = check_code(folder)
        write_card(folder, repo_id, model, code, records, training, base, base_revision, merged, tags, license)
        files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
        deleted = None
        if there is not None:
            deleted = sorted(n for n in there.files or () if n not in files and (is_own(n) or n in outdated))
        if dry_run:
            return Push(repo_id, files, None, deleted)
        with open_for_push(api, there, private, create_pr) as parent:
            added = [CommitOperationAdd(name, folder / name) for name in files]
            commit = api.create_commit(
                repo_id,
                added + [CommitOperationDelete(name) for name in deleted],
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent,
            )
    return Push(repo_id, files, commit, deleted)


def _found_for_dry_run(api: HfApi, repo_id: str, *options) -> There | None:
    """`None`: not to be told, for want of a token or of a Hub that answers."""
    try:
        if "/" not in repo_id:
            repo_id = writable(api, repo_id)
        there = find(api, repo_id, *options)
    except (OSError, HTTPError):
        return None
    # Without a token, a private repository looks like none.
    return there if there.commit is not None or signed_in(api.token) else None


def check_model(model) -> None:
    if not isinstance(model, HubMixin):
        raise ValueError(f"{type(model).__name__} is no model of LearnPrunerForConditionalGeneration.")


def _is_png(path: Path) -> bool:
    return path.is_file() and path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def _training_of(model: PreTrainedModel, given: dict | None) -> dict | None:
    """The record of the training, with no path of this machine in it. One that is not given is left out, with a
    warning, where it is of other weights: the model may have been trained further since."""
    record = given
    beside = Path(model.name_or_path) / TRAINING
    try:
        if given is None:
            record = model.training_record
            if record is None and beside.is_file():
                record = read_training(beside)
        if record is None:
            return None
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


def pin_base(model: PreTrainedModel, merged: bool, token) -> tuple[str | None, str | None]:
    """Pins the base: a revision that moves, or none, becomes in the model's configuration the commit that it stands
    for. With `merged`, for which no base is named, it stays.

    Returns:
        The base's Hub id and commit; both `None` where all weights are pushed and it has no Hub id.

    Raises:
        `ValueError`: without `merged`, where there is no base that others could put the pruner on.
    """
    config = model.config
    named = config.base_model_name_or_path is not None
    base, revision = model.base.name, model.base.revision
    if named:
        base, revision = config.base_model_name_or_path, config.base_model_revision
    if merged:
        return (None, None) if base is None or _is_path(base) else (base, revision)
    if not named:
        raise ValueError(
            "No base to name in a repository of a pruner alone: train one on a stock checkpoint "
            "(model.train_pruner_only()), or push all weights, merged=True (--merged)."
        )
    if trains_base(model):
        raise ValueError("More than the pruner is trainable, and would be lost: push all weights, merged=True.")
    if model.base.changed(model):
        raise ValueError(
            "The base is not what was loaded (an adapter was merged into it?), and the pruner alone would lose that: "
            "push all weights, merged=True (--merged)."
        )
    if _is_path(base):
        raise ValueError(
            f"The base is {base}, a folder that nobody else has. Load the pruner on the base's copy on the Hub, "
            "from_pretrained(..., base_model_name_or_path='user/base') (--base user/base), or push all weights, "
            "merged=True (--merged)."
        )
    if not REGEX_COMMIT_HASH.fullmatch(revision or ""):
        revision = extract_commit_hash(cached_file(base, CONFIG_NAME, revision=revision, token=token), None)
        config.base_model_revision = revision
    return base, revision


def _processor_of(model: PreTrainedModel, token) -> ProcessorMixin:
    """That of the checkpoint that the model was loaded from, or else of its base."""
    config = model.config
    own = model.name_or_path, getattr(config, "_commit_hash", None)
    base = config.base_model_name_or_path, config.base_model_revision
    for where, revision in (own, base):
        place = {"token": token, **({"revision": revision} if revision else {})}
        if not where or not any(_file(where, name, place) for name in PROCESSOR_FILES):
            continue
        refuse_processor_code(where, **place)
        return AutoProcessor.from_pretrained(where, trust_remote_code=False, **place)
    raise ValueError(f"No processor at {base[0] or own[0] or 'the model'}: pass one, processor=...")


def _file(where: str, name: str, place: dict) -> str | None:
    try:
        return cached_file(where, name, _raise_exceptions_for_missing_entries=False, **place)
    except OSError:  # a folder that is gone, or a repository that cannot be read
        return None


def _check_stock(processor: ProcessorMixin) -> None:
    """Raises `ValueError` for what is no processor, such as a tokenizer alone, and where one, or a part of it, is of a
    class that others do not have."""
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"{type(processor).__name__} is no processor, which images need, too: pass processor=AutoProcessor..., or "
            "leave it out for that of the checkpoint or its base."
        )
    for part in (processor, *(getattr(processor, name) for name in processor.get_attributes())):
        if not type(part).__module__.startswith("transformers."):
            raise ValueError(
                f"{type(part).__name__} runs code of its own, which may not be in a repository of this project: pass "
                "processor=... of a class of transformers."
            )


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
