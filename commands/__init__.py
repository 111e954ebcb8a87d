# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The `learnpruner` command, one file a subcommand.

It is a package beside `learnpruner`, because `learnpruner` loads torch: help, versions and wrong arguments are answered
before that. A subcommand's file has a `PURPOSE` for the help, `add(parser)` for its arguments, and `run`, which takes
the arguments by name, loads what it needs, and returns the exit status where that is not 0.
"""

import sys

from . import budget, calibrate_hawk, compare, diagnose, doctor, push, train, verify
from .arguments import Parser
from .version import Version

COMMANDS = {
    "budget": budget,
    "calibrate-hawk": calibrate_hawk,
    "compare": compare,
    "diagnose": diagnose,
    "doctor": doctor,
    "push": push,
    "train": train,
    "verify": verify,
}


def make_parser() -> Parser:
    parser = Parser(prog="learnpruner", description="Visual token pruning for Hugging Face VLMs.")
    parser.add_argument("--version", action=Version, help="the versions of learnpruner, transformers and torch")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.PURPOSE, description=command.PURPOSE)
        command.add(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit status: 2, with one line on stderr, where the input is bad."""
    options = vars(make_parser().parse_args(argv))
    run = options.pop("run")
    # Only now: these load huggingface_hub.
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        return run(**options) or 0
    except (
        *(OSError, ValueError, ImportError, RuntimeError, FloatingPointError),
        *(SafetensorError, StrictDataclassError),  # of weights, and of a configuration's fields
    ) as error:
        # Messages of transformers run over several lines.
        print(f"learnpruner: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
