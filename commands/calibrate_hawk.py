# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
import argparse
from pathlib import Path

from .arguments import positive

PURPOSE = "weights of heads for the method hawk, measured"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Hub id or folder, with its processor")
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="JSON or JSON Lines files of questions with answers"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON, for METHODS['hawk'](head_weights=...)")
    parser.add_argument("--image-folder", type=Path, help="where relative image paths start; default: the file's")
    parser.add_argument("--limit", type=positive, help="samples of each file; default: all")
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--max-new-tokens", type=positive, default=16)
    parser.add_argument("--trust-remote-code", action="store_true", help="run the processor's own code, if it has any")


def run(**options) -> None:
    from learnpruner.methods.hawk_calibration import calibrate_files

    print(calibrate_files(**options))
