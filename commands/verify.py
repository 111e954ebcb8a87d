# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
import argparse
from pathlib import Path

from .arguments import ratio

PURPOSE = "a pruner's files, code and recorded results, before it is trusted"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="Hub id or folder")
    parser.add_argument("--revision", help="commit, tag or branch of a Hub id")
    parser.add_argument("--image", type=Path, help="default: a plain one")
    parser.add_argument("--question", default="What is this?")
    parser.add_argument("--ratio", type=ratio, help="default: the checkpoint's")


def run(**options) -> None:
    from learnpruner.hub_cards import verify

    print(verify(**options))
