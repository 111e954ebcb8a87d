"""The Space's example pictures and questions: test scenes, which the model has not seen in training.

python hub_cards/space/make_examples.py
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1] / "examples" / "easy_vqa"))

from scenes import scene_at  # noqa: E402

# Scenes by level and number, and which of their first questions to ask.
CHOSEN = [("hard", 5, 3), ("hard", 6, 1), ("standard", 7, 2), ("hard", 2, 0), ("hard", 1, 0), ("hard", 4, 2)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE / "examples", help="folder")
    output = parser.parse_args(argv).output
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, (level, number, asked) in enumerate(CHOSEN):
        scene, questions = scene_at("test", level, 0, number, asked + 1)
        scene.image.save(output / f"{name}.png")
        rows.append({"image": f"{name}.png", "question": questions[asked][1]})
    (output / "examples.json").write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
