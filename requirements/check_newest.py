# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Fails unless the installed packages are the newest on the index: `check_newest.py CONSTRAINTS PACKAGE...`.

pip takes an older release of one package where the newest of another does not allow more, and says nothing. Newest is
what pip alone would install into this Python, without pre-releases and what the file of constraints excludes.
"""

import json
import subprocess
import sys
from importlib.metadata import version


def newest_on_index(constraints: str, names: list[str]) -> dict[str, str]:
    """The newest release of each package, asked of pip, which installs nothing."""
    found = {}
    for name in names:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
        command += ["--report", "-", "--constraint", constraints, name]
        report = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        (install,) = json.loads(report)["install"]
        found[name] = install["metadata"]["version"]
    return found


def older(installed: dict[str, str], newest: dict[str, str]) -> list[str]:
    """A line for each package that is not the newest."""
    return [
        f"{name} {installed[name]} is installed, and {newest[name]} is the newest on the index"
        for name in newest
        if installed[name] != newest[name]
    ]


if __name__ == "__main__":
    constraints, *names = sys.argv[1:]
    installed = {name: version(name) for name in names}
    wrong = older(installed, newest_on_index(constraints, names))
    print("installed:", ", ".join(f"{name} {release}" for name, release in installed.items()))
    if wrong:
        sys.exit("\n".join(wrong) + f"\nA release that is broken in itself is excluded in {constraints}.")
