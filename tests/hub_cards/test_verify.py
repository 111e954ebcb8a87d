"""`learnpruner verify`: what a repository is, before it is trusted; nothing of it is executed."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from learnpruner.budget_learnpruner import keep_counts

from fake_hub import TOKEN
from tiny_models import LAYERS, PATCHES

PUSH = """
from learnpruner.hub_cards.push import push_checkpoint
push_checkpoint(folder, repo_id, results=results)
"""


@pytest.fixture(scope="module")
def published(hub, worker, light, evidence):
    worker(PUSH, folder=light, repo_id="user/verified", results=evidence)
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
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in answer.out.splitlines())
    for path in light.glob("*.py"):
        assert "as in learnpruner" in rows[path.name]
    assert rows["checkpoint"] == f"{published} at {hub.repos[published]['refs']['main']}"
    assert rows["base"] == f"user/base at {base}"
    assert rows["pruner"] == digests[1]
    assert rows["results"].startswith("half.json, none.json")
    first, second = keep_counts(PATCHES, 0.4, num_layers=LAYERS, pruner_layer=2, stage_ratio=3.0)
    assert rows["vision tokens"] == f"{PATCHES} -> {first} -> {second}"
    assert hub.writes() == writes


def test_a_folder_and_a_revision_are_verified(hub, worker, published, light, changed):
    answer = worker("result = main(['verify', str(folder)])", folder=light, token=None)
    assert answer.result == 0, answer.err
    assert "none recorded" in answer.out
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


FOREIGN = "evil/repo--mod.Cls"
PIPELINE = {"image-text-to-text": {"impl": FOREIGN}}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pytorch_model.bin", b"x", "pytorch_model.bin"),
        ("sub/rng_state.pth", b"x", "sub/rng_state.pth"),
        ("training_args.BIN", b"x", "training_args.BIN"),
        ("other.safetensors", b"x", "other.safetensors"),
        ("scorer_learnpruner.py", b"print('hello')\n", "scorer_learnpruner.py"),
        ("helper.py", b"", "helper.py"),
        ("config.json", tampered_config, "other/repo--modeling_other"),
        (
            "config.json",
            with_code("config.json", ["auto_map"], {"AutoModel": "scorer_learnpruner.x/evil--mod.Cls"}),
            "evil",
        ),
        ("config.json", with_code("config.json", ["custom_pipelines"], PIPELINE), FOREIGN),
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
    if not name.endswith((".py", ".json")):
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
