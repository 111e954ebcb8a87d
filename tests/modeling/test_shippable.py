"""What ships with a checkpoint: flat, readable, and importing nothing but torch, transformers and what they bring."""

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import check_imports, get_imports, get_relative_imports

import learnpruner

from tiny_models import LLAVA, PRUNED, QWEN, tiny_pair

pytestmark = pytest.mark.core
MODELING = Path(learnpruner.__file__).parent
SHIPPABLE = sorted(MODELING.glob("*_learnpruner*.py"))
ALLOWED = {"torch", "transformers", "huggingface_hub", "safetensors"}
STANDARD_LIBRARY = sys.stdlib_module_names


@pytest.mark.parametrize("path", SHIPPABLE, ids=lambda path: path.name)
def test_import_rules(path):
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED | STANDARD_LIBRARY
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] in ALLOWED | STANDARD_LIBRARY
        elif isinstance(node, ast.ImportFrom):
            # transformers copies `from .sibling import name` alone, found by a regular expression on the text.
            assert node.level == 1
            assert node.module
            assert (MODELING / f"{node.module}.py") in SHIPPABLE
    # The same regular expression reads docstrings and comments.
    real = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level}
    assert set(get_relative_imports(path)) == real
    assert set(get_imports(path)) <= ALLOWED | STANDARD_LIBRARY
    check_imports(path)


# Auto classes' tables are data, whose file brings no torch; geometry that a family shares with the stock class.
OWN_MODULES = ("transformers.utils", "transformers.models.auto.modeling_auto", "transformers.models.llava_next.")


def test_internal_modules_of_transformers_are_named_once():
    found = {}
    for path in SHIPPABLE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module.startswith("transformers."):
                found.setdefault(path.name, set()).add(node.module)
    assert found.pop("compat_learnpruner.py") > {"transformers.cache_utils", "transformers.masking_utils"}
    for name, modules in found.items():
        assert all(module.startswith(OWN_MODULES) for module in modules), (name, modules)


def test_relative_imports_do_not_turn_in_a_circle():
    imports = {path.stem: set(get_relative_imports(path)) for path in SHIPPABLE}
    while imports:
        leaves = {name for name, needed in imports.items() if not needed & set(imports)}
        assert leaves, f"circular: {imports}"
        imports = {name: needed for name, needed in imports.items() if name not in leaves}


def shipped(family):
    """The files of which a folder of this family holds a copy."""
    files, todo = set(), {PRUNED[family].__module__.rsplit(".", 1)[-1]}
    while todo:
        files |= todo
        todo = {name for stem in todo for name in get_relative_imports(MODELING / f"{stem}.py")} - files
    return files


@pytest.mark.parametrize("family", PRUNED)
def test_a_saved_folder_holds_all_it_imports_and_no_more_code(family, tmp_path):
    _, pruned = tiny_pair(family)
    pruned.save_pretrained(tmp_path)
    assert {path.stem for path in tmp_path.glob("*.py")} == shipped(family)


# What they had when the layer hooks were done, before gates that every kernel differentiates: a tenth more at most.
@pytest.mark.parametrize(("families", "before"), [(LLAVA, 2475), (QWEN, 2546)], ids=["llava", "qwen2_vl"])
def test_the_bundle_can_be_read_in_one_sitting(families, before):
    files = set().union(*(shipped(family) for family in families))
    lines = {path.name: len(path.read_text().splitlines()) for path in SHIPPABLE if path.stem in files}
    assert max(lines.values()) <= 400, lines
    assert sum(lines.values()) <= 1.1 * before, lines


@pytest.mark.parametrize("path", SHIPPABLE, ids=lambda path: path.name)
def test_nothing_but_declarations_and_registration_at_import(path):
    for node in ast.parse(path.read_text()).body:
        registration = isinstance(node, ast.Expr) and re.match(r"AttentionInterface\.register\(", ast.unparse(node))
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        declaration = isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef | ast.FunctionDef)
        assert registration or docstring or declaration or is_assignment_of_names(node), ast.unparse(node)


def is_assignment_of_names(node):
    """An attribute that is assigned to at import would be a patch."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    names = [name for target in targets for name in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return bool(names) and all(isinstance(name, ast.Name) for name in names)


@pytest.mark.parametrize("family", PRUNED)
def test_a_family_is_the_same_however_it_is_imported(family):
    """Its methods are those of the files that ship, and the package adds none."""
    for cls in PRUNED[family].__mro__:
        if cls.__module__.startswith("learnpruner."):
            for name, value in vars(cls).items():
                function = inspect.unwrap(getattr(value, "__func__", value))
                if inspect.isfunction(function) and "<" not in function.__code__.co_filename:
                    module = Path(function.__code__.co_filename)
                    assert module in SHIPPABLE or "transformers" in module.parts, (cls, name, module)
