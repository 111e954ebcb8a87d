"""The subcommand alone: what it runs is tested beside that."""

import sys
from types import ModuleType

import pytest

from learnpruner_commands import main


class Report:
    def __init__(self, passed):
        self.passed = passed

    def __str__(self):
        return f"passed: {self.passed}"


@pytest.mark.parametrize(("passed", "status"), [(True, 0), (False, 1)])
def test_the_exit_status_is_the_finding(passed, status, monkeypatch, capsys):
    module = ModuleType("learnpruner.doctor")
    module.doctor = lambda: Report(passed)
    monkeypatch.setitem(sys.modules, "learnpruner.doctor", module)
    assert main(["doctor"]) == status
    assert capsys.readouterr().out == f"passed: {passed}\n"
