"""Puts together the folder that is uploaded as a Space: the app, the package's code, and the small model.

python hub_cards/space/assemble.py --output runs/space
"""

import argparse
import shutil
import sys
from pathlib import Path

import learnpruner

HERE = Path(__file__).parent
EASY_VQA = HERE.parents[1] / "examples" / "easy_vqa"
FOLDERS = {
    "examples": HERE / "examples",
    # The Space installs what requirements.txt names before it sees any other file, so the code lies beside the app.
    "learnpruner": Path(learnpruner.__file__).parent,
    "tiny-llava": EASY_VQA / "tiny-llava",
    "learnpruner-tiny-llava": EASY_VQA / "learnpruner-tiny-llava",
}
FILES = ("app.py", "requirements.txt", "README.md", "screenshot.png")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    output = parser.parse_args(argv).output
    try:
        output.mkdir(parents=True)
    except FileExistsError:
        print(f"assemble: {output} exists; name a new folder, or delete it first", file=sys.stderr)
        return 2
    for name, folder in FOLDERS.items():
        shutil.copytree(folder, output / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(HERE / name, output)
    print(f"{output} is ready: hf upload <user>/<space> {output} . --type space")
    return 0


if __name__ == "__main__":
    sys.exit(main())
