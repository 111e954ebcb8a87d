"""What is supported is said in several places, and what is installed in several files: they agree."""

import ast
import importlib.util
import re
import shutil
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
SPACE = ROOT / "hub_cards" / "space" / "requirements.txt"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
FILES = ("lock.txt", "floor.txt", "torch.txt")

spec = importlib.util.spec_from_file_location("raise_caps", ROOT / "requirements" / "raise_caps.py")
caps = importlib.util.module_from_spec(spec)
spec.loader.exec_module(caps)


def parse(path):
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def declared(extras=()):
    """What pyproject.toml names, by name, with these extras and those that they name."""
    found, todo = {}, [*PROJECT["dependencies"]]
    for extra in extras:
        todo += PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, todo):
        if requirement.name == "learnpruner":
            found |= declared(requirement.extras)
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def pins(name, python="3.11", platform="linux"):
    """Versions by name that pip would install from a file of requirements/."""
    where = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": platform,
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    found = {}
    for requirement in parse(ROOT / "requirements" / name):
        if requirement.marker is None or requirement.marker.evaluate(where):
            (specifier,) = requirement.specifier
            assert specifier.operator == "=="
            assert "*" not in specifier.version
            assert requirement.name not in found
            found[requirement.name] = specifier.version
    return found


def lowest(requirement):
    """The version after `>=` or `==`."""
    (bound,) = (part.version for part in requirement.specifier if part.operator in (">=", "=="))
    return bound


def supported(constant):
    return ast.literal_eval(caps.find_constant(ROOT / "modeling", constant)[1])


def minor(version):
    return tuple(int(part) for part in version.split(".")[:2])


def test_one_range_of_transformers():
    needs = declared()["transformers"]
    (cap,) = (part.version for part in needs.specifier if part.operator == "<")
    newest = supported("NEWEST_TESTED")
    assert minor(cap) == (newest[0], newest[1] + 1)
    assert minor(pins("lock.txt")["transformers"]) == newest
    assert minor(lowest(needs)) == minor(pins("floor.txt")["transformers"]) == supported("OLDEST")


def test_one_range_of_huggingface_hub():
    (cap,) = (part.version for part in declared()["huggingface-hub"].specifier if part.operator == "<")
    assert int(cap) == minor(pins("lock.txt")["huggingface-hub"])[0] + 1


def test_a_space_needs_what_the_package_needs():
    needs = declared()
    for requirement in parse(SPACE):
        assert requirement.specifier == needs[canonicalize_name(requirement.name)].specifier
    assert {"transformers", "huggingface_hub"} <= {requirement.name for requirement in parse(SPACE)}


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", ["lock.txt", "floor.txt"])
def test_a_lock_pins_all_that_is_declared(name, python, platform):
    pinned, needs = pins(name, python, platform), declared(["dev"])
    del needs["torch"]
    for package, requirement in needs.items():
        assert requirement.specifier.contains(pinned[package]), package


@pytest.mark.parametrize("python", PYTHONS)
def test_trl_is_in_the_lock_alone_where_it_runs(python):
    (needs,) = map(Requirement, PROJECT["optional-dependencies"]["trl"])
    found = pins("lock.txt", python).get("trl")
    assert (found is not None) == needs.marker.evaluate({"python_version": python})
    assert found is None or needs.specifier.contains(found)
    assert "trl" not in pins("floor.txt", python)


@pytest.mark.parametrize("python", PYTHONS)
def test_the_floor_is_the_lowest_that_is_declared(python):
    pinned, needs = pins("floor.txt", python), declared(["dev"])
    del needs["torch"]
    lower = {package: lowest(requirement) for package, requirement in needs.items()}
    differ = {package for package, bound in lower.items() if not same_release(bound, pinned[package])}
    assert not differ


def same_release(bound, version):
    """1.2 is 1.2.0. A lowest release that was withdrawn is followed by the next: 1.2 by 1.2.1."""
    return minor(f"{bound}.0") == minor(f"{version}.0")


@pytest.mark.parametrize("name", FILES)
def test_no_lock_holds_torch_or_cuda(name):
    names = {requirement.name for requirement in parse(ROOT / "requirements" / name)}
    assert not {package for package in names if re.match("torch|nvidia|cuda|triton", package)}
    assert len(names) > 5


@pytest.mark.parametrize("python", PYTHONS)
def test_torch_has_one_pin_of_its_own(python):
    (pin,) = re.findall(r"^TORCH \?= (.*)$", MAKEFILE, re.MULTILINE)
    (exact,) = Requirement(pin).specifier
    assert exact.operator == "=="
    assert declared()["torch"].specifier.contains(exact.version)
    locked = pins("lock.txt", python)
    shared = {package: version for package, version in pins("torch.txt", python).items() if package in locked}
    assert shared
    assert shared.items() <= locked.items()
    # The file was made for torch: its own needs, which nothing else has.
    assert {"sympy", "mpmath"} <= set(pins("torch.txt", python)) - set(locked)


def test_workflows_install_the_pinned_torch():
    (pin,) = re.findall(r"^TORCH \?= (.*)$", MAKEFILE, re.MULTILINE)
    for name in ("tests", "nightly"):
        workflow = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text()
        assert re.findall(r"^  TORCH: (\S+) torchvision==", workflow, re.MULTILINE) == [pin]


@pytest.fixture
def tree(tmp_path):
    for name in (*caps.CAPPED, "modeling"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_caps_are_raised_everywhere(tree):
    caps.raise_caps(tree, "6.9.2", "11.0.1")
    for name in caps.CAPPED:
        text = (tree / name).read_text()
        assert re.search(r"\btransformers>=[\d.]+,<6\.10\b", text)
        assert re.search(r"\bhuggingface_hub>=[\d.]+,<12\b", text)
        assert text.count("\n") == (ROOT / name).read_text().count("\n")
    path, value = caps.find_constant(tree / "modeling", "NEWEST_TESTED")
    assert ast.literal_eval(value) == (6, 9)
    assert ast.literal_eval(caps.find_constant(tree / "modeling", "OLDEST")[1]) == supported("OLDEST")
    changed = {
        file.name
        for file in path.parent.glob("*.py")
        if file.read_text() != (ROOT / "modeling" / file.name).read_text()
    }
    assert changed == {path.name}


def test_caps_that_are_not_found_are_an_error(tree):
    project = tree / "pyproject.toml"
    project.write_text(re.sub(r"\btransformers>=[\d.]+,<", "transformers<", project.read_text()))
    with pytest.raises(ValueError, match="transformers"):
        caps.raise_caps(tree, "5.30.0", "2.4.0")
    with pytest.raises(ValueError, match="NEWEST_TESTED"):
        caps.find_constant(tree / "hub_cards", "NEWEST_TESTED")
