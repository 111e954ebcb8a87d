"""Two checkpoints with code of their own, of different versions, in one process beside the package: each is itself."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from learnpruner.configuration_learnpruner import __version__

from tiny_models import build_inputs, samples_of, tiny_pair

pytestmark = pytest.mark.core

OPEN = """
import json, sys
import torch
from transformers import AutoModelForImageTextToText
torch.set_grad_enabled(False)
*folders, inputs = sys.argv[1:]
inputs = torch.load(inputs)
models = [AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval() for folder in folders]
import learnpruner  # beside them, and behind them
models.append(learnpruner.LearnPrunerForConditionalGeneration.from_pretrained(folders[0]).eval())
results = []
for _ in range(2):
    results = []
    for model in models:
        code = sys.modules[type(model).__module__]
        package = type(model).__module__.rpartition(".")[0]
        prompt = model(**inputs)
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
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


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
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
    torch.save(inputs, tmp_path / "inputs.pt")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", OPEN, str(one), str(other), str(tmp_path / "inputs.pt")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    first, second, package = json.loads(run.stdout.split("RESULTS")[1])
    assert [found["version"] for found in (first, second, package)] == [__version__, "9.9.9", __version__]
    assert len({found["probe"] for found in (first, second, package)}) == 3
    assert [found["module"].split(".")[0] for found in (first, second, package)] == [
        "transformers_modules",
        "transformers_modules",
        "learnpruner",
    ]
    for found in (first, second, package):
        assert found["output"].rpartition(".")[0] == found["module"].rpartition(".")[0]
    expected = [kept.nonzero().tolist() for kept in model(**inputs).kept_mask]
    assert first["kept"] == package["kept"] == expected
    assert first["tokens"] == package["tokens"] == model.generate(**inputs, max_new_tokens=4, do_sample=False).tolist()
    for module in model.model.pruner.output.parameters():
        module.neg_()
    assert second["kept"] == [kept.nonzero().tolist() for kept in model(**inputs).kept_mask] != expected
    assert second["tokens"] == model.generate(**inputs, max_new_tokens=4, do_sample=False).tolist()
