# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
import argparse
from pathlib import Path

PURPOSE = "a pruner for a base model, from a configuration file"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file of settings; training/configs has some")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="settings that win over the file: --learning_rate 1e-3")


def run(config: Path, flags: list[str]) -> None:
    from learnpruner.training.command import parse_arguments, train

    trainer = train(*parse_arguments(config, flags))
    trainer.accelerator.end_training()
