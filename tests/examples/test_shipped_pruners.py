"""The shipped pruners' folders, opened as README says: by their own code, or by the package, with their processors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from copy_code import PROCESSOR
from transformers.dynamic_module_utils import get_relative_import_files

from learnpruner.hub_learnpruner import AUTO_CLASSES

EXAMPLES = Path(__file__).parents[2] / "examples" / "easy_vqa"
MODELING = Path(__file__).parents[2] / "modeling"
# A pruner, its base, and its processor's code, if it has any.
SHIPPED = {"learnpruner-tiny-llava": (), "learnpruner-tiny-qwen2-vl": ("processing_tiny_qwen2_vl.py",)}

OPEN = """
import sys
sys.modules["learnpruner"] = None  # not installed
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, pipeline

(folder,) = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert model.config.pruner_trained
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
picture = Image.new("RGB", (192, 192), "teal")
chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Is it red?"}]}]
asked = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
inputs = processor.apply_chat_template(chat, **asked)
answer = model.generate(**inputs, max_new_tokens=3)
assert model(**inputs).kept_mask is not None
new = processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
again = pipe(text=chat, max_new_tokens=3, return_full_text=False)[0]["generated_text"]
assert again.strip() == new.strip(), (again, new)
assert type(AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True)) is type(model)
"""


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_pruner_opens_by_its_own_code(name, tmp_path):
    """Nobody answers a question: what would ask for trust fails."""
    command = [sys.executable, "-c", OPEN, str(EXAMPLES / name)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "env": environment, "check": False}
    run = subprocess.run(command, stdin=subprocess.DEVNULL, **options)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "[y/N]" not in run.stdout + run.stderr


@pytest.mark.parametrize(("name", "code"), SHIPPED.items(), ids=SHIPPED)
def test_it_holds_the_code_of_today_and_its_base_processor(name, code):
    folder, base = EXAMPLES / name, EXAMPLES / name.removeprefix("learnpruner-")
    (family,) = folder.glob("modeling_learnpruner_*.py")
    needed = {family.name, *(Path(file).name for file in get_relative_import_files(MODELING / family.name))}
    shipped = {path.name: path.read_text() for path in folder.glob("*.py") if path.name not in code}
    assert shipped == {file: (MODELING / file).read_text() for file in needed}
    for file in (*PROCESSOR, *code):
        assert (folder / file).read_bytes() == (base / file).read_bytes()
    model = f"{family.stem}.{json.loads((folder / 'config.json').read_text())['architectures'][0]}"
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert {auto for auto, named in auto_map.items() if named == model} == {
        "AutoModelForImageTextToText",
        *AUTO_CLASSES,
    }
