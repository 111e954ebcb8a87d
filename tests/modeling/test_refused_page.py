"""docs/refused.md has a row for each error that the shipped code and training raise, and each row is of one."""

import ast
import re
from pathlib import Path

import learnpruner
from learnpruner import training

SHIPPED = sorted(Path(learnpruner.__file__).parent.glob("*_learnpruner*.py"))
# What is wrong with single rows has a table of its own, in tests/training/test_bad_rows.py; metrics only count.
ROWS = ("rows.py", "pictures.py", "metrics.py")
TRAINING = sorted(path for path in Path(training.__file__).parent.glob("*.py") if path.name not in ROWS)
PAGE = Path(__file__).parents[2] / "docs" / "refused.md"


def text_of(node, named):
    """The fixed parts of a message, those of constants and functions that it names among them."""
    parts = []
    for each in ast.walk(node):
        if isinstance(each, ast.Constant) and isinstance(each.value, str):
            parts.append(each.value)
        elif isinstance(each, ast.Name):
            parts.append(named.get(each.id, ""))
    return " ".join(" ".join(parts).split())


def messages():
    """The text of each error that is raised, with the variables of its function, by file and line."""
    trees = {path.name: ast.parse(path.read_text()) for path in (*SHIPPED, *TRAINING)}
    shared = {}
    for tree in trees.values():
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                shared[node.targets[0].id] = text_of(node.value, {})
            elif isinstance(node, ast.FunctionDef) and node.name.startswith("_"):
                shared[node.name] = text_of(node, {})
    found = {}
    for name, tree in trees.items():
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            local = dict(shared)
            for node in ast.walk(function):
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    local[node.targets[0].id] = text_of(node.value, {})
            for node in ast.walk(function):
                if isinstance(node, ast.Raise) and node.exc is not None:
                    found[f"{name}:{node.lineno}"] = text_of(node.exc, local)
    # Of some only the file stands here, before a message that came from elsewhere.
    return {place: text for place, text in found.items() if re.search(r"\w", text)}


def rows():
    """Of each row of the tables, the parts of messages that it names."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "---" not in line]
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert {len(each) for each in cells} == {3}
    return [re.findall(r"“(.+?)”", error) for _, _, error in cells if error != "the error begins or holds"]


def test_every_error_has_its_row_and_every_row_its_error():
    texts, table = messages(), rows()
    assert len(texts) > 100
    assert {"trainer.py", "checks.py", "fsdp.py"} <= {place.partition(":")[0] for place in texts}
    assert all(table), "each row names an error"
    named = [part for row in table for part in row]
    assert len(named) == len(set(named))
    missing = {place: text for place, text in texts.items() if not any(part in text for part in named)}
    assert not missing
    assert not [part for part in named if not any(part in text for text in texts.values())]
