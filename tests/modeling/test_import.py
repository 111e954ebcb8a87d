"""`import learnpruner` registers the families and loads none: each is loaded when it is used."""

import ast
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

import learnpruner

from tiny_models import FAMILIES, PRUNED, tiny_pair

pytestmark = pytest.mark.core
AUTOS = (AutoModel, AutoModelForImageTextToText)
PACKAGE = Path(learnpruner.__file__)

LOADED = """
print("LOADED" + __import__("json").dumps([name for name in __import__("sys").modules]))
"""


def modules_after(code, *arguments):
    """Names of all modules that a new process has after `code`."""
    command = [sys.executable, "-c", code + LOADED, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return set(json.loads(run.stdout.split("LOADED")[1]))


def families_in(modules):
    prefix = "learnpruner.modeling_"
    return {name.removeprefix(prefix) for name in modules if name.startswith(prefix)}


def test_the_import_loads_nothing_that_takes_long():
    """Over transformers' Auto classes: configurations, and nothing of torch that they had not loaded."""
    before = modules_after("from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText")
    after = modules_after("import learnpruner")
    new = after - before
    assert not {name for name in new if name.split(".")[0] == "torch"}
    assert not {name for name in new if ".modeling_" in name or name == "transformers.modeling_utils"}
    assert {name for name in new if name.startswith("learnpruner.")} == {
        f"learnpruner.{name}" for name in ("auto", "configuration_learnpruner", "families")
    }


def test_what_is_used_loads_its_family(tmp_path):
    """An Auto class, a class, the factory and a pickle, one after the other in one process: each loads its own file
    alone."""
    for family in ("llava", "qwen2_vl"):
        tiny_pair(family)[1].save_pretrained(tmp_path / family)
    (tmp_path / "pickle").write_bytes(pickle.dumps(PRUNED["qwen2_5_vl"]))
    code = """
import pickle, sys
from pathlib import Path
import learnpruner
from transformers import AutoModel
folder = Path(sys.argv[1])
for use in (
    lambda: AutoModel.from_pretrained(folder / "llava"),
    lambda: learnpruner.LearnPrunerLlavaNextForConditionalGeneration,
    lambda: learnpruner.LearnPrunerForConditionalGeneration.from_pretrained(folder / "qwen2_vl"),
    lambda: pickle.loads((folder / "pickle").read_bytes()),
):
    before = set(sys.modules)
    use()
    print("NEW", *(name for name in sys.modules if name.startswith("learnpruner.modeling_") and name not in before))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    new = [line.split()[1:] for line in run.stdout.splitlines() if line.startswith("NEW")]
    assert new == [[f"learnpruner.modeling_learnpruner_{family}"] for family in FAMILIES]


def test_every_public_name_is_there():
    assert len(set(learnpruner.__all__)) == len(learnpruner.__all__)
    assert set(learnpruner.__all__) <= set(dir(learnpruner))
    for name in learnpruner.__all__:
        assert getattr(learnpruner, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'LearnPruner'"):
        _ = learnpruner.LearnPruner
    with pytest.raises(ImportError):
        from learnpruner import LearnPruner  # noqa: F401


def test_type_checkers_see_what_is_loaded_later():
    (block,) = (node for node in ast.parse(PACKAGE.read_text()).body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    assert {alias.name: node.module for node in block.body for alias in node.names} == learnpruner._MODULES
    # As PEP 484 wants it: without the second name, a type checker takes it for an import of the file's own.
    assert all(alias.asname == alias.name for node in block.body for alias in node.names)


TWIN = """
@strict
class LearnPrunerTwinConfig(PrunerConfig, LlavaConfig):
    model_type = "learnpruner_twin"
    base_model_type = "twin"
"""
USE_TWIN = """
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
import learnpruner
from learnpruner.families import StandIn
from learnpruner import *
assert learnpruner.__file__.startswith(__import__("sys").argv[1])
config = AutoConfig.for_model("learnpruner_twin", text_config={"num_hidden_layers": 8})
assert type(config) is LearnPrunerTwinConfig
assert LearnPrunerTwinForConditionalGeneration.config_class is LearnPrunerTwinConfig
for auto in (AutoModel, AutoModelForImageTextToText):
    assert issubclass(LearnPrunerTwinForConditionalGeneration, auto._model_mapping[LearnPrunerTwinConfig])
"""


def test_a_new_family_is_a_file_a_configuration_and_one_line(tmp_path, monkeypatch):
    package = tmp_path / "learnpruner"
    shutil.copytree(PACKAGE.parent, package)
    llava = (package / "modeling_learnpruner_llava.py").read_text()
    (package / "modeling_learnpruner_twin.py").write_text(llava.replace("LearnPrunerLlava", "LearnPrunerTwin"))
    with (package / "configuration_learnpruner.py").open("a") as file:
        file.write(TWIN)
    families = (package / "families.py").read_text()
    (line,) = re.findall(r"^ *\S*LearnPrunerLlavaConfig,\n", families, flags=re.MULTILINE)
    (package / "families.py").write_text(families.replace(line, line + line.replace("Llava", "Twin")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "learnpruner_twin" in families_in(modules_after(USE_TWIN, tmp_path))


@pytest.mark.parametrize("path", sorted(PACKAGE.parent.glob("*.py")), ids=lambda path: path.name)
def test_nothing_is_patched_at_import(path):
    """What a file does besides declaring: calls that register, and nothing is assigned but names of its own."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        stored = [part for part in ast.walk(node) if isinstance(part, ast.Attribute | ast.Subscript)]
        assert not [ast.unparse(part) for part in stored if isinstance(part.ctx, ast.Store)]
        if not isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign | ast.If):
            assert re.match(r'["\']|(AttentionInterface\.)?register\w*\(', ast.unparse(node)), ast.unparse(node)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("auto", AUTOS)
def test_the_registered_class_passes_for_the_family(auto, family):
    _, pruned = tiny_pair(family)
    cls, config = PRUNED[family], pruned.config
    registered = auto._model_mapping[type(config)]
    assert registered.__name__ == cls.__name__
    assert registered.config_class is cls.config_class
    assert isinstance(pruned, registered)
    assert issubclass(cls, registered)
    assert not isinstance(tiny_pair(family)[0], registered)
    assert registered._no_split_modules == cls._no_split_modules
    with pytest.raises(AttributeError, match=cls.__name__):
        _ = registered.no_such_attribute
    assert pickle.loads(pickle.dumps(registered)) is cls
    assert AutoConfig.for_model(config.model_type).__class__ is cls.config_class
    for model in (auto.from_config(config), registered(config), registered._from_config(config)):
        assert type(model) is cls


def test_classes_and_configurations_come_out_of_a_pickle_in_another_process(tmp_path):
    pairs = [(PRUNED[family], tiny_pair(family)[1].config) for family in FAMILIES]
    (tmp_path / "pickle").write_bytes(pickle.dumps(pairs))
    code = """
import pickle, sys
from transformers import AutoModel
for cls, config in pickle.load(open(sys.argv[1], "rb")):
    assert type(config) is cls.config_class
    assert type(AutoModel.from_config(config)) is cls
"""
    assert families_in(modules_after(code, tmp_path / "pickle")) == {f"learnpruner_{family}" for family in FAMILIES}
