"""README's Python, run as it is printed, where a small model stands at the address that it names."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from new_base import save_base

README = (Path(__file__).parents[2] / "README.md").read_text()
# Those that name what cannot be had here: a repository that is yet to be published.
SNIPPETS = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "<user>" not in code]
BASE = "llava-hf/llava-1.5-7b-hf"


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder to stand in: the base that README names, an image, and data."""
    monkeypatch.chdir(tmp_path)
    save_base(BASE)
    Image.new("RGB", (192, 192), "red").save("0.png")
    rows = [{"image": "0.png", "question": "is there a circle?", "answer": "no"} for _ in range(2)]
    Path("my_questions.json").write_text(json.dumps(rows))
    return {"image": Image.open("0.png")}


def test_readme_runs_as_printed(there):
    for name in ("from_pretrained(base", "from_base(", "PrunerTrainer(model,", "Trainer(model,", "METHODS["):
        assert any(name in code for code in SNIPPETS)
    for code in SNIPPETS:
        exec(compile(code, "README.md", "exec"), there)
    names = {name for code in SNIPPETS for name in re.findall(r'save_pretrained\("(.*?)"', code)}
    assert names == {"my-pruner", "my-pruner-merged"}
    sizes = [Path(name, "model.safetensors").stat().st_size for name in ("my-pruner", "my-pruner-merged")]
    assert sizes[0] < sizes[1] / 2
    assert there["model"].config.pruner_trained
