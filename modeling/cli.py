# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The `learnpruner` command: a thin dispatcher. Each subcommand adds its arguments and names the function that runs."""

import argparse
import sys
from fractions import Fraction
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError


class Parser(argparse.ArgumentParser):
    """Bad arguments are one line on stderr, as all bad input is."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def ratio(text: str) -> float:
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        value = 0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a ratio in (0, 1]; give one such as 0.1 or 1/9")
    return value


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hub id or folder; only its configuration is read")
    parser.add_argument("--ratio", type=ratio, nargs="+", help="default: 1/3, 2/9, 1/9 and 1/18")
    parser.add_argument(
        "--tokens", type=positive, help="vision tokens of the image; default: one crop, where it has a size"
    )


def run_budget(arguments: argparse.Namespace) -> None:
    from .auto import pruned_class
    from .budget_learnpruner import mean_tokens
    from .cuts_learnpruner import learnpruner_schedule

    config = pruned_class(arguments.model).config_class.from_pretrained(arguments.model)
    vision = config.vision_config
    if arguments.tokens is None and "image_size" not in vision.to_dict():
        raise ValueError(f"{arguments.model} takes images of any size: give --tokens, those of yours.")
    tokens = arguments.tokens or (vision.image_size // vision.patch_size) ** 2
    depth = config.text_config.num_hidden_layers
    print(f"{arguments.model}: {tokens} vision tokens, {depth} decoder layers, second cut before {config.pruner_layer}")
    print(f"{'ratio':>8}{'cut 1':>8}{'cut 2':>8}{'mean':>8}")
    for value in arguments.ratio or (1 / 3, 2 / 9, 1 / 9, 1 / 18):
        schedule = learnpruner_schedule(config, value)
        counts = tuple(cut.keep(tokens) for cut in schedule)
        mean = mean_tokens(counts, tuple(cut.layer for cut in schedule), tokens, depth)
        first, last = (counts[0], counts[-1]) if counts else (tokens, tokens)
        print(f"{value:8.4f}{first:8}{last:8}{mean:8.1f}")


def add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hub id or folder of a stock or a pruned checkpoint, with its processor")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--question", required=True)
    parser.add_argument("--ratio", type=ratio, help="default: the checkpoint's")
    parser.add_argument("--max-new-tokens", type=positive, default=32)
    parser.add_argument("--trust-remote-code", action="store_true", help="run the processor's own code, if it has any")
    parser.add_argument("--picture", type=Path, help="write the image with the kept patches of both cuts here (PNG)")


def run_compare(arguments: argparse.Namespace) -> None:
    from .compare import compare_file

    print(compare_file(**{name: value for name, value in vars(arguments).items() if name != "run"}))


def times(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return value


def add_diagnose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Hub id or folder of a checkpoint, with its processor")
    parser.add_argument("--data", type=Path, required=True, help="JSON or JSON Lines, as for train; boxes if known")
    parser.add_argument("--output", type=Path, required=True, help="folder of diagnostics.json and diagnostics.png")
    parser.add_argument("--method", nargs="+", metavar="NAME", help="default: learnpruner, and cls_attention for CLIP")
    parser.add_argument("--ratio", type=ratio, help="default: the checkpoint's")
    parser.add_argument("--accounting", choices=("mean", "cap"), help="the ratio's: mean over layers, or the last cut")
    parser.add_argument("--limit", type=positive, help="images; default: the first 200")
    parser.add_argument("--sink", type=times, help="times the mean attention that make a patch a sink; default: 5")
    parser.add_argument("--batch-size", type=positive)
    parser.add_argument("--trust-remote-code", action="store_true", help="run the processor's own code, if it has any")


def run_diagnose(arguments: argparse.Namespace) -> None:
    from learnpruner.methods.diagnose_command import diagnose

    given = {name: value for name, value in vars(arguments).items() if name != "run" and value is not None}
    print(diagnose(**given))


def add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file of settings; training/configs has some")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="settings that win over the file: --learning_rate 1e-3")


def run_train(arguments: argparse.Namespace) -> None:
    from learnpruner.training.command import parse_arguments, train

    trainer = train(*parse_arguments(arguments.config, arguments.flags))
    trainer.accelerator.end_training()


def add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder or Hub id of a pruner")
    parser.add_argument("repo_id", help="where to: user/name")
    parser.add_argument("--merged", action="store_true", help="all weights, not the pruner's alone")
    parser.add_argument("--base", help="Hub id of the base, where the checkpoint names a folder")
    parser.add_argument("--results", nargs="+", default=[], metavar="JSON", help="of benchmarks/, for the card")
    parser.add_argument("--picture", metavar="PNG", help="of kept tokens, such as `learnpruner compare` draws")
    parser.add_argument("--private", action="store_true", default=None, help="where the repository is made")
    parser.add_argument("--revision", help="branch")
    parser.add_argument("--create-pr", action="store_true", help="as a pull request")
    parser.add_argument("--license", help="SPDX identifier, for the card")
    parser.add_argument("--commit-message", default="Upload pruner")
    parser.add_argument("--dry-run", action="store_true", help="list files, sizes and deletions; upload nothing")


def run_push(arguments: argparse.Namespace) -> None:
    from .hub_cards.push import push_checkpoint

    print(push_checkpoint(**{name: value for name, value in vars(arguments).items() if name != "run"}))


def add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="Hub id or folder")
    parser.add_argument("--revision", help="commit, tag or branch of a Hub id")
    parser.add_argument("--image", type=Path, help="default: a plain one")
    parser.add_argument("--question", default="What is this?")
    parser.add_argument("--ratio", type=ratio, help="default: the checkpoint's")


def run_verify(arguments: argparse.Namespace) -> None:
    from .hub_cards import verify

    print(verify(**{name: value for name, value in vars(arguments).items() if name != "run"}))


def add_calibrate_hawk(parser: argparse.ArgumentParser) -> None:
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


def run_calibrate_hawk(arguments: argparse.Namespace) -> None:
    from .methods.hawk_calibration import calibrate_files

    print(calibrate_files(**{name: value for name, value in vars(arguments).items() if name != "run"}))


COMMANDS = {
    "budget": (add_budget, run_budget, "what a ratio means for a checkpoint: tokens of one image after each cut"),
    "calibrate-hawk": (add_calibrate_hawk, run_calibrate_hawk, "weights of heads for the method hawk, measured"),
    "compare": (add_compare, run_compare, "one question about one image, pruned and unpruned, and what was kept"),
    "diagnose": (add_diagnose, run_diagnose, "what a model attends to, and what methods keep: figures and a picture"),
    "push": (add_push, run_push, "a pruner to the Hub, with its code, processor, results and card, in one commit"),
    "train": (add_train, run_train, "a pruner for a base model, from a configuration file"),
    "verify": (add_verify, run_verify, "a pruner's files, code and recorded results, before it is trusted"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit status: 2, with one line on stderr, where the input is bad."""
    parser = Parser(prog="learnpruner", description="Visual token pruning for Hugging Face VLMs.")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for name, (add, run, purpose) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=purpose, description=purpose)
        add(subparser)
        subparser.set_defaults(run=run)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except (
        *(OSError, ValueError, ImportError, RuntimeError, FloatingPointError),
        *(SafetensorError, StrictDataclassError),  # of weights, and of a configuration's fields
    ) as error:
        # Messages of transformers run over several lines.
        print(f"learnpruner: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
