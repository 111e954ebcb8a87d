# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Raises the caps of transformers and huggingface_hub to the releases that are installed beside this Python.

`make raise` calls it after the tests passed on the newest releases. The caps are where a user's pip reads them
(`pyproject.toml`, the Space's requirements), and `NEWEST_TESTED` is what the package says of itself.
"""

import ast
import re
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CAPPED = ("pyproject.toml", "hub_cards/space/requirements.txt")


def cap_of_transformers(release: str) -> str:
    """The first minor release above `release`: 5.24 for 5.23.1."""
    major, minor = release.split(".")[:2]
    return f"{major}.{int(minor) + 1}"


def cap_of_hub(release: str) -> str:
    """The first major release above `release`: 3 for 2.4.0."""
    return str(int(release.split(".")[0]) + 1)


def recap(text: str, name: str, cap: str) -> str:
    """`text` with the upper bound of the requirement `name>=X,<Y` replaced.

    Raises:
        `ValueError`: where the text does not have that requirement exactly once.
    """
    text, count = re.subn(rf"\b({name}>=[\d.]+,<)[\d.]+", rf"\g<1>{cap}", text)
    if count != 1:
        raise ValueError(f"expected one requirement {name}>=X,<Y and found {count}")
    return text


def find_constant(folder: Path, constant: str) -> tuple[Path, ast.expr]:
    """The file of `folder` that assigns `constant` at its top level, and the assigned expression.

    Raises:
        `ValueError`: where not exactly one file does.
    """
    found = []
    for path in sorted(folder.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.Assign):
                continue
            target, value = node.targets[0], node.value
            pairs = zip(target.elts, value.elts) if isinstance(target, ast.Tuple) else [(target, value)]
            found += [(path, value) for name, value in pairs if getattr(name, "id", None) == constant]
    if len(found) != 1:
        raise ValueError(f"expected one assignment of {constant} in {folder} and found {len(found)}")
    return found[0]


def raise_caps(root: Path, transformers: str, huggingface_hub: str) -> None:
    """Writes the caps that allow these two releases, and no newer minor and major, into the files below `root`."""
    for name in CAPPED:
        path = root / name
        text = recap(path.read_text(), "transformers", cap_of_transformers(transformers))
        path.write_text(recap(text, "huggingface_hub", cap_of_hub(huggingface_hub)))
    path, value = find_constant(root / "modeling", "NEWEST_TESTED")
    lines = path.read_text().splitlines(keepends=True)
    line = lines[value.lineno - 1]
    major, minor = transformers.split(".")[:2]
    lines[value.lineno - 1] = f"{line[: value.col_offset]}({major}, {minor}){line[value.end_col_offset :]}"
    path.write_text("".join(lines))


if __name__ == "__main__":
    raise_caps(ROOT, version("transformers"), version("huggingface_hub"))
