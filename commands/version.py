# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""`learnpruner --version`: what a report of a bug needs, found without importing any of it."""

import argparse
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path


def own_version() -> str:
    """`learnpruner.__version__`, read from its file: the metadata of an editable install is as old as the install."""
    source = Path(find_spec("learnpruner").origin).with_name("configuration_learnpruner.py")
    (found,) = re.findall(r'^__version__ = "(.+)"$', source.read_text(encoding="utf-8"), re.MULTILINE)
    return found


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


class Version(argparse.Action):
    """Prints the versions, one a line, and exits. argparse's own action would look them up for every command."""

    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser, namespace, values, option_string=None):
        print(f"learnpruner {own_version()}")
        for package in ("transformers", "torch"):
            print(f"{package} {installed(package)}")
        parser.exit()
