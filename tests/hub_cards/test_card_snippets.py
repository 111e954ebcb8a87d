"""The card's own snippets, run as they are printed but for the commit: with nobody there to answer a question."""

import re
import subprocess
import sys

from fake_hub import TOKEN, environment

PUSH = """
from learnpruner import LearnPrunerForConditionalGeneration as Factory
Factory.from_pretrained(folder).push_to_hub("user/card")
"""
USE = """
from PIL import Image
inputs = processor(images=Image.new("RGB", (32, 32)), text="<s> <image> w7", return_tensors="pt")
assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1
assert model.config.pruner_trained
print("ANSWERED")
"""
NOT_INSTALLED = 'import sys; sys.modules["learnpruner"] = None\n'


def test_the_cards_snippets(hub, worker, light, tmp_path):
    worker(PUSH, folder=light)
    card = hub.files("user/card")["README.md"].decode()
    snippets = re.findall(r"```python\n(.*?)```", card.partition("## Load it")[2].partition("\n## ")[0], re.DOTALL)
    assert len(snippets) == 2
    commit = f'"{hub.repos["user/card"]["refs"]["main"]}"'
    settings = environment(hub, tmp_path) | {"HF_TOKEN": TOKEN}
    for snippet, before in zip(snippets, (NOT_INSTALLED, "")):
        assert snippet.count('"..."') == 1
        command = [sys.executable, "-c", before + snippet.replace('"..."', commit) + USE]
        options = {"capture_output": True, "text": True, "cwd": tmp_path, "env": settings, "check": False}
        run = subprocess.run(command, stdin=subprocess.DEVNULL, **options)
        assert "ANSWERED" in run.stdout, run.stderr[-3000:]
        assert "[y/N]" not in run.stdout + run.stderr
