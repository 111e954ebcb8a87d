"""Pushing to a repository that holds something: what stays, what goes, and who else is there."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from fake_hub import READ_TOKEN
from recorded import records, training_record, write

PUSH = """
from learnpruner import LearnPrunerForConditionalGeneration as Factory
from learnpruner.hub_cards import push_pruner
push = push_pruner(Factory.from_pretrained(folder), repo_id, **options)
result = {"deleted": push.deleted, "text": str(push)}
"""
WEIGHTS = "model.safetensors"
EVALUATION = ".eval_results/easy-vqa-scenes-standard.yaml"
# What a push never writes.
FOREIGN = {
    "LICENSE": b"mine\n",
    ".eval_results/community.yaml": b"- of: others\n",
    "results/notes.json": b'{"of": "others"}\n',
    "assets/logo.gif": b"GIF89a",
}


@pytest.fixture
def full(request, hub, worker, light, evidence, digests, tmp_path):
    """A repository with results, picture, training, and files of others."""
    name = f"user/again-{request.node.name.replace('[', '-').strip(']')[:60]}"
    Image.new("RGB", (8, 8), "teal").save(tmp_path / "drawn.png")
    training = training_record(digests[1])
    options = {"results": evidence, "picture": str(tmp_path / "drawn.png"), "training": training}
    worker(PUSH, folder=light, repo_id=name, options=options)
    hub.commit(name, {**hub.files(name), **FOREIGN})
    return name


def doubled(light, target):
    shutil.copytree(light, target)
    weights = load_file(target / "model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, target / "model.safetensors")
    return target


def test_what_is_of_the_same_weights_stays_and_is_on_the_new_card(hub, worker, light, full):
    before = hub.files(full)
    answer = worker(PUSH, folder=light, repo_id=full, options={"tags": ["a-new-tag"]}).result
    after = hub.files(full)
    assert answer["deleted"] == []
    assert set(after) == set(before)
    assert {name for name in after if after[name] != before[name]} == {"README.md"}
    card, old = (ModelCard(files["README.md"].decode()) for files in (after, before))
    assert "a-new-tag" in card.data.tags
    assert card.data.eval_results == old.data.eval_results
    assert len(card.data.eval_results) == 2
    assert card.text == old.text


def test_results_stay_where_the_base_was_loaded_in_another_dtype(hub, worker, light, full, tmp_path):
    before = hub.files(full)
    code = PUSH.replace("Factory.from_pretrained(folder)", "Factory.from_pretrained(folder, dtype=torch.bfloat16)")
    assert worker(code, folder=light, repo_id=full, options={}).result["deleted"] == []
    after = hub.files(full)
    for name in (EVALUATION, "kept_tokens.png", "training.json", *(n for n in before if n.startswith("results/"))):
        assert after[name] == before[name]
    # Of another pruner, what is of the base alone still stays.
    deleted = worker(code, folder=doubled(light, tmp_path / "later"), repo_id=full, options={}).result["deleted"]
    assert {name for name in deleted if name.startswith("results/")} == {
        f"results/{name}.json" for name in ("half", "tenth", "speed")
    }
    # With all weights, the other dtype is of other weights.
    deleted = worker(code, folder=light, repo_id=full, options={"merged": True}).result["deleted"]
    assert {"results/none.json", "results/random.json"} <= set(deleted)


def test_results_of_another_revision_of_the_base_go(hub, worker, light, full, base_folder, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(base_folder, moved)
    weights = load_file(moved / "model.safetensors")
    save_file({name: value + 1 if "lm_head" in name else value for name, value in weights.items()}, moved / WEIGHTS)
    commit = hub.publish("user/moved", moved)
    code = PUSH.replace("(folder)", "(folder, base_model_name_or_path='user/moved', base_model_revision=commit)")
    deleted = worker(code, folder=light, repo_id=full, commit=commit, options={}).result["deleted"]
    results = [f"results/{name}.json" for name in ("half", "none", "random", "speed", "tenth")]
    assert deleted == [EVALUATION, "kept_tokens.png", *results]


@pytest.mark.parametrize(
    "setting", ["pruner_ratio=0.1", "pruner_diversity=0.2", "pruner_query='last'"], ids=["ratio", "diversity", "query"]
)
def test_a_picture_at_other_settings_goes(setting, hub, worker, light, full):
    code = PUSH.replace("(folder)", f"(folder, {setting})")
    assert "kept_tokens.png" in worker(code, folder=light, repo_id=full, options={}).result["deleted"]


def test_what_is_of_other_weights_goes_and_is_listed(hub, worker, light, full, tmp_path):
    before = hub.files(full)
    # Left by earlier pushes: of all weights, and by another release with another processor.
    stale = ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "old_learnpruner.py"]
    stale += ["preprocessor_config.json", ".eval_results/easy-vqa-scenes-hard.yaml"]
    hub.commit(full, {**before, **dict.fromkeys(stale, b"{}")})
    later = doubled(light, tmp_path / "later")
    records_of_it = [f"results/{name}.json" for name in ("half", "tenth", "speed")]
    expected = sorted([*stale, *records_of_it, EVALUATION, "kept_tokens.png", "training.json"])
    # Told before it is done, and with nothing but the right to read.
    command = "result = main(['push', folder, repo_id, '--dry-run'])"
    dry = worker(command, token=None, folder=later, repo_id=full)
    assert dry.result == 0, dry.err
    assert sorted(line.split()[0] for line in dry.out.splitlines() if line.endswith(" deleted")) == expected
    assert set(stale) <= set(hub.files(full))
    pushed = worker(PUSH, folder=later, repo_id=full, options={}).result
    assert pushed["deleted"] == expected
    assert sorted(line.split()[0] for line in pushed["text"].splitlines() if line.endswith(" deleted")) == expected
    after = hub.files(full)
    assert set(before) - set(after) == set(expected) - set(stale)
    assert not set(stale) & set(after)
    for name, content in FOREIGN.items():
        assert after[name] == content
    # Of the base alone, and so as true as before.
    assert after["results/none.json"] == before["results/none.json"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("handler.py", "Remove it, or push to another repository"),
        ("custom_generate/generate.py", "Remove it, or push to another repository"),
        ("sub/scores_learnpruner.py", "Remove it, or push to another repository"),
        ("helper.PY", "Remove it, or push to another repository"),
        (".gitignore", "leaves out files"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["push", "dry"])
def test_code_of_others_and_what_drops_files_is_not_pushed_beside(name, message, more, hub, worker, light):
    if "user/foreign-code" not in hub.repos:
        hub.create("user/foreign-code")
    hub.commit("user/foreign-code", {".gitattributes": b"", name: b"*.json\n"})
    before = hub.writes()
    answer = worker("result = main(['push', folder, 'user/foreign-code', *more])", folder=light, more=more)
    assert answer.result == 2
    (line,) = answer.err.strip().splitlines()[-1:]
    assert name in line
    assert message in line
    assert hub.writes() == before


def test_a_result_of_the_same_name_is_replaced(hub, worker, light, full, digests, tmp_path):
    record = records(*digests)["half.json"] | {"accuracy": 0.5025}
    (path,) = write(tmp_path / "new", {"half.json": record})
    worker(PUSH, folder=light, repo_id=full, options={"results": [path]})
    assert json.loads(hub.files(full)["results/half.json"])["accuracy"] == 0.5025
    values = {result.metric_value for result in ModelCard(hub.files(full)["README.md"].decode()).data.eval_results}
    assert values == {0.5025, records(*digests)["tenth.json"]["accuracy"]}


def test_results_at_other_settings_than_the_pushed_ones_go(hub, worker, light, full):
    code = PUSH.replace("Factory.from_pretrained(folder)", "Factory.from_pretrained(folder, pruner_diversity=0.2)")
    answer = worker(code, folder=light, repo_id=full, options={}).result
    assert {"results/half.json", "results/tenth.json"} <= set(answer["deleted"])
    assert "results/none.json" in hub.files(full)


def test_a_dry_run_that_cannot_read_the_repository_says_so(worker, light):
    answer = worker("result = main(['push', folder, 'user/hidden', '--dry-run'])", token=None, folder=light)
    assert "what it would delete is not known" in answer.out.splitlines()[0]
    answer = worker("result = main(['push', folder, 'user/hidden', '--dry-run'])", folder=light)
    assert "not known" not in answer.out


def test_a_push_in_between_is_not_overwritten(hub, worker, light, full, tmp_path):
    hub.between = lambda: hub.commit(full, {**hub.files(full), "results/theirs.json": b"{}"})
    later = doubled(light, tmp_path / "later")
    answer = worker("result = main(['push', folder, repo_id])", folder=later, repo_id=full)
    assert answer.result == 2
    (line,) = answer.err.strip().splitlines()[-1:]
    assert "in between: push again" in line
    assert "results/theirs.json" in hub.files(full)
    assert hub.files(full)["model.safetensors"] == (light / "model.safetensors").read_bytes()


def test_a_pull_request_to_a_branch_deletes_what_the_branch_has(hub, worker, light, full, tmp_path):
    repo = hub.repos[full]
    repo["refs"]["v2"] = repo["refs"]["main"]
    hub.commit(full, {**hub.files(full), "v2_learnpruner.py": b""}, branch="v2")
    hub.commit(full, {name: content for name, content in hub.files(full).items() if name != "kept_tokens.png"})
    options = {"create_pr": True, "revision": "v2"}
    pushed = worker(PUSH, folder=doubled(light, tmp_path / "later"), repo_id=full, options=options).result
    assert {"v2_learnpruner.py", "kept_tokens.png"} <= set(pushed["deleted"])
    assert not {"v2_learnpruner.py", "kept_tokens.png"} & set(hub.files(full, "refs/pr/1"))
    assert "v2_learnpruner.py" in hub.files(full, "v2")


@pytest.mark.parametrize("step", [("PUT", "/lfs/"), ("POST", "/commit/")], ids=["weights", "commit"])
def test_a_failed_push_leaves_no_new_branch(step, hub, worker, light, full, tmp_path):
    refs = hub.repos[full]["refs"].copy()
    hub.fail = step
    later = doubled(light, tmp_path / "later")
    answer = worker("result = main(['push', folder, repo_id, '--revision', 'next'])", folder=later, repo_id=full)
    assert answer.result == 2
    assert hub.repos[full]["refs"] == refs
    # A new repository with a new branch goes as a whole.
    answer = worker("result = main(['push', folder, 'user/new', '--revision', 'next'])", folder=later)
    assert answer.result == 2
    assert "user/new" not in hub.repos


def test_a_template_that_the_processor_no_longer_has_goes(hub, worker, light, full):
    code = """
from transformers import AutoProcessor
from learnpruner import LearnPrunerForConditionalGeneration as Factory
processor = AutoProcessor.from_pretrained("user/base")
processor.chat_template = processor.tokenizer.chat_template = None
Factory.from_pretrained(folder).push_to_hub(repo_id, processor=processor)
"""
    worker(code, folder=light, repo_id=full)
    assert "chat_template.jinja" not in hub.files(full)


def test_a_token_that_may_only_read(hub, worker, light):
    before = hub.writes()
    answer = worker("result = main(['push', folder, 'user/bad'])", token=READ_TOKEN, folder=light)
    assert answer.result == 2
    assert "no rights but to read" in answer.err
    assert hub.writes() == before


def test_license_and_tags_stay_until_others_are_given(hub, worker, light):
    def data(**options):
        worker(PUSH, folder=light, repo_id="user/tagged", options=options)
        return ModelCard(hub.files("user/tagged")["README.md"].decode()).data

    first = data(license="mit", tags=["q", "r"])
    again = data()
    assert (again.license, again.tags) == (first.license, first.tags) == ("mit", first.tags)
    assert again.tags[-2:] == ["q", "r"]
    other = data(license="apache-2.0", tags=["s"])
    assert (other.license, other.tags) == ("apache-2.0", [*first.tags[:-2], "s"])
    # A card that cannot be read has none.
    hub.commit("user/tagged", {**hub.files("user/tagged"), "README.md": b"---\ntags: [\n---\n"})
    assert data().license is None


def test_a_license_is_on_the_card(hub, worker, light):
    command = "result = main(['push', folder, 'user/licensed', '--license', license])"
    assert worker(command, folder=light, license="Apache-2.0").result == 0
    assert ModelCard(hub.files("user/licensed")["README.md"].decode()).data.license == "apache-2.0"
    before = hub.repos["user/licensed"]["refs"].copy()
    answer = worker(command, folder=light, license="my-own")
    assert answer.result == 2
    assert "license" in answer.err
    assert hub.repos["user/licensed"]["refs"] == before
