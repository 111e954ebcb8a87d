"""`learnpruner verify`: what a repository is, before it is trusted; nothing of it is executed."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from learnpruner.budget_learnpruner import keep_counts

from fake_hub import TOKEN, environment
from recorded import records, training_record
from tiny_models import LAYERS, PATCHES

EASY_VQA = Path(__file__).parents[2] / "examples" / "easy_vqa"
PUSH = """
from learnpruner.hub_cards.push import push_checkpoint
push_checkpoint(folder, repo_id, results=results, training=training)
"""


@pytest.fixture(scope="module")
def published(hub, worker, light, evidence, digests):
    training = training_record(digests[1])
    worker(PUSH, folder=light, repo_id="user/verified", results=evidence, training=training)
    return "user/verified"


@pytest.fixture
def changed(hub, published):
    """Pushes a file over the published ones, for a test."""
    before = hub.files(published)
    yield lambda name, content: hub.commit(published, {**before, name: content})
    hub.commit(published, before)


def test_a_repository_is_verified(hub, worker, published, light, digests, base):
    writes = hub.writes()
    answer = worker("result = main(['verify', name, '--ratio', '0.4'])", name=published, token=None)
    assert answer.result == 0, answer.err
    found, table = answer.out.split("\n\n")
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in found.splitlines())
    for path in light.glob("*.py"):
        assert "as in learnpruner" in rows[path.name]
    assert rows["checkpoint"] == f"{published} at {hub.repos[published]['refs']['main']}"
    assert rows["base"] == f"user/base at {base}"
    assert rows["pruner"] == digests[1]
    assert rows["results"].startswith("half.json, none.json")
    assert rows["training"] == "of these weights"
    first, second = keep_counts(PATCHES, 0.4, num_layers=LAYERS, pruner_layer=2, stage_ratio=3.0)
    assert rows["vision tokens"] == f"{PATCHES} -> {first} -> {second}"
    assert hub.writes() == writes
    header, *lines = (re.split(r"  +", line) for line in table.splitlines())
    recorded = records(*digests)
    kinds = recorded["none.json"]["by_kind"]
    assert header[5:] == ["after each cut", "questions", "accuracy, %", "RelAcc, %"]
    for line, name in zip(lines, ("none", "half", "random", "tenth"), strict=True):
        record = recorded[f"{name}.json"]
        shares = [kind["accuracy"] / kinds[which]["accuracy"] for which, kind in record["by_kind"].items()]
        cuts = " -> ".join(map(str, record["tokens"]["after_cuts"])) or "no cut"
        accuracy, relative = (f"{100 * value:.2f}" for value in (record["accuracy"], sum(shares) / len(shares)))
        assert line[1] == record["name"]
        assert line[5:] == [cuts, "2000", accuracy, relative]


def test_a_folder_and_a_revision_are_verified(hub, worker, published, light, changed):
    answer = worker("result = main(['verify', str(folder)])", folder=light, token=None)
    assert answer.result == 0, answer.err
    assert "none recorded" in answer.out
    assert "RelAcc" not in answer.out
    good = hub.repos[published]["refs"]["main"]
    changed("pytorch_model.bin", b"pickle")
    code = "result = [main(['verify', name, *more]) for more in ([], ['--revision', good])]"
    answer = worker(code, name=published, good=good)
    assert answer.result == [2, 0], answer.err


def tampered_config(files):
    config = json.loads(files["config.json"])
    config["auto_map"]["AutoModel"] = "other/repo--modeling_other.Model"
    return json.dumps(config).encode()


def with_code(file, place, value):
    """A published JSON file that names code of another repository, at a path of keys."""

    def changed(files):
        content = json.loads(files[file])
        inner = content
        for key in place:
            inner = inner.setdefault(key, {})
        inner |= value
        return json.dumps(content).encode()

    return changed


def replaced(file, old, new):
    def changed(files):
        assert old in files[file]
        return files[file].replace(old, new, 1)

    return changed


def without(file, field):
    """A record that does not say of which weights it is."""
    return lambda files: json.dumps({**json.loads(files[file]), field: None}).encode()


FOREIGN = "evil/repo--mod.Cls"
PIPELINE = {"image-text-to-text": {"impl": FOREIGN}}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pytorch_model.bin", b"x", "pytorch_model.bin"),
        ("sub/rng_state.pth", b"x", "sub/rng_state.pth"),
        ("training_args.BIN", b"x", "training_args.BIN"),
        ("other.safetensors", b"x", "other.safetensors"),
        ("scores_learnpruner.py", b"print('hello')\n", "scores_learnpruner.py"),
        ("helper.py", b"", "helper.py"),
        ("helper.PY", b"", "helper.PY"),
        ("model.pth.tar", b"x", "model.pth.tar"),
        ("weights", b"x", "weights"),
        ("kernel.so", b"x", "kernel.so"),
        ("README.md", replaced("README.md", b"value: 0.9765", b"value: 0.9965"), "results/half.json has 0.9765"),
        (
            ".eval_results/easy-vqa-scenes-standard.yaml",
            replaced(".eval_results/easy-vqa-scenes-standard.yaml", b"0.9765", b"0.9965"),
            "results/half.json has 0.9765",
        ),
        ("README.md", replaced("README.md", b"| 97.65 |", b"| 99.65 |"), "99.65"),
        ("README.md", replaced("README.md", b"| seed | 7 |", b"| seed | 8 |"), "seed | 8"),
        ("results/half.json", replaced("results/half.json", b": 0.9765", b": 97.65"), "half.json"),
        ("results/half.json", without("results/half.json", "base_sha256"), "half.json"),
        ("results/half.json", without("results/half.json", "pruner_sha256"), "half.json"),
        ("training.json", without("training.json", "pruner_sha256"), "training.json"),
        ("training.json", replaced("training.json", b'_sha256": "', b'_sha256": "0'), "training.json"),
        ("config.json", tampered_config, "other/repo--modeling_other"),
        (
            "config.json",
            with_code("config.json", ["auto_map"], {"AutoModel": "scores_learnpruner.x/evil--mod.Cls"}),
            "evil",
        ),
        ("config.json", with_code("config.json", ["custom_pipelines"], PIPELINE), FOREIGN),
        ("config.json", with_code("config.json", ["text_config"], {"_attn_implementation": "evil/kernel"}), "kernel"),
        ("merges.txt", b"\x80\x02}q\x00.", "merges.txt"),
        ("model.safetensors.index.json", b'{"weight_map": {"lm_head.weight": "weights.txt"}}', "weights.txt"),
        (
            "processor_config.json",
            with_code("processor_config.json", ["image_processor", "auto_map"], {"AutoImageProcessor": FOREIGN}),
            FOREIGN,
        ),
        (
            "adapter_config.json",
            b'{"base_model_name_or_path": "evil/repo", "peft_type": "LORA"}',
            "adapter_config.json",
        ),
        (
            "results/half.json",
            lambda files: files["results/half.json"].replace(b'_sha256": "', b'_sha256": "0'),
            "half",
        ),
    ],
)
def test_what_is_not_to_be_trusted_is_refused(name, content, message, hub, worker, published, changed):
    content = content if isinstance(content, bytes) else content(hub.files(published))
    changed(name, content)
    requests = len(hub.requests)
    answer = worker("result = main(['verify', name])", name=published)
    assert answer.result == 2
    (line,) = answer.err.strip().splitlines()[-1:]
    assert line.startswith("learnpruner: ")
    assert message in line
    if not name.endswith((".py", ".json", ".md", ".yaml", ".txt")):
        # Not even downloaded.
        assert not any("/resolve/" in path for _, path in hub.requests[requests:])


def test_a_folder_with_a_pickle_is_refused(worker, light, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(light, folder)
    (folder / "checkpoint-3").mkdir()
    torch.save({}, folder / "checkpoint-3" / "optimizer.pt")
    answer = worker("result = main(['verify', folder])", folder=folder)
    assert answer.result == 2
    assert "checkpoint-3/optimizer.pt" in answer.err
    # And one whose weights are another model's.
    shutil.rmtree(folder / "checkpoint-3")
    weights = load_file(folder / "model.safetensors")
    save_file({name: value[:1] for name, value in weights.items()}, folder / "model.safetensors")
    answer = worker("result = main(['verify', folder])", folder=folder)
    assert answer.result == 2
    assert "does not fit" in answer.err


def test_no_such_repository(worker):
    for name, token in (("user/none", TOKEN), ("not/a/name", TOKEN)):
        answer = worker("result = main(['verify', name])", name=name, token=token)
        assert answer.result == 2
        assert len(answer.err.strip().splitlines()) == 1
        assert name in answer.err


def test_a_folder_has_no_revision_and_no_links_that_leave_it(worker, light, tmp_path):
    answer = worker("result = main(['verify', folder, '--revision', 'main'])", folder=light)
    assert answer.result == 2
    assert "is a folder, which has no revisions" in answer.err
    folder = tmp_path / "folder"
    shutil.copytree(light, folder)
    (tmp_path / "elsewhere").mkdir()
    (folder / "results").symlink_to(tmp_path / "elsewhere")
    answer = worker("result = main(['verify', folder])", folder=folder)
    assert answer.result == 2
    assert "results in" in answer.err
    assert "is a link to a place outside" in answer.err


def test_a_base_at_no_fixed_revision_is_shown(worker, light, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(light, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "base_model_revision": None}))
    answer = worker("result = main(['verify', folder])", folder=folder)
    assert answer.result == 0, answer.err
    assert "user/base at NO FIXED REVISION" in answer.out


def test_a_processor_with_code_of_its_own_is_named(worker):
    """The small Qwen2-VL's, which is code beside the base's weights."""
    answer = worker("result = main(['verify', folder])", folder=EASY_VQA / "learnpruner-tiny-qwen2-vl")
    assert answer.result == 2
    (line,) = answer.err.strip().splitlines()[-1:]
    assert "tiny-qwen2-vl runs code of its own, processing_tiny_qwen2_vl." in line


def test_the_checkpoints_own_processor_is_used(hub, worker, light, base_folder, tmp_path):
    """Its base has none here."""
    bare, folder = tmp_path / "bare", tmp_path / "folder"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(base_folder / name, bare)
    shutil.copytree(light, folder)
    config = json.loads((folder / "config.json").read_text())
    named = {"base_model_name_or_path": "user/bare", "base_model_revision": hub.publish("user/bare", bare)}
    (folder / "config.json").write_text(json.dumps({**config, **named}))
    answer = worker("result = main(['verify', folder])", folder=folder)
    assert answer.result == 0, answer.err
    (folder / "processor_config.json").unlink()
    answer = worker("result = main(['verify', folder])", folder=folder)
    assert answer.result == 2
    assert "no processor could be loaded from user/bare" in answer.err


# In a process of its own: where this package is imported, transformers takes its classes, and not the repository's.
REMOTE = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
AutoModelForImageTextToText.from_pretrained("user/verified", trust_remote_code=True)
AutoProcessor.from_pretrained("user/verified")
own = (module for name, module in sys.modules.items() if name.startswith("transformers_modules."))
print("FILES", *(module.__file__ for module in own if module.__file__))
"""


def test_the_files_on_the_card_are_those_that_loading_runs(published, hub, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", REMOTE], capture_output=True, text=True, env=environment(hub, tmp_path), check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    executed = {Path(path).name for path in run.stdout.split("FILES")[1].split()} - {"__init__.py"}
    text = hub.files(published)["README.md"].decode().partition("\n## Code that is executed\n")[2]
    listed = dict(re.findall(r"^\| `(\w+\.py)` \| `(\w{64})` \|$", text, re.MULTILINE))
    assert set(listed) == executed
    for name, sha256 in listed.items():
        assert hashlib.sha256(hub.files(published)[name]).hexdigest() == sha256
