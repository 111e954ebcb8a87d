"""Lines of the code that ships: counted as git has it, along relative imports, and shown as they were recorded."""

import json
import subprocess
from pathlib import Path

import pytest

import learnpruner

import bundle_lines
from render_accuracy import fill
from tiny_models import FAMILIES, tiny_pair

ROOT = Path(__file__).parents[2]
MODELING = Path(learnpruner.__file__).parent
PAGE = "# Page\n<!-- bundle_lines -->\nold\n<!-- /bundle_lines -->\nend\n"


def commit(repository, files):
    for name, text in files.items():
        (repository / "modeling").mkdir(exist_ok=True)
        (repository / "modeling" / name).write_text(text)
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    for command in (("add", "-A"), (*identity, "commit", "-q", "-m", "files")):
        subprocess.run(["git", "-C", str(repository), *command], check=True)
    return bundle_lines.git("rev-parse", "HEAD").strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_lines, "ROOT", tmp_path)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


@pytest.mark.parametrize("family", FAMILIES)
def test_the_files_are_those_of_a_saved_folder(family, tmp_path):
    tiny_pair(family)[1].save_pretrained(tmp_path)
    found = bundle_lines.count_lines(f"modeling_learnpruner_{family}.py", lambda name: (MODELING / name).read_text())
    assert found == {path.name: len(path.read_text().splitlines()) for path in tmp_path.glob("*.py")}


def test_each_revision_as_git_has_it(repository):
    one = "modeling_learnpruner_one.py"
    first = commit(
        repository,
        {
            one: "import torch\nfrom .a_learnpruner import a\n",
            "a_learnpruner.py": '"""from .no import no"""\n\ndef late():\n    from .b_learnpruner import b\n',
            "b_learnpruner.py": "from .a_learnpruner import late\nb = 1\n",
            "other_learnpruner.py": "unused = 1\n",
        },
    )
    second = commit(repository, {"modeling_learnpruner_two.py": "two = 2\n", "b_learnpruner.py": "b = 1\n"})
    (repository / "modeling" / one).write_text("not = committed")
    lines = {"a_learnpruner.py": 4, "b_learnpruner.py": 2, one: 2}
    before, after = (bundle_lines.count_revision(revision) for revision in (first[:10], "HEAD"))
    assert before == {"commit": first, "families": {"one": lines}}
    two = {"modeling_learnpruner_two.py": 1}
    assert after == {"commit": second, "families": {"one": {**lines, "b_learnpruner.py": 1}, "two": two}}
    assert bundle_lines.table({"before": before, "after": after}).splitlines() == [
        f"| family | files at {first[:7]} | lines at {first[:7]} | files at {second[:7]} | lines at {second[:7]} | "
        "change in lines |",
        "|---|---|---|---|---|---|",
        "| one | 3 | 8 | 3 | 7 | -1 |",
        "| two | - | - | 1 | 1 | - |",
    ]


def test_the_command_records_and_fills_a_page(repository, capsys):
    commit(repository, {"modeling_learnpruner_one.py": "one = 1\n"})
    page, output = repository / "page.md", repository / "lines.json"
    page.write_text(PAGE)
    command = ["--before", "HEAD", "--output", str(output), "--into", str(page)]
    assert bundle_lines.main(command) == 0
    recorded = json.loads(output.read_text())
    assert recorded["before"] == recorded["after"] == bundle_lines.count_revision("HEAD")
    assert page.read_text() == fill(PAGE, "bundle_lines", bundle_lines.table(recorded))
    assert bundle_lines.main(command[:-2]) == 0
    assert capsys.readouterr().out.strip() == bundle_lines.table(recorded)
    output.unlink()
    page.write_text("no marks")
    assert bundle_lines.main(command) == 2
    assert bundle_lines.main(["--before", "v0.0", "--output", str(output)]) == 2
    errors = capsys.readouterr().err
    assert "no <!-- bundle_lines -->" in errors
    assert "rev-parse" in errors
    assert not output.exists()


def test_the_table_is_that_of_the_recorded_lines():
    recorded = json.loads((ROOT / "benchmarks" / "results" / "bundle_lines.json").read_text())
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert fill(page, "bundle_lines", bundle_lines.table(recorded)) == page
