"""Two checkpoints with code of their own, of different versions, in one process beside the package: each is itself."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.compat_learnpruner import CACHE
from learnpruner.configuration_learnpruner import __version__

from tiny_models import IMAGE, VIDEO, build_inputs, samples_of, tiny_pair

pytestmark = pytest.mark.core
VERSION_0_1 = Path(__file__).resolve().parents[1] / "fixtures" / "version_0_1"

OPEN = """
import json, sys
import torch
from transformers import AutoModelForImageTextToText
torch.set_grad_enabled(False)
*folders, call = sys.argv[1:]
inputs, generation = torch.load(call)
full = {"dtype": torch.float32}
models = [AutoModelForImageTextToText.from_pretrained(each, trust_remote_code=True, **full) for each in folders]
import learnpruner  # beside them, and behind them
models.append(learnpruner.LearnPrunerForConditionalGeneration.from_pretrained(folders[-1], **full))
results = []
for _ in range(2):
    results = []
    for model in models:
        code = sys.modules[type(model).__module__]
        package = type(model).__module__.rpartition(".")[0]
        prompt = model(**inputs)
        output = model.generate(**inputs, **generation)
        results.append({
            "version": sys.modules[package + ".configuration_learnpruner"].__version__,
            "probe": model.model.language_model.layers[0].self_attn.config._attn_implementation,
            "kept": [kept.nonzero().tolist() for kept in prompt.kept_mask],
            "tokens": output.tolist(),
            "module": type(model).__module__,
            "output": type(prompt).__module__,
        })
print("RESULTS" + json.dumps(results))
"""


GENERATION = {"max_new_tokens": 4, "do_sample": False}


def open_all(folders, inputs, generation, tmp_path):
    """What [`OPEN`] found: of each folder's own code, and of the package with the last folder."""
    torch.save((dict(inputs), generation), tmp_path / "call.pt")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", OPEN, *map(str, folders), str(tmp_path / "call.pt")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.split("RESULTS")[1])
    roots = [each["module"].split(".")[0] for each in found]
    assert roots == ["transformers_modules"] * len(folders) + ["learnpruner"]
    assert len({each["module"] for each in found}) == len(found)
    return found


def survivors(kept_mask):
    return [kept.nonzero().tolist() for kept in kept_mask]


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_vl", marks=pytest.mark.slow)])
def test_two_versions_and_the_package(family, tmp_path):
    _, model = tiny_pair(family)
    one, other = tmp_path / "one", tmp_path / "other"
    model.save_pretrained(one)
    shutil.copytree(one, other)
    for name, old, new in (
        ("configuration_learnpruner.py", f'__version__ = "{__version__}"', '__version__ = "9.9.9"'),
        # The other version keeps the worst tokens.
        ("scores_learnpruner.py", "return (keep - drop).masked_fill", "return (drop - keep).masked_fill"),
    ):
        text = (other / name).read_text()
        assert text.count(old) == 1
        (other / name).write_text(text.replace(old, new))
    inputs = build_inputs(family, samples_of("padded", family))
    second, first, package = open_all([other, one], inputs, GENERATION, tmp_path)
    assert [found["version"] for found in (second, first, package)] == ["9.9.9", __version__, __version__]
    assert len({found["probe"] for found in (second, first, package)}) == 3
    for found in (second, first, package):
        assert found["output"].rpartition(".")[0] == found["module"].rpartition(".")[0]
    expected = survivors(model(**inputs).kept_mask)
    assert first["kept"] == package["kept"] == expected
    assert first["tokens"] == package["tokens"] == model.generate(**inputs, **GENERATION).tolist()
    for module in model.model.pruner.output.parameters():
        module.neg_()
    assert second["kept"] == survivors(model(**inputs).kept_mask) != expected
    assert second["tokens"] == model.generate(**inputs, **GENERATION).tolist()


@pytest.mark.skipif(CACHE != "past_key_values", reason="the code of version 0.1 needs transformers < 5.24")
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_version_0_1_and_today(family, tmp_path):
    """The code that version 0.1 wrote into its checkpoint, beside what is saved of the same weights today."""
    old, today = VERSION_0_1 / family, tmp_path / "today"
    LearnPrunerForConditionalGeneration.from_pretrained(old).save_pretrained(today)
    questions = json.loads((VERSION_0_1 / "questions.json").read_text())
    recorded = load_file(old / "answers.safetensors")
    inputs = build_inputs(family, questions["samples"][family], seed=questions["seed"])
    new = {"max_new_tokens": questions["max_new_tokens"], "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}
    found = open_all([old, today], inputs, new, tmp_path)
    assert [each["version"] for each in found] == ["0.1.0", __version__, __version__]
    for each in found:
        assert each["kept"] == survivors((recorded["first_kept"], recorded["second_kept"]))
        assert each["tokens"] == recorded["sequences"].tolist()
