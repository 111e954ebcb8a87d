# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The parser and the types of arguments that subcommands share, and scripts of benchmarks/ and examples/ with them."""

import argparse
from fractions import Fraction


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


def times(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return value
