"""The Space's folder, whose scripts are no package."""

import importlib.util
from pathlib import Path

SPACE = Path(__file__).parents[2] / "hub_cards" / "space"


def script(name):
    spec = importlib.util.spec_from_file_location(f"space_{name}", SPACE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
