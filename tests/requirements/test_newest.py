"""The check that the newest releases are installed can fail, and knows what is excluded."""

import importlib.util
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "requirements" / "check_newest.py"

spec = importlib.util.spec_from_file_location("check_newest", SCRIPT)
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)


def write_wheel(folder, name, release, requires_python=">=3.10"):
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\nRequires-Python: {requires_python}\n"
    with zipfile.ZipFile(folder / f"{name}-{release}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}-{release}.dist-info/METADATA", metadata)
        wheel.writestr(f"{name}-{release}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-{release}.dist-info/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Releases of two packages, of which this Python has one, and no other index."""
    write_wheel(tmp_path, "iniconfig", version("iniconfig"))
    for release in ("1.0", "1.1", "2.0rc1"):
        write_wheel(tmp_path, "brandnew", release)
    write_wheel(tmp_path, "brandnew", "3.0", requires_python=">=99")
    (tmp_path / "broken.txt").write_text("# https://example.com/report\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path


def test_newest_is_what_pip_would_install(index):
    constraints = index / "broken.txt"
    assert check.newest_on_index(str(constraints), ["brandnew"]) == {"brandnew": "1.1"}
    constraints.write_text("# https://example.com/report\nbrandnew!=1.1\n")
    assert check.newest_on_index(str(constraints), ["brandnew"]) == {"brandnew": "1.0"}


def test_an_older_package_fails_the_check(index):
    write_wheel(index, "iniconfig", "999.0")
    command = [sys.executable, SCRIPT, index / "broken.txt", "iniconfig"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "999.0 is the newest on the index" in done.stderr
    (index / "broken.txt").write_text("# https://example.com/report\niniconfig!=999.0\n")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"iniconfig {version('iniconfig')}" in done.stdout
