# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""`learnpruner doctor`: whether pruning is right on the installed versions, by tiny random models of each family."""

import platform
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import huggingface_hub
import torch
import transformers
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from transformers.utils import logging

from .configuration_learnpruner import __version__
from .doctor_checks import CHECKS, RATIO_ONE
from .doctor_models import CheckError, build_case
from .families import FAMILIES, model_class

# Of a report's lines; names of files are not broken.
WIDTH, WHOLE = 120, {"break_long_words": False, "break_on_hyphens": False}


@dataclass
class Check:
    """The result of one check.

    Attributes:
        family (`str`): `model_type` of the stock family.
        name (`str`): What was checked.
        passed (`bool`).
        detail (`str`): What was measured, or what is wrong, in one line.
        seconds (`float`): Wall clock.
    """

    family: str
    name: str
    passed: bool
    detail: str
    seconds: float


@dataclass
class Report:
    """What [`doctor`] found; `str(report)` is a table with a verdict.

    Attributes:
        checks (`list[Check]`).
        versions (`dict[str, str]`): Of learnpruner, transformers, torch, huggingface_hub, Python and the platform.
        tested (`str`): The range of transformers that this learnpruner was released for, such as `>=5.20,<6`.
    """

    checks: list[Check]
    versions: dict[str, str]
    tested: str

    @property
    def passed(self) -> bool:
        """Whether checks ran, and all passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def __str__(self) -> str:
        rows = [("family", "check", "result", "seconds")]
        rows += [
            (check.family, check.name, "pass" if check.passed else "FAIL", f"{check.seconds:.1f}")
            for check in self.checks
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        head, *starts = (f"{a:{widths[0]}}  {b:{widths[1]}}  {c:{widths[2]}}  {d:>7}  " for a, b, c, d in rows)
        lines = [f"{name:16}{value}" for name, value in self.versions.items()]
        lines += ["", f"{head}detail"]
        seen = {}
        for start, check in zip(starts, self.checks):
            # One cause may fail many checks: it is written out once.
            first = seen.setdefault(check.detail, f"{check.family}, {check.name}")
            repeated = not check.passed and first != f"{check.family}, {check.name}"
            detail = f"as in {first}" if repeated else check.detail
            indent = " " * len(start)
            wrapped = textwrap.wrap(detail, WIDTH, initial_indent=start, subsequent_indent=indent, **WHOLE)
            lines += wrapped or [start.rstrip()]
        return "\n".join([*lines, "", *self._verdict()])

    def _verdict(self) -> list[str]:
        release = self.versions["transformers"]
        within = SpecifierSet(self.tested).contains(release, prereleases=True)
        seconds = sum(check.seconds for check in self.checks)
        if self.passed:
            note = "" if within else f" transformers {release} is outside the tested range {self.tested}."
            return [f"PASS: all {len(self.checks)} checks passed in {seconds:.0f} s.{note}"]
        failed = sum(not check.passed for check in self.checks)
        if within:
            pin = (
                f"transformers {release} is within the range that this learnpruner requires. Install both in a fresh "
                f"environment, or try an older transformers, and run `learnpruner doctor` again."
            )
        else:
            pin = f"Install a transformers that was tested: pip install 'transformers{self.tested}'"
        unpruned = {check.family for check in self.checks if check.name == RATIO_ONE and check.passed}
        if unpruned == {check.family for check in self.checks}:
            off = "Until then, run with pruner_ratio=1.0, which switches pruning off and passed its checks here."
        else:
            off = "Until then, use the stock model class: with pruner_ratio=1.0 not every family passes here, either."
        return [
            f"FAIL: {failed} of {len(self.checks)} checks failed in {seconds:.0f} s. Do not trust pruned answers of "
            "these versions.",
            "What to do:",
            f"- {pin}",
            f"- {off}",
            "- Report it to the developers of learnpruner, with this whole output.",
        ]


def run_check(family: str, name: str, check: Callable):
    """Runs a check, and says how it went; an exception is its failure."""
    start, result = time.perf_counter(), None
    try:
        result = check()
        passed, detail = True, result if isinstance(result, str) else ""
    except CheckError as error:
        passed, detail = False, str(error)
    except Exception as error:  # of any kind: on versions that do not fit, anything may be raised
        place = traceback.extract_tb(error.__traceback__)[-1]
        # The file within its package, not where this user has it.
        where = Path(*Path(place.filename).parts[-3:]).as_posix()
        message = " ".join(str(error).split())
        passed, detail = False, f"{type(error).__name__}: {message} ({where}:{place.lineno}, in {place.name})"
    return Check(family, name, passed, detail, time.perf_counter() - start), result


def _tested() -> str:
    """As this package requires it: `>=5.20,<6`; empty where it was not installed, but put on the path."""
    try:
        requirements = metadata.requires("learnpruner") or ()
    except metadata.PackageNotFoundError:
        return ""
    specifiers = (each.specifier for each in map(Requirement, requirements) if each.name == "transformers")
    return ",".join(sorted(map(str, next(specifiers, ())), reverse=True))


def doctor(families: Sequence[str] | None = None) -> Report:
    """Checks the installed versions: takes seconds on a CPU, downloads nothing and writes no file.

    For each family, a tiny model of random weights must equal the stock model at a ratio of 1; pruned, it must equal
    the stock model from which the dropped tokens are hidden, in the prompt and in each step of `generate`; and a padded
    batch must equal its samples alone. Progress is shown on stderr.

    Args:
        families (`Sequence[str]`, *optional*): Stock `model_type`s, such as `"llava"`. Defaults to all.

    Returns:
        [`Report`]: Whatever is wrong with the installed versions is a failed check in it.

    Raises:
        `ValueError`: where a family is unknown, or none is given.
    """
    known = {config_class.base_model_type: config_class for config_class in FAMILIES}
    families = list(known) if families is None else list(families)
    if not families or not set(families) <= set(known):
        raise ValueError(f"There are no families {families}: choose from {list(known)}.")
    versions = {
        "learnpruner": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "huggingface_hub": huggingface_hub.__version__,
        "Python": platform.python_version(),
        "platform": platform.platform(),
    }
    checks = []
    # The caller's random numbers go on as if nothing had happened.
    with (
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        logging.tqdm(total=len(families) * (len(CHECKS) + 1), desc="doctor", leave=False) as progress,
    ):
        for name in families:
            progress.set_postfix_str(name)
            built, case = run_check(
                name, "models are built", lambda config_class=known[name]: build_case(model_class(config_class))
            )
            progress.update()
            if not built.passed:
                checks.append(built)
            for title, check in CHECKS.items() if built.passed else ():
                checks.append(run_check(name, title, lambda check=check, case=case: check(case))[0])
                progress.update()
    return Report(checks, versions, _tested())
