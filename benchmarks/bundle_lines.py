"""How much code ships with a checkpoint of each family: files and lines of its remote-code bundle, at two revisions.

    python benchmarks/bundle_lines.py --before dd21d86 --output benchmarks/results/bundle_lines.json --into PAGE.md

A bundle is the family's `modeling_learnpruner_NAME.py` and what it imports by `from .sibling import name`, directly or
not, as git has them at the revision. `--into` fills the part of a Markdown file between `<!-- bundle_lines -->` and
`<!-- /bundle_lines -->`; without it the table is printed.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from learnpruner_commands.arguments import Parser

from render_accuracy import fill

ROOT = Path(__file__).resolve().parents[1]
PREFIX = "modeling_learnpruner_"
MARK = "bundle_lines"


def git(*arguments: str) -> str:
    """What a git command prints. Raises `ValueError` with git's message where it fails."""
    run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if run.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {run.stderr.strip()}")
    return run.stdout


def count_lines(name: str, read: Callable[[str], str]) -> dict[str, int]:
    """Lines of each file of a bundle, by the file's name.

    Args:
        name (`str`): The family's file.
        read (`Callable[[str], str]`): Gives the text of a file by its name.
    """
    lines, todo = {}, [name]
    while todo:
        text = read(name := todo.pop())
        lines[name] = len(text.splitlines())
        imports = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.level)
        todo += {f"{node.module}.py" for node in imports} - {*lines, *todo}
    return dict(sorted(lines.items()))


def count_revision(revision: str) -> dict:
    """The commit of a revision and, for each family that it has, the lines of its bundle's files."""
    commit = git("rev-parse", "--verify", f"{revision}^{{commit}}").strip()
    paths = git("ls-tree", "--name-only", commit, "modeling/").splitlines()
    families = sorted(Path(path).stem.removeprefix(PREFIX) for path in paths if Path(path).name.startswith(PREFIX))

    def read(name: str) -> str:
        return git("show", f"{commit}:modeling/{name}")

    return {"commit": commit, "families": {family: count_lines(f"{PREFIX}{family}.py", read) for family in families}}


def table(recorded: dict) -> str:
    """Markdown of what was recorded; a dash where a revision does not have the family."""
    before, after = recorded["before"], recorded["after"]
    heads = [f"{what} at {side['commit'][:7]}" for side in (before, after) for what in ("files", "lines")]
    rows = ["| " + " | ".join(["family", *heads, "change in lines"]) + " |", "|---" * 6 + "|"]
    for family in sorted(before["families"] | after["families"]):
        bundles = [side["families"].get(family) for side in (before, after)]
        cells = [cell for files in bundles for cell in ((len(files), sum(files.values())) if files else ("-", "-"))]
        change = f"{cells[3] - cells[1]:+}" if all(bundles) else "-"
        rows.append("| " + " | ".join(map(str, [family, *cells, change])) + " |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, help="revision of git")
    parser.add_argument("--after", default="HEAD", help="revision of git")
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    parser.add_argument("--into", type=Path, help="Markdown file with the two marks")
    arguments = parser.parse_args(argv)
    try:
        recorded = {side: count_revision(getattr(arguments, side)) for side in ("before", "after")}
        text = table(recorded)
        if arguments.into:
            arguments.into.write_text(fill(arguments.into.read_text(), MARK, text))
        else:
            print(text)
        arguments.output.write_text(json.dumps(recorded, indent=1) + "\n")
    except (OSError, ValueError) as error:
        print(f"bundle_lines: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
