# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What makes a checkpoint safe to open: safetensors of this project alone, and code that is this release's own."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

# Of httpx, or from huggingface_hub 2.0 on of httpx2.
from huggingface_hub.errors import HfHubHTTPError, HTTPError

import learnpruner

OWN_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".dill"}
OTHER_WEIGHTS = {".safetensors", ".gguf", ".ggml", ".h5", ".keras", ".msgpack", ".onnx", ".pb", ".tflite"}


# Keys of configurations that name code, and the file that names another model to open in place of this one.
CODE = {"auto_map", "custom_pipelines", "custom_generate"}
ADAPTER = "adapter_config.json"


def refuse_weights(names: Iterable[str], where: str) -> None:
    """Raises `ValueError` where a file is a pickle, which runs code when it is opened, or holds other weights than
    `model.safetensors` and its shards.

    Args:
        names: Paths of the files, relative to the checkpoint.
        where (`str`): What the message calls the checkpoint.
    """
    paths = sorted(map(PurePosixPath, names))
    if pickles := [str(path) for path in paths if path.suffix.lower() in PICKLES]:
        raise ValueError(
            f"{where} has pickled files, which run code when they are opened: {', '.join(pickles)}. Remove them, or "
            "save the model alone: model.save_pretrained(folder)."
        )
    if ADAPTER in map(str, paths):
        raise ValueError(
            f"{where} has an {ADAPTER}: whoever opens it would be sent to the model that it names. Remove it."
        )
    others = [str(p) for p in paths if p.suffix.lower() in OTHER_WEIGHTS and not OWN_WEIGHTS.fullmatch(str(p))]
    if others:
        raise ValueError(f"{where} has weights that are not this model's: {', '.join(others)}. Remove them.")


def check_code(folder: Path) -> dict[str, str]:
    """Name -> sha256 of the code files that opening the checkpoint in `folder` executes.

    Raises:
        `ValueError`: where one is not, byte for byte, a file of this release, or code of another place is named.
    """
    release = {path.name: _sha256(path) for path in Path(learnpruner.__file__).parent.glob("*_learnpruner*.py")}
    found = {path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(folder.rglob("*.py"))}
    for name, digest in found.items():
        own = release.get(PurePosixPath(name).name)
        if own != digest:
            raise ValueError(
                f"{name} in {folder} is not the file of learnpruner {learnpruner.__version__} (sha256 {digest}, here "
                f"{own or 'none of that name'}): it was changed, or is of another release. Do not run it; "
                "the weights open without it by LearnPrunerForConditionalGeneration.from_pretrained."
            )
    for path in sorted(folder.rglob("*.json")):
        try:
            references = list(_named_code(json.loads(path.read_text())))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON ({error})") from error
        for reference in references:
            # Code of another repository would be named `user/repo--module.Class`.
            module = re.fullmatch(r"(\w+)\.\w+", reference)
            if module is None or f"{module[1]}.py" not in release:
                raise ValueError(f"{path} names code that is not this release's: {reference}. Do not run it.")
    return found


def _named_code(content, named: bool = False) -> Iterator[str]:
    """All strings of a JSON value below the keys under which transformers looks for code, however deep they are:
    processors have configurations within their own."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _named_code(value, named or name in CODE)
    elif isinstance(content, list):
        for value in content:
            yield from _named_code(value, named)
    elif named and isinstance(content, str):
        yield content


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def hub_reached():
    """A Hub that does not answer, or does not take a file, is an `OSError` that says why."""
    try:
        yield
    except HfHubHTTPError:
        raise
    except RuntimeError as error:
        # huggingface_hub names the file that failed, and keeps the reason as the cause.
        raise OSError(f"{error} {error.__cause__ or ''}") from error
    except HTTPError as error:
        raise ConnectionError(f"The Hub cannot be reached ({error}): try again later.") from error
