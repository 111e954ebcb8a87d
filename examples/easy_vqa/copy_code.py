# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Copies today's code, and the base's processor, into the folders of the shipped pruners, as a push would have them.

python examples/easy_vqa/copy_code.py
"""

import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

EXAMPLES = Path(__file__).resolve().parent
MODELING = EXAMPLES.parents[1] / "modeling"
PROCESSOR = ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def copy_code(folder: Path) -> None:
    """Into a pruner's folder, beside the one of its base: `learnpruner-NAME` and `NAME`."""
    (family,) = folder.glob("modeling_learnpruner_*.py")
    base = folder.with_name(folder.name.removeprefix("learnpruner-"))
    for old in folder.glob("*.py"):
        old.unlink()
    model = MODELING / family.name
    code = [model, *map(Path, get_relative_import_files(model)), *base.glob("processing_*.py")]
    for path in (*code, *(base / name for name in PROCESSOR)):
        shutil.copy(path, folder)


if __name__ == "__main__":
    for folder in sorted(EXAMPLES.glob("learnpruner-*/")):
        copy_code(folder)
