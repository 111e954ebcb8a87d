# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What makes a checkpoint safe to open: safetensors of this project alone, and code that is this release's own."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

# Of httpx, or from huggingface_hub 2.0 on of httpx2.
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, cached_file

import learnpruner

OWN_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
# Pickles, and archives of them.
PICKLES = {".bin", ".pt", ".pth", ".th", ".mar", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".dill"}
MACHINE_CODE = {".so", ".dll", ".dylib", ".exe", ".pyc", ".pyd", ".pyo"}
OTHER_WEIGHTS = {".safetensors", ".gguf", ".ggml", ".h5", ".keras", ".msgpack", ".onnx", ".pb", ".tflite"}
# Of pickles from protocol 2 on, and of the zip archives in which torch saves.
PICKLED = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04")
# What else a repository of a pruner holds: code, which is compared with the release's, and what nobody executes.
KNOWN = re.compile(
    r"(LICENSE|NOTICE)[\w-]*|\.gitattributes|\.gitignore"
    r"|.*\.py|(?i:.*\.(json|ya?ml|md|txt|jinja|png|jpe?g|gif|webp|model))"
)
# Beside a download or a clone; nothing is loaded from there.
NOT_READ = (".cache", ".git")

# The file of the shipped code that says of which release it is.
CONFIGURATION = "configuration_learnpruner.py"

# Keys of configurations that name code, those whose value may name a repository of kernels to run, and the file that
# names another model to open in place of this one.
CODE = {"auto_map", "custom_pipelines", "custom_generate"}
KERNEL = re.compile(r".*_implementation(_internal)?")
ADAPTER = "adapter_config.json"
PROCESSOR_FILES = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME)


def list_files(folder: Path) -> list[str]:
    """Paths of all files of a local folder, relative to it.

    Raises:
        `ValueError`: where a link leads out of it, to what is not looked at here.
    """
    names = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if name.parts[0] in NOT_READ:
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{name} in {folder} is a link to a place outside: put the file itself there. What was downloaded "
                "into the cache is named by its Hub id."
            )
        if path.is_file():
            names.append(name.as_posix())
    return names


def refuse_weights(names: Iterable[str], where: str, folder: Path | None = None) -> None:
    """Raises `ValueError` where a file is a pickle or machine code, or holds other weights than `model.safetensors`
    and its shards.

    Args:
        names: Paths of the files, relative to the checkpoint.
        where (`str`): What the message calls the checkpoint.
        folder (`Path`, *optional*): Where the files are. Then they are opened, too: a pickle may have any name.
    """
    paths = sorted(map(PurePosixPath, names))

    def of(kinds: set[str]) -> list[str]:
        # model.pth.tar and state.pkl.gz are pickles, too.
        return [
            str(path)
            for path in paths
            if kinds & {suffix.lower() for suffix in path.suffixes} and not KNOWN.fullmatch(path.name)
        ]

    pickles = set(of(PICKLES))
    if folder is not None:
        # safetensors begin with a length, which may be any bytes, and open as nothing else.
        others = (path for path in paths if not OWN_WEIGHTS.fullmatch(str(path)))
        pickles |= {str(path) for path in others if PICKLED.match(_start(folder / path))}
    if pickles:
        raise ValueError(
            f"{where} has pickled files, which run code when they are opened: {', '.join(sorted(pickles))}. Remove "
            "them, or save the model alone: model.save_pretrained(folder)."
        )
    if compiled := of(MACHINE_CODE):
        raise ValueError(f"{where} has compiled code, which nobody can read: {', '.join(compiled)}. Remove it.")
    if ADAPTER in map(str, paths):
        raise ValueError(
            f"{where} has an {ADAPTER}: whoever opens it would be sent to the model that it names. Remove it."
        )
    if others := [name for name in of(OTHER_WEIGHTS) if not OWN_WEIGHTS.fullmatch(name)]:
        raise ValueError(f"{where} has weights that are not this model's: {', '.join(others)}. Remove them.")


def refuse_unknown(names: Iterable[str], where: str) -> None:
    """Raises `ValueError` where a file is of no kind that a repository of a pruner holds: weights and code of this
    project, texts, pictures, and what a tokenizer reads."""
    if unknown := [name for name in sorted(names) if not _is_known(PurePosixPath(name))]:
        raise ValueError(
            f"{where} has files of a kind that a pruner's repository does not hold: {', '.join(unknown)}. Remove them."
        )


def _is_known(path: PurePosixPath) -> bool:
    return bool(OWN_WEIGHTS.fullmatch(str(path)) or KNOWN.fullmatch(path.name))


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


def check_code(folder: Path) -> dict[str, str]:
    """Name -> sha256 of the code files that opening the checkpoint in `folder` executes.

    Raises:
        `ValueError`: where one is not, byte for byte, a file of this release, and where a JSON file names code or
            kernels of another place, or weights that are not `model.safetensors` and its shards.
    """
    release = _release()
    refuse_processor_code(str(folder))
    files = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() == ".py")
    found = {path.relative_to(folder).as_posix(): _sha256(path) for path in files}
    for name, digest in found.items():
        own = release.get(PurePosixPath(name).name)
        if own != digest:
            raise ValueError(
                f"{name} in {folder} is not the file of learnpruner {learnpruner.__version__} (sha256 {digest}, here "
                f"{own or 'none of that name'}): it was changed, or is of another release.{of_release(folder)} Do not "
                "run it; the weights open without it by LearnPrunerForConditionalGeneration.from_pretrained."
            )
    for path in sorted(folder.rglob("*.json")):
        content = _json(path)
        if path == folder / CONFIG_NAME and not (isinstance(content, dict) and _is_text(content, "model_type")):
            raise ValueError(f"{path} is no configuration: it does not say by a text what its model_type is.")
        for reference in _named(content, CODE.__contains__):
            if not _is_of(release, reference):
                raise ValueError(f"{path} names code that is not this release's: {reference}. Do not run it.")
        for reference in _named(content, KERNEL.fullmatch):
            if "/" in reference:
                raise ValueError(f"{path} names kernels of another repository to run: {reference}. Remove that.")
        for reference in _named(content, "weight_map".__eq__):
            if not OWN_WEIGHTS.fullmatch(reference):
                raise ValueError(f"{path} names weights that are not this model's: {reference}. Do not open it.")
    return found


def _release() -> dict[str, str]:
    return {path.name: _sha256(path) for path in Path(learnpruner.__file__).parent.glob("*_learnpruner*.py")}


def refuse_processor_code(where: str, **place) -> None:
    """Raises `ValueError` where a processor needs code that is not this release's.

    Args:
        where (`str`): A folder or a Hub id.
        place: `revision` and `token`, as for `from_pretrained`.
    """
    for name in (*PROCESSOR_FILES, "tokenizer_config.json"):
        path = cached_file(where, name, _raise_exceptions_for_missing_entries=False, **place)
        for reference in _named(_json(Path(path)), CODE.__contains__) if path else ():
            if not _is_of(_release(), reference):
                raise ValueError(
                    f"The processor at {where} runs code of its own, {reference} by its {name}, which is not run here "
                    "and may not be in a repository of this project. Save a processor of a class of transformers with "
                    "the checkpoint: processor.save_pretrained(folder)."
                )


def _is_of(release: Mapping[str, str], reference: str) -> bool:
    # Code of another repository would be named `user/repo--module.Class`.
    module = re.fullmatch(r"(\w+)\.\w+", reference)
    return module is not None and f"{module[1]}.py" in release


def _json(path: Path):
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error


def of_release(folder: Path) -> str:
    """How to verify what another release wrote, by what its code says of itself. A configuration keeps the release that
    wrote it first, so that it speaks for the code only where there is none."""
    code, config = folder / CONFIGURATION, folder / CONFIG_NAME
    if code.is_file():
        found = re.search(r'^__version__ = "(.*)"$', code.read_text(errors="replace"), re.MULTILINE)
        what, written = "Its code is of", found[1] if found else ""
    else:
        content = _json(config) if config.is_file() else None
        what = "Its configuration was written by"
        written = str(content.get("learnpruner_version")) if isinstance(content, dict) else ""
    if written == learnpruner.__version__ or not re.fullmatch(r"\d+[\w.]*", written):
        return ""
    return f" {what} {written}: `pip install learnpruner=={written}` to verify it."


def _is_text(content: Mapping, name: str) -> bool:
    return isinstance(content.get(name), str)


def _named(content, is_meant: Callable[[str], object], below: bool = False) -> Iterator[str]:
    """All strings of a JSON value below the keys that are meant, however deep they are: processors and models have
    configurations within their own."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _named(value, is_meant, below or bool(is_meant(name)))
    elif isinstance(content, list):
        for value in content:
            yield from _named(value, is_meant, below)
    elif below and isinstance(content, str):
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
