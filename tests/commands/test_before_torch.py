"""What the `learnpruner` command answers by itself, before torch and all that is built on it is loaded."""

import subprocess
import sys
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version

import pytest

import learnpruner
from learnpruner_commands import COMMANDS, main
from learnpruner_commands.train_settings import (
    RECIPE,
    PrunerDataArguments,
    PrunerModelArguments,
    PrunerObjectiveArguments,
)

SETTINGS = (PrunerModelArguments, PrunerDataArguments, PrunerObjectiveArguments)
# Those that take long, and this project's, which load them.
SLOW = ("torch", "transformers", "numpy", "huggingface_hub", "safetensors", "learnpruner")
# As the console script does, by the entry point that the installed package has.
ANSWER = f"""
import sys
from importlib.metadata import entry_points
(script,) = entry_points(group="console_scripts", name="learnpruner")
try:
    status = script.load()(sys.argv[1:])
except SystemExit as stop:
    status = stop.code
loaded = [name for name in {SLOW} if name in sys.modules]
assert not loaded, loaded
sys.exit(status)
"""


def answer(*arguments):
    command = [sys.executable, "-c", ANSWER, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=lambda command: " ".join(command))
def test_help(command):
    run = answer(*command, "--help")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(" ".join(["usage: learnpruner", *command]))
    if not command:
        assert all(f"    {name}" in run.stdout for name in COMMANDS)


def test_help_of_train():
    """All settings of this project's own, each with help, before torch is loaded."""
    run = answer("train", "--help")
    assert run.returncode == 0, run.stderr
    settings = [each for kind in SETTINGS for each in fields(kind)]
    for name, each in [*((each.name, each) for each in settings), *RECIPE.items()]:
        (line,) = [line for line in run.stdout.splitlines() if line.startswith(f"  --{name} ")]
        assert each.metadata["help"][:20] in line
    assert all(len(line) <= 120 for line in run.stdout.splitlines())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required: command"),
        (["prune"], "invalid choice: 'prune'"),
        (["--verison"], "required: command"),
        (["budget"], "required: model"),
        (["budget", "folder", "--ratio", "2"], "'2' is not a ratio"),
        (["budget", "folder", "--tokens", "0"], "'0' is not a whole number"),
        (["diagnose", "--model", "m", "--data", "d", "--output", "o", "--sink", "0.5"], "'0.5' is not a number"),
        (["train"], "required: config"),
        (["push", "folder", "user/name", "--publik"], "--publik"),
        (["doctor", "llava"], "llava"),
    ],
)
def test_wrong_arguments(arguments, says):
    run = answer(*arguments)
    assert run.returncode == 2, run.stderr
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("learnpruner")
    assert says in line
    assert line.endswith("--help)")


def test_version():
    run = answer("--version")
    assert run.returncode == 0, run.stderr
    versions = {"learnpruner": learnpruner.__version__}
    versions |= {package: version(package) for package in ("transformers", "torch")}
    assert run.stdout.splitlines() == [f"{package} {number}" for package, number in versions.items()]


def test_version_without_a_package(monkeypatch, capsys):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr("learnpruner_commands.version.version", missing)
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert "torch not installed" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("module", ["learnpruner", "learnpruner_commands"])
def test_run_as_a_module(module):
    command = [sys.executable, "-m", module, "budget"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("learnpruner budget: ")
