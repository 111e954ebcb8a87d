"""The page on how to add a method, followed to the letter."""

import re
from pathlib import Path

import pytest
import torch

import learnpruner.methods
from learnpruner.methods import METHODS

from tiny_models import build_inputs, samples_of, tiny_pair

PAGE = (Path(learnpruner.methods.__file__).parent / "README.md").read_text()


@pytest.fixture
def added():
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "METHODS[" in block and "class" in block
    ]
    before = dict(METHODS)
    exec(compile(code, "README.md", "exec"), {"__name__": "norm"})
    try:
        yield METHODS[(set(METHODS) - set(before)).pop()]
    finally:
        for name in set(METHODS) - set(before):
            del METHODS[name]


def test_the_pages_method_works(added):
    _, pruned = tiny_pair("llava_next")
    inputs = build_inputs("llava_next", samples_of("mixed", "llava_next"))
    outputs = pruned(**inputs, schedule=added(ratio=0.3))
    scores, (mask,) = outputs.vision_scores[0], outputs.kept_mask
    vision = inputs["input_ids"] == pruned.config.image_token_id
    for row in range(2):
        kept, dropped = (scores[row][vision[row] & which] for which in (mask[row], ~mask[row]))
        assert len(kept) > 0
        if row == 0:  # one image: its longest features, and nothing else
            assert kept.min() > dropped.nan_to_num(-torch.inf).max()
    generated = pruned.generate(**inputs, schedule=added(ratio=0.3), max_new_tokens=1, do_sample=False)
    assert torch.equal(generated[:, -1], outputs.logits[:, -1].argmax(-1))


def test_the_page_names_every_method():
    table = re.findall(r"^\| (`.*?) \|", PAGE, re.M)
    named = {name for cell in table for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(METHODS)
