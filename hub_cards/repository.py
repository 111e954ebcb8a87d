# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The repository that is pushed to: who may write there, what it holds, and what is undone where a push fails."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import PurePosixPath

from huggingface_hub import HfApi, RepoFile, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

from .card import DATA_SET, EVALUATIONS, PICTURE
from .checks import OWN_WEIGHTS, PROCESSOR_FILES, refuse_weights
from .records import TRAINING

RESULTS = "results"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TEMPLATES = ("chat_template.jinja", "chat_template.json")
# What a push writes beside the card, the configurations and results, and another push may not.
OWN = {PICTURE, TRAINING, "model.safetensors.index.json", *PROCESSOR_FILES, *TOKENIZER_FILES, *TEMPLATES}
OWN_PATHS = re.compile(
    rf"{OWN_WEIGHTS.pattern}|\w+_learnpruner\w*\.py|{re.escape(f'{EVALUATIONS}/{DATA_SET}-')}[^/]+\.yaml"
    r"|additional_chat_templates/[^/]+\.jinja"
)


def is_own(name: str) -> bool:
    """Whether only a push of this project writes a file of that name; records in `results/` are told by their
    content."""
    return name in OWN or OWN_PATHS.fullmatch(name) is not None


@dataclass(frozen=True)
class There:
    """A repository as it was before a push.

    Attributes:
        commit (`str` or `None`): Of the branch, or of main where there is no such branch; `None`: no repository.
        files (`dict[str, RepoFile]`): Path -> size and hash, at that commit.
        new_branch (`bool`): Whether the branch is not there.
    """

    repo_id: str
    revision: str | None
    commit: str | None = None
    files: dict[str, RepoFile] | None = None
    new_branch: bool = False


def signed_in(token: str | bool | None) -> bool:
    return bool(token if isinstance(token, str) else get_token())


def writable(api: HfApi, repo_id: str, create_pr: bool = False) -> str:
    """The whole id of a repository, `user/name`, in whose namespace the token may write.

    Raises:
        `OSError`: without a token, and where it has no such right.
    """
    if not signed_in(api.token):
        raise OSError("No token to push with: run `hf auth login`, or set HF_TOKEN (with the right to write).")
    account = api.whoami()
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise OSError("The token has no rights but to read: make one with the right to write.")
    user = account["name"]
    namespace = repo_id.rpartition("/")[0] or user
    if namespace not in (user, *(org["name"] for org in account["orgs"])) and not create_pr:
        raise OSError(f"{user} has no rights in the namespace of {repo_id}: push to {user}/..., or with create_pr.")
    return f"{namespace}/{repo_id.rpartition('/')[2]}"


def find(api: HfApi, repo_id: str, revision: str | None, private: bool | None, create_pr: bool) -> There:
    """What is there.

    Raises:
        `ValueError`: where it is public and is to be private, and where it holds pickles, other weights or code of
            others, which would run with the pruner's, or a `.gitignore`.
    """
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return There(repo_id, revision)
    if private and not info.private:
        raise ValueError(f"{repo_id} is public: make it private in its settings, or push to a new one.")
    new_branch = False
    if revision is not None:
        try:
            info = api.model_info(repo_id, revision=revision)
        except RevisionNotFoundError:
            if create_pr or revision.startswith("refs/"):
                raise
            new_branch = True
    tree = api.list_repo_tree(repo_id, recursive=True, revision=info.sha)
    files = {file.path: file for file in tree if isinstance(file, RepoFile)}
    refuse_weights(files, repo_id)
    if code := sorted(n for n in files if n.lower().endswith(".py") and not is_own(n)):
        raise ValueError(
            f"{repo_id} has code that is not this project's, and that may run where the pruner is opened: "
            f"{', '.join(code)}. Remove it, or push to another repository."
        )
    if ".gitignore" in (PurePosixPath(name).name for name in files):
        raise ValueError(
            f"{repo_id} has a .gitignore, by which the Hub leaves out files of a push without a word: remove it."
        )
    return There(repo_id, revision, info.sha, files, new_branch)


@contextmanager
def open_for_push(api: HfApi, there: There, private: bool | None, create_pr: bool) -> Iterator[str]:
    """Makes the repository and the branch where they do not exist, and yields the commit to push onto. What was made
    goes again where the push fails."""
    repo_id, branch, commit = there.repo_id, None, there.commit
    if commit is None:
        api.create_repo(repo_id, private=private)
    try:
        if commit is None:
            commit = api.model_info(repo_id).sha
        if there.new_branch or (there.commit is None and there.revision not in (None, "main") and not create_pr):
            api.create_branch(repo_id, branch=there.revision, revision=commit)
            branch = there.revision
        yield commit
    except BaseException as error:
        # What went wrong is raised, not what else does. A commit may have arrived though its answer did not.
        with suppress(HTTPError):
            untouched = api.model_info(repo_id, revision=branch).sha == commit
            if untouched and there.commit is None:
                api.delete_repo(repo_id)
            elif untouched and branch is not None:
                api.delete_branch(repo_id, branch=branch)
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 412:
            raise OSError(f"Somebody pushed to {repo_id} in between: push again.") from error
        raise
