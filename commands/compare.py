# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
import argparse
from pathlib import Path

from .arguments import positive, ratio

PURPOSE = "one question about one image, pruned and unpruned, and what was kept"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hub id or folder of a stock or a pruned checkpoint, with its processor")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--question", required=True)
    parser.add_argument("--ratio", type=ratio, help="default: the checkpoint's")
    parser.add_argument("--max-new-tokens", type=positive, default=32)
    parser.add_argument("--trust-remote-code", action="store_true", help="run the processor's own code, if it has any")
    parser.add_argument("--picture", type=Path, help="write the image with the kept patches of both cuts here (PNG)")


def run(**options) -> None:
    from learnpruner.compare import compare_file

    print(compare_file(**options))
