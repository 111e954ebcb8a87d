"""Runs a script with the packages of this checkout, which need not be installed, whatever is installed beside them.

    python benchmarks/checkout.py benchmarks/speed.py --preset cpu-small --output FOLDER

Which folder is which package is read from `pyproject.toml`.
"""

import runpy
import sys
from importlib.abc import MetaPathFinder
from importlib.util import spec_from_file_location
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


class Checkout(MetaPathFinder):
    """Finds packages in folders of other names, as an editable installation does.

    Args:
        folders (`dict[str, str]`): Name of a package -> its folder below the checkout.
    """

    def __init__(self, folders: dict[str, str]):
        self.folders = folders

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.folders:
            return None
        folder = ROOT / self.folders[fullname]
        return spec_from_file_location(fullname, folder / "__init__.py", submodule_search_locations=[str(folder)])


def find_here() -> None:
    """From now on this process imports the packages of the checkout."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    sys.meta_path.insert(0, Checkout(project["tool"]["setuptools"]["package-dir"]))


if __name__ == "__main__":
    script = Path(sys.argv[1]).resolve()
    find_here()
    # As if the script had been started itself.
    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.parent)
    runpy.run_path(str(script), run_name="__main__")
