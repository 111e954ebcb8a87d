# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
import argparse

PURPOSE = "whether pruning is right on the installed versions: checks on tiny random models, offline"


def add(parser: argparse.ArgumentParser) -> None:
    """Takes no arguments."""


def run() -> int:
    from learnpruner.doctor import doctor

    report = doctor()
    print(report)
    return 0 if report.passed else 1
