# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
import argparse
import shlex
import sys

from .train_settings import help_lines

PURPOSE = "a pruner for a base model, from a configuration file"


def add(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(["Settings, in the file (name: value) or as flags (--name value):", "", *help_lines()])
    parser.add_argument("config", help="YAML or JSON file of settings, or the name of a shipped one: llava-1.5-7b")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="settings that win over the file: --learning_rate 1e-3")


def run(config: str, flags: list[str]) -> int | None:
    from learnpruner.training.command import full_help, how_to_go_on, parse_arguments, train

    if {"-h", "--help"} & set(flags):
        print(full_help())
        return None
    arguments = parse_arguments(config, flags)
    try:
        trainer = train(*arguments)
    except KeyboardInterrupt:
        command = shlex.join(["learnpruner", "train", config, *flags])
        if arguments.training.process_index == 0:
            print(f"learnpruner: {how_to_go_on(arguments.training, command)}", file=sys.stderr)
        return 130
    trainer.accelerator.end_training()
    return None
