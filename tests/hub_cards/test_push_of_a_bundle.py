"""Code that came with a checkpoint pushes as transformers does: there is no card to write where the package is not."""

import json
import subprocess
import sys

from fake_hub import TOKEN, environment

BUNDLE = """
import sys
sys.modules["learnpruner"] = None  # as where only torch and transformers are installed
from transformers import AutoModel
light, folder = sys.argv[1:]
model = AutoModel.from_pretrained(light, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
model.push_to_hub("user/by-bundle", private=True, commit_message="By the bundle")
model.save_pretrained(folder, push_to_hub=True, repo_id="user/saved-by-bundle")
"""


def test_a_bundle_pushes_as_transformers_does(hub, light, tmp_path):
    settings = environment(hub, tmp_path) | {"HF_TOKEN": TOKEN}
    command = [sys.executable, "-c", BUNDLE, str(light), str(tmp_path / "saved")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=settings, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    for repo_id in ("user/by-bundle", "user/saved-by-bundle"):
        files = hub.files(repo_id)
        assert {"config.json", "model.safetensors", "hub_learnpruner.py"} <= set(files)
        assert files["hub_learnpruner.py"] == (light / "hub_learnpruner.py").read_bytes()
        assert json.loads(files["config.json"])["base_model_name_or_path"] == "user/base"
        assert not any(name.startswith("tokenizer") for name in files)  # the package's push brings the processor
