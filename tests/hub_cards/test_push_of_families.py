"""Every family to the Hub and back by remote code; which base and which processor a repository has."""

import hashlib
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from fake_hub import environment
from tiny_models import build_inputs, samples_of, tiny_pair

PUSH = """
from transformers import AutoProcessor
from learnpruner import LearnPrunerForConditionalGeneration as Factory
torch.manual_seed(1)
model = Factory.from_pretrained(base, dtype="auto", pruner_ratio=0.4).train_pruner_only().eval()
torch.nn.init.normal_(model.model.pruner.output.weight, std=0.5)
model.config.pruner_trained = True
model.push_to_hub(repo_id, processor=AutoProcessor.from_pretrained("user/base"))
with torch.no_grad():
    result = model(**torch.load(inputs)).logits.double().sum().item()
"""
REMOTE = """
import json, sys
for name in ("learnpruner", "datasets", "evaluate"):
    sys.modules[name] = None  # as where only torch and transformers are installed
import torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModel
torch.set_num_threads(1)
def answer_of(name, folder):
    model = AutoModel.from_pretrained(f"user/of-{name}", trust_remote_code=True, dtype="auto").eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    with torch.no_grad():
        logits = model(**torch.load(folder / "inputs.pt")).logits
        model.save_pretrained(folder / "light")
        model.lm_head.weight.mul_(2)  # as a merged adapter changes it
        model.save_pretrained(folder / "whole")
    saved = [len(load_file(folder / name / "model.safetensors")) for name in ("light", "whole")]
    return {"logits": logits.double().sum().item(), "dtype": str(model.lm_head.weight.dtype), "saved": saved}


folder, *names = sys.argv[1:]
print("RESULTS" + json.dumps([answer_of(name, Path(folder) / name) for name in names]))
"""


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param((("llava", torch.float32), ("qwen2_vl", torch.float32)), marks=pytest.mark.core),
        pytest.param(
            (("llava", torch.bfloat16), ("llava_next", torch.float32), ("qwen2_5_vl", torch.float32)),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["core", "others"],
)
def test_pruners_come_back_from_the_hub(cases, hub, worker, base, tmp_path):
    """One process, without the package, opens them one after the other."""
    pushed = [push(family, dtype, hub, worker, tmp_path) for family, dtype in cases]
    names = [name for name, _ in pushed]
    run = subprocess.run(
        [sys.executable, "-c", REMOTE, str(tmp_path), *names],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(hub, tmp_path / "home"),
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads(run.stdout.split("RESULTS")[1])
    for (_, dtype), (name, expected), result in zip(cases, pushed, results, strict=True):
        assert result["logits"] == expected
        assert result["dtype"] == str(dtype)
        pruner, every = result["saved"]
        assert pruner == 6 < every
        # What the card says will run is what is there.
        files = hub.files(f"user/of-{name}")
        listed = dict(re.findall(r"^\| `(\w+\.py)` \| `(\w{64})` \|$", files["README.md"].decode(), flags=re.M))
        code = {path: hashlib.sha256(content).hexdigest() for path, content in files.items() if path.endswith(".py")}
        assert listed == code
        assert code


def push(family, dtype, hub, worker, tmp_path):
    """Pushes a pruner of the family; returns its name, and the sum of its logits on the inputs in its folder."""
    name = f"{family}-{str(dtype).rpartition('.')[2]}".replace("_", "-")
    folder = tmp_path / name
    tiny_pair(family, dtype=dtype)[0].save_pretrained(folder / "base")
    hub.publish(f"user/base-{name}", folder / "base")
    torch.save(build_inputs(family, samples_of("padded", family), dtype=dtype), folder / "inputs.pt")
    options = {"base": f"user/base-{name}", "repo_id": f"user/of-{name}", "inputs": folder / "inputs.pt"}
    return name, worker(PUSH, **options).result


def at_revision(light, folder, revision):
    shutil.copytree(light, folder)
    config = json.loads((folder / "config.json").read_text()) | {"base_model_revision": revision}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_base_is_pinned_where_it_was_loaded(hub, worker, light, base_folder, tmp_path):
    code = "from learnpruner import LearnPrunerForConditionalGeneration as Factory; import builtins\n"
    loaded = hub.publish("user/base", base_folder)
    worker(code + "builtins.kept = Factory.from_pretrained(folder)", folder=at_revision(light, tmp_path / "free", None))
    assert hub.publish("user/base", base_folder) != loaded  # it has moved since
    worker("import builtins; builtins.kept.push_to_hub('user/pinned')")
    assert json.loads(hub.files("user/pinned")["config.json"])["base_model_revision"] == loaded


def test_a_branch_that_looks_like_a_commit_is_pinned(hub, worker, light, base_folder, tmp_path):
    """Hexadecimal digits, but not 40 of them."""
    commit = hub.publish("user/base", base_folder)
    hub.repos["user/base"]["refs"]["facade"] = commit
    folder = at_revision(light, tmp_path / "branch", "facade")
    code = """
from learnpruner import LearnPrunerForConditionalGeneration as Factory
from learnpruner.hub_cards.push import pin_base
model = Factory.from_pretrained(folder)
result = [model.config.base_model_revision]
model.config.base_model_revision = "facade"
result += [pin_base(model, False, None)[1]]
assert main(["verify", folder]) == 0
"""
    answer = worker(code, folder=folder)
    assert answer.result == [commit, commit]
    assert "user/base at NO FIXED REVISION" in answer.out


def test_another_base_has_a_revision_of_its_own(hub, worker, light, base_folder):
    commit = hub.publish("user/copy-of-base", base_folder)
    command = "result = main(['push', folder, 'user/on-copy', '--base', 'user/copy-of-base'])"
    answer = worker(command, folder=light)
    assert answer.result == 0, answer.err
    config = json.loads(hub.files("user/on-copy")["config.json"])
    assert (config["base_model_name_or_path"], config["base_model_revision"]) == ("user/copy-of-base", commit)


def test_a_merged_adapter_is_not_pushed_as_a_pruner(hub, worker, light):
    code = """
from peft import LoraConfig, get_peft_model
from learnpruner import LearnPrunerForConditionalGeneration as Factory
lora = LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False)
model = get_peft_model(Factory.from_pretrained(folder), lora).merge_and_unload().requires_grad_(False)
model.push_to_hub("user/with-adapter", **options)
"""
    answer = worker(code, folder=light, options={}, check=False)
    assert "merged=True (--merged)" in answer.error
    assert "user/with-adapter" not in hub.repos
    worker(code, folder=light, options={"merged": True})
    assert json.loads(hub.files("user/with-adapter")["config.json"])["base_model_name_or_path"] is None


def test_the_checkpoints_own_processor_goes_before_its_bases(hub, worker, light, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(light, folder)
    (folder / "chat_template.jinja").write_text("its own")
    assert worker("result = main(['push', folder, 'user/own-processor'])", folder=folder).result == 0
    assert hub.files("user/own-processor")["chat_template.jinja"] == b"its own"
    # From the Hub, too.
    command = "result = main(['push', 'user/own-processor', 'user/own-processor-again'])"
    assert worker(command).result == 0
    assert hub.files("user/own-processor-again")["chat_template.jinja"] == b"its own"
    # And the base's where there is none.
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    assert worker("result = main(['push', folder, 'user/no-processor'])", folder=folder).result == 0
    assert hub.files("user/no-processor")["chat_template.jinja"] == hub.files("user/base")["chat_template.jinja"]


def test_a_processor_with_code_of_its_own_is_refused_plainly(hub, worker, light, tmp_path):
    folder = tmp_path / "coded"
    shutil.copytree(light, folder)
    config = json.loads((folder / "processor_config.json").read_text())
    config["auto_map"] = {"AutoProcessor": "processing_mine.MyProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(config))
    (folder / "processing_mine.py").write_text("class MyProcessor: ...\n")
    code = """
from transformers import LlavaProcessor
from learnpruner import LearnPrunerForConditionalGeneration as Factory
class MyProcessor(LlavaProcessor): ...
stock = LlavaProcessor.from_pretrained("user/base")
mine = MyProcessor(stock.image_processor, stock.tokenizer, patch_size=8, vision_feature_select_strategy="default")
Factory.from_pretrained(light).push_to_hub("user/coded", processor=mine)
"""
    given = worker(code, light=light, check=False).error
    beside = worker("main(['push', folder, 'user/coded'])", folder=folder).err
    for error in (given, beside):
        assert "runs code of its own" in error
        assert "a class of transformers" in error
    assert "processor=..." in given
    assert "processing_mine.MyProcessor by its processor_config.json" in beside
    assert "user/coded" not in hub.repos
