"""One point of the speed benchmark by two versions of the code."""

import copy
import json
from pathlib import Path

import pytest

import compare_speed
from recorded import speed_record

PAGE = Path(__file__).parents[2] / "benchmarks" / "SPEED.md"
RECORDS = PAGE.with_name("results") / "engine"


@pytest.fixture
def files(tmp_path):
    def write(**changes):
        before = speed_record("b", "p")
        after = {**copy.deepcopy(before), "code_sha256": "e" * 64, **changes}
        paths = [tmp_path / "before.json", tmp_path / "after.json"]
        for path, record in zip(paths, (before, after)):
            path.write_text(json.dumps(record))
        return list(map(str, paths)), before

    return write


def test_ratios_stand_side_by_side(files, capsys):
    paths, before = files()
    assert compare_speed.main(paths) == 0
    printed = capsys.readouterr().out
    assert f"| code | {before['code_sha256'][:12]} | eeeeeeeeeeee |" in printed
    median = before["intervals"]["overhead_at_ratio_one"]["median"]
    assert f"| ratio 1 / stock | {median:.3f} (" in printed
    assert len(printed.splitlines()) == 2 + 1 + len(compare_speed.FIGURES) + 2


@pytest.mark.parametrize("name", compare_speed.SAME)
def test_other_points_are_not_compared(files, name, capsys):
    record = speed_record("b", "p")
    other = {"device": "another", "ratio": 0.9, "settings": {**record["settings"], "rounds": 99}}[name]
    paths, _ = files(**{name: other})
    assert compare_speed.main(paths) == 2
    assert f"The results differ in {name}" in capsys.readouterr().err


def test_the_page_shows_what_was_recorded():
    """And the hooks cost nothing that this machine can tell: the intervals overlap, at ratio 1, too."""
    before, after = (json.loads((RECORDS / f"{name}.json").read_text()) for name in ("before", "after"))
    assert compare_speed.table(before, after) in PAGE.read_text()
    for name in compare_speed.FIGURES.values():
        one, other = before["intervals"][name], after["intervals"][name]
        assert one["low"] <= other["high"], name
        assert other["low"] <= one["high"], name
