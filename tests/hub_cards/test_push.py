"""A pruner's repository: what is pushed, in one commit, and what is refused before anything is uploaded."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HTTPError
from PIL import Image
from safetensors.torch import load, load_file, save_file

from learnpruner.hub_cards.checks import hub_reached

from fake_hub import environment
from recorded import training_record, write

PUSH = """
from learnpruner import LearnPrunerForConditionalGeneration as Factory
from learnpruner.hub_cards import push_pruner
model = Factory.from_pretrained(folder)
push = push_pruner(model, repo_id, **options)
result = {"files": push.files, "commit": push.commit and push.commit.oid, "text": str(push)}
"""
EXPECTED = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.mark.core
def test_push_is_one_commit_of_all_that_a_pruner_needs(hub, worker, light, evidence, tmp_path):
    Image.new("RGB", (8, 8), "teal").save(tmp_path / "drawn.png")
    options = {"results": evidence, "picture": str(tmp_path / "drawn.png"), "commit_message": "First"}
    pushed = worker(PUSH, folder=light, repo_id="user/full-card", options=options).result
    files, repo = hub.files("user/full-card"), hub.repos["user/full-card"]
    assert [branch for branch, _ in repo["log"]] == ["main", "main"]  # the empty one, and ours
    assert pushed["commit"] == repo["refs"]["main"]
    code = {path.name for path in light.glob("*.py")}
    results = {f"results/{name}.json" for name in ("none", "half", "tenth", "random", "speed")}
    extra = {".gitattributes", "kept_tokens.png", ".eval_results/easy-vqa-scenes-standard.yaml"}
    assert set(files) == EXPECTED | code | results | extra
    assert pushed["files"] == {name: len(files[name]) for name in files if name != ".gitattributes"}
    # Listed by the real client, too.
    listed = worker("from huggingface_hub import HfApi; result = HfApi().list_repo_files('user/full-card')").result
    assert set(listed) == set(files)
    assert files["model.safetensors"] == (light / "model.safetensors").read_bytes()
    for path in light.glob("*.py"):
        assert files[path.name] == path.read_bytes()
    for path in evidence:
        assert files[f"results/{path.rpartition('/')[2]}"] == Path(path).read_bytes()


def test_dry_run_lists_files_and_sizes_and_asks_the_hub_to_change_nothing(hub, worker, light):
    before = hub.writes()
    # It needs no token, either.
    answer = worker("result = main(['push', folder, 'user/dry', '--dry-run'])", token=None, folder=light)
    assert answer.result == 0, answer.err
    assert hub.writes() == before
    assert "user/dry" not in hub.repos
    lines = dict(line.split() for line in answer.out.splitlines()[1:])
    assert set(lines) == EXPECTED | {path.name for path in light.glob("*.py")}
    assert int(lines["model.safetensors"].replace(",", "")) == (light / "model.safetensors").stat().st_size
    assert "nothing was uploaded" in answer.out.splitlines()[0]


def test_private_branch_and_pull_request(hub, worker, light):
    worker(PUSH, folder=light, repo_id="user/private", options={"private": True})
    assert hub.repos["user/private"]["private"]
    worker(PUSH, folder=light, repo_id="user/public", options={})
    assert not hub.repos["user/public"]["private"]
    # Asked to be private, nothing is published in a public repository.
    answer = worker(PUSH, check=False, folder=light, repo_id="user/public", options={"private": True})
    assert "is public" in answer.error
    main = hub.repos["user/public"]["refs"]["main"]
    other = {"tags": ["a-new-tag"]}
    worker(PUSH, folder=light, repo_id="user/public", options={"revision": "next", **other})
    worker(PUSH, folder=light, repo_id="user/public", options={"create_pr": True, **other})
    refs = hub.repos["user/public"]["refs"]
    assert set(refs) == {"main", "next", "refs/pr/1"}
    assert refs["main"] == main
    for branch in ("next", "refs/pr/1"):
        assert b"a-new-tag" in hub.files("user/public", branch)["README.md"]


def test_all_weights(hub, worker, light, base_folder):
    worker(PUSH, folder=light, repo_id="user/merged", options={"merged": True})
    weights = load(hub.files("user/merged")["model.safetensors"])
    for name, tensor in load_file(light / "model.safetensors").items():
        assert torch.equal(weights[name], tensor)
    assert set(load_file(base_folder / "model.safetensors")) < set(weights)
    assert json.loads(hub.files("user/merged")["config.json"])["base_model_name_or_path"] is None


THREE_WAYS = """
import json
from pathlib import Path
from transformers import AutoProcessor
from learnpruner import LearnPrunerForConditionalGeneration as Factory
from learnpruner.training import PrunerCollator, PrunerTrainer, PrunerTrainingArguments, load_samples
processor = AutoProcessor.from_pretrained("user/base")
model = Factory.from_pretrained("user/base", pruner_ratio=0.4)
arguments = PrunerTrainingArguments(
    output_dir=folder, max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True,
    push_to_hub=True, hub_model_id="user/by-trainer",
)
trainer = PrunerTrainer(model, arguments, PrunerCollator(processor), load_samples(data))
trainer.train()
trainer.push_to_hub()
model.push_to_hub("user/by-model")
model.save_pretrained(folder)
processor.save_pretrained(folder)
(Path(folder) / "training.json").write_text(json.dumps(trainer.record()))
assert main(["push", folder, "user/by-command"]) == 0
"""


def test_trainer_model_and_command_give_the_same_repository(hub, worker, base, data, tmp_path):
    worker(THREE_WAYS, folder=tmp_path / "out", data=data)
    names = ("by-trainer", "by-model", "by-command")
    repos = {name: hub.files(f"user/{name}") for name in names}
    assert "training.json" in repos["by-model"]
    for name in names:
        assert set(repos[name]) == set(repos["by-model"])
        for path, content in repos[name].items():
            content, expected = content.replace(name.encode(), b"by-model"), repos["by-model"][path]
            if path in ("config.json", "tokenizer_config.json"):
                # Trainer sets use_cache=False in the model it trains, which transformers forgets as it loads it; and
                # tokenizers record whether they were loaded from a folder.
                differ = {"use_cache": None, "is_local": None}
                content, expected = ({**json.loads(text), **differ} for text in (content, expected))
            assert content == expected, (name, path)
    record = json.loads(repos["by-model"]["training.json"])
    assert f"| steps | {record['steps']} |" in repos["by-trainer"]["README.md"].decode()


def train(worker, tmp_path, data, **settings):
    settings = {
        "model_name_or_path": "user/base",
        "train_data": str(data),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "push_to_hub": True,
        **settings,
    }
    (tmp_path / "settings.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return worker("result = main(['train', path])", path=tmp_path / "settings.yaml")


def test_the_train_command_pushes(hub, worker, base, data, tmp_path):
    answer = train(worker, tmp_path, data, hub_model_id="user/by-train", hub_private_repo=True)
    assert answer.result == 0, answer.err
    files = hub.files("user/by-train")
    assert set(files) >= EXPECTED | {"training.json"}
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    assert "| train data | questions.json |" in files["README.md"].decode()
    assert str(tmp_path).encode() not in b"".join(files.values())
    assert hub.repos["user/by-train"]["private"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"hub_strategy": "every_save"}, "hub_strategy"), ({"model_name_or_path": "folder"}, "nobody else")],
)
def test_a_training_that_could_not_be_pushed_does_not_begin(
    settings, message, hub, worker, base_folder, data, tmp_path
):
    if "model_name_or_path" in settings:
        settings = {"model_name_or_path": str(base_folder)}
    answer = train(worker, tmp_path, data, hub_model_id="user/bad", **settings)
    assert answer.result == 2
    assert message in answer.err.strip().splitlines()[-1]
    assert "user/bad" not in hub.repos
    assert not (tmp_path / "out" / "model.safetensors").exists()


REMOTE = """
import json, sys
NAMES = ("cache", "past_key_values")
for name in ("learnpruner", "datasets", "evaluate"):
    sys.modules[name] = None  # as where only torch and transformers are installed
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
results = {}
for revision in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(
        "user/published", trust_remote_code=True, revision=None if revision == "none" else revision
    ).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    processor = AutoProcessor.from_pretrained("user/published")
    inputs = processor(images=Image.new("RGB", (32, 32), "teal"), text="<image> w7 w8", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    state = model.state_dict()
    results[revision] = {
        "pruner": state["model.pruner.output.weight"].sum().item(),
        "base": state["lm_head.weight"].sum().item(),
        "kept": [int(mask.sum()) for mask in next(output[n] for n in NAMES if n in output).kept_mask],
        "revision": model.config.base_model_revision,
    }
print("RESULTS" + json.dumps(results))
"""


def run_remote(hub, home, *revisions, **variables):
    command = [sys.executable, "-c", REMOTE, *revisions]
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=home, env=environment(hub, home, **variables), check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.split("RESULTS")[1])


def edited(folder, target, change):
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    save_file({name: change(name, value) for name, value in weights.items()}, target / "model.safetensors")
    return target


@pytest.mark.core
def test_a_published_pruner_opens_anywhere(hub, worker, light, base, base_folder, evidence, tmp_path):
    """By its id, without the package; at a revision; on the base that it was trained on, though the base's main has
    moved; offline; and pushed again after training."""
    worker(PUSH, folder=light, repo_id="user/published", options={"results": evidence})
    first = hub.repos["user/published"]["refs"]["main"]
    assert {name for name in hub.files("user/published") if name.startswith("results/")}

    moved = edited(base_folder, tmp_path / "moved", lambda name, value: value + 1 if "lm_head" in name else value)
    assert hub.publish("user/base", moved) != base
    later = edited(light, tmp_path / "later", lambda name, value: value * 2)
    try:
        worker(PUSH, folder=later, repo_id="user/published", options={})
        home = tmp_path / "home"
        home.mkdir()
        online = run_remote(hub, home, "none", first)
        shutil.rmtree(home / "modules", ignore_errors=True)
        requests = len(hub.requests)
        offline = run_remote(hub, home, "none", first, HF_HUB_OFFLINE="1")
    finally:
        hub.publish("user/base", base_folder)
    # Results of the pruner that was there before are gone, in the same commit as the new weights; those that are of the
    # base alone are as true as before.
    results = {name for name in hub.files("user/published") if name.startswith(("results/", ".eval_results/"))}
    assert results == {"results/none.json", "results/random.json"}
    assert [branch for branch, _ in hub.repos["user/published"]["log"]] == ["main"] * 3

    pruner = load_file(light / "model.safetensors")["model.pruner.output.weight"].sum().item()
    head = load_file(base_folder / "model.safetensors")
    (head,) = (value.sum().item() for name, value in head.items() if "lm_head" in name)
    for results in (online, offline):
        assert results[first]["pruner"] == pytest.approx(pruner)
        assert results["none"]["pruner"] == pytest.approx(2 * pruner)
        for result in results.values():
            assert result["base"] == pytest.approx(head)
            assert result["revision"] == base
            assert 0 < result["kept"][1] < result["kept"][0] < 16 + 3
    assert len(hub.requests) == requests


@pytest.mark.core
@pytest.mark.parametrize("step", [("PUT", "/lfs/"), ("POST", "/commit/")], ids=["weights", "commit"])
def test_a_failed_upload_leaves_no_half_repository(step, hub, worker, light):
    hub.fail = step
    answer = worker("result = main(['push', folder, 'user/failed'])", folder=light)
    assert answer.result == 2
    assert len(answer.err.strip().splitlines()) == 1
    assert "no space is left" in answer.err
    assert "user/failed" not in hub.repos
    # A repository that was there stays as it was.
    hub.fail = None
    worker(PUSH, folder=light, repo_id="user/stays", options={})
    before = hub.repos["user/stays"]["refs"].copy()
    hub.fail = step
    answer = worker("result = main(['push', folder, 'user/stays', '--merged'])", folder=light)
    assert answer.result == 2
    assert hub.repos["user/stays"]["refs"] == before


def bad_folder(light, base, tmp_path, kind):
    folder = tmp_path / kind
    shutil.copytree(light, folder)
    if kind == "pickled":
        torch.save({}, folder / "pytorch_model.bin")
    elif kind == "foreign":
        save_file({"lora": torch.zeros(1)}, folder / "adapter_model.safetensors")
    elif kind == "tampered":
        with (folder / "scores_learnpruner.py").open("a") as file:
            file.write("print('hello')\n")
    elif kind == "other_code":
        (folder / "helper.py").write_text("")
    elif kind == "other_model":
        save_file({"model.pruner.other": torch.zeros(1)}, folder / "model.safetensors")
    elif kind == "no_config":
        (folder / "config.json").write_text("[]")
    elif kind == "local_base":
        changed_config(folder, base_model_name_or_path=str(base), base_model_revision=None)
    elif kind == "no_type":
        changed_config(folder, model_type=[])
    elif kind == "no_name":
        changed_config(folder, base_model_name_or_path=3)
    elif kind == "no_number":
        changed_config(folder, pruner_diversity="a tenth")
    return folder


def changed_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pickled", "pytorch_model.bin"),
        ("foreign", "adapter_model.safetensors"),
        ("tampered", "scores_learnpruner.py"),
        ("other_code", "helper.py"),
        ("other_model", "does not fit"),
        ("local_base", "a folder that nobody else has"),
        ("no_config", "config.json is no configuration"),
        ("no_type", "config.json is no configuration"),
        ("no_name", "base_model_name_or_path"),
        ("no_number", "pruner_diversity"),
    ],
)
def test_bad_folders_are_refused(kind, message, hub, worker, light, base_folder, tmp_path):
    before = hub.writes()
    folder = bad_folder(light, base_folder, tmp_path, kind)
    answer = worker("result = main(['push', folder, 'user/bad'])", folder=folder)
    assert answer.result == 2
    (line,) = answer.err.strip().splitlines()[-1:]
    assert line.startswith("learnpruner: ")
    assert message in line
    assert hub.writes() == before


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (["user/bad"], None, "hf auth login"),
        (["user/bad"], "hf_wrong", "Invalid"),
        (["user/bad name"], True, "user/bad name"),
        (["someone/else"], True, "no rights"),
        (["user/bad", "--results", "nowhere.json"], True, "nowhere.json"),
        (["user/bad", "--results", __file__], True, "is not called .json"),
        (["user/bad", "--picture", "nowhere.png"], True, "nowhere.png"),
    ],
)
def test_bad_arguments_are_refused(arguments, token, message, hub, worker, light):
    token, before = "hf_of_user" if token is True else token, hub.writes()
    answer = worker("result = main(['push', folder, *arguments])", token=token, folder=light, arguments=arguments)
    assert answer.result == 2
    (line,) = answer.err.strip().splitlines()
    assert message in line
    assert hub.writes() == before


def test_a_checkpoint_that_is_not_there(hub, worker):
    answer = worker("result = main(['push', 'user/nothing', 'user/bad'])")
    assert answer.result == 2
    assert "user/nothing" in answer.err
    assert "user/bad" not in hub.repos


def test_a_base_in_a_folder_is_not_named_on_the_hub(hub, worker, light, base_folder, tmp_path):
    code = """
from learnpruner import LearnPrunerForConditionalGeneration as Factory
Factory.from_pretrained(base).train_pruner_only().save_pretrained(folder)
torch.manual_seed(0)
result = [main(["push", folder, "user/on-folder", *more]) for more in ([], ["--base", "user/base"])]
"""
    answer = worker(code, base=base_folder, folder=tmp_path / "light")
    assert answer.result == [2, 0], answer.err
    assert "--base" in answer.err
    config = json.loads(hub.files("user/on-folder")["config.json"])
    assert config["base_model_name_or_path"] == "user/base"
    # Pinned: the commit that it was loaded at.
    assert config["base_model_revision"] == hub.repos["user/base"]["refs"]["main"]
    assert not any(str(base_folder).encode() in content for content in hub.files("user/on-folder").values())


@pytest.mark.parametrize("field", ["base_sha256", "pruner_sha256"])
def test_results_of_other_weights_are_refused(field, hub, worker, light, evidence, tmp_path):
    record = json.loads(Path(evidence[1]).read_text()) | {field: "0" * 64}
    (path,) = write(tmp_path, {"other.json": record})
    answer = worker("result = main(['push', folder, 'user/bad', '--results', path])", folder=light, path=path)
    assert answer.result == 2
    assert "other.json" in answer.err
    assert "other weights" in answer.err
    assert "user/bad" not in hub.repos


def test_training_of_other_weights_is_refused(hub, worker, light):
    options = {"training": training_record("0" * 64)}
    answer = worker(PUSH, check=False, folder=light, repo_id="user/bad", options=options)
    assert "other weights" in answer.error
    assert "user/bad" not in hub.repos


@pytest.mark.parametrize("content", ["3", "[]"])
def test_a_training_that_is_none_is_left_out_with_a_warning(content, hub, worker, light, tmp_path):
    shutil.copytree(light, tmp_path / "odd")
    (tmp_path / "odd" / "training.json").write_text(content)
    answer = worker("result = main(['push', folder, 'user/odd', '--dry-run'])", folder=tmp_path / "odd")
    assert answer.result == 0, answer.err
    assert "training.json" not in answer.out
    answer = worker("result = main(['verify', folder])", folder=tmp_path / "odd")
    assert answer.result == 2
    assert "training.json is not a record of `learnpruner train`" in answer.err.strip().splitlines()[-1]


@pytest.mark.parametrize("call", ["push_to_hub=True, repo_id='user/saved'", "True, None, True, repo_id='user/saved'"])
def test_saving_does_not_push_beside_the_push(call, hub, worker, light, tmp_path):
    code = f"""
from learnpruner import LearnPrunerForConditionalGeneration as Factory
Factory.from_pretrained(light).save_pretrained(folder, {call})
"""
    before = hub.writes()
    answer = worker(code, check=False, light=light, folder=tmp_path / "saved")
    assert "model.push_to_hub(repo_id)" in (answer.error or "")
    assert hub.writes() == before


def test_a_tokenizer_is_no_processor(hub, worker, light):
    code = """
from transformers import AutoTokenizer
from learnpruner import LearnPrunerForConditionalGeneration as Factory
Factory.from_pretrained(light).push_to_hub("user/tokenized", processor=AutoTokenizer.from_pretrained("user/base"))
"""
    answer = worker(code, check=False, light=light)
    assert answer.error.startswith("ValueError")
    assert "is no processor" in answer.error
    assert "user/tokenized" not in hub.repos


def test_weights_that_are_in_the_way(hub, worker, light):
    hub.create("user/occupied")
    hub.commit("user/occupied", {"pytorch_model.bin": b"pickle"})
    before = hub.repos["user/occupied"]["refs"].copy()
    answer = worker(PUSH, check=False, folder=light, repo_id="user/occupied", options={})
    assert "pytorch_model.bin" in answer.error
    assert hub.repos["user/occupied"]["refs"] == before


def test_a_hub_that_does_not_answer_is_an_oserror_that_says_so():
    with pytest.raises(ConnectionError, match="cannot be reached"), hub_reached():
        raise HTTPError("connection refused")
