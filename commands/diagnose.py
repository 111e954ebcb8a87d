# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
import argparse
from pathlib import Path

from .arguments import positive, ratio, times

PURPOSE = "what a model attends to, and what methods keep: figures and a picture"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Hub id or folder of a checkpoint, with its processor")
    parser.add_argument("--data", type=Path, required=True, help="JSON or JSON Lines, as for train; boxes if known")
    parser.add_argument("--output", type=Path, required=True, help="folder of diagnostics.json and diagnostics.png")
    parser.add_argument(
        "--method", nargs="+", metavar="NAME", help="default: learnpruner, and cls_attention where it works"
    )
    parser.add_argument("--ratio", type=ratio, help="default: the checkpoint's")
    parser.add_argument("--accounting", choices=("mean", "cap"), help="the ratio's: mean over layers, or the last cut")
    parser.add_argument("--limit", type=positive, help="images; default: the first 200")
    parser.add_argument("--sink", type=times, help="times the mean attention that make a patch a sink; default: 5")
    parser.add_argument("--batch-size", type=positive)
    parser.add_argument("--trust-remote-code", action="store_true", help="run the processor's own code, if it has any")


def run(**options) -> None:
    from learnpruner.methods.diagnose_command import diagnose

    print(diagnose(**{name: value for name, value in options.items() if value is not None}))
