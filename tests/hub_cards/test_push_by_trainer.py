"""Trainers that push: nothing is made before the training, and what is pushed is what the model pushes."""

import json

import pytest
from safetensors.torch import load

from fake_hub import READ_TOKEN
from recorded import digest

# A stock model that trains its pruner, and data for it.
SETUP = """
from transformers import AutoProcessor, Trainer, TrainingArguments
from learnpruner import LearnPrunerForConditionalGeneration as Factory
from learnpruner.hub_cards import PrunerHubCallback
from learnpruner.training import PrunerCollator, PrunerTrainer, PrunerTrainingArguments, load_samples
torch.manual_seed(0)
processor = AutoProcessor.from_pretrained("user/base")
model = Factory.from_pretrained("user/base", pruner_ratio=0.4).train_pruner_only()
samples = load_samples(data)
common = dict(output_dir=folder, max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
    remove_unused_columns=False, push_to_hub=True, hub_model_id=repo_id)
def pruner_trainer(**settings):
    arguments = PrunerTrainingArguments(**{**common, "save_strategy": "no", **settings})
    return PrunerTrainer(model, arguments, PrunerCollator(processor), samples)
def stock_trainer(**settings):
    arguments = TrainingArguments(**{**common, "save_steps": 1, **settings})
    return Trainer(model, arguments, PrunerCollator(processor), samples, callbacks=[PrunerHubCallback(**options)],
        processing_class=given)
given, options = None, {}
"""


@pytest.fixture
def run(hub, worker, base, data, tmp_path):
    def run(code, repo_id, **options):
        return worker(SETUP + code, folder=tmp_path / "out", data=data, repo_id=repo_id, **options)

    return run


def test_the_stock_trainer_pushes_what_the_model_pushes(run, hub):
    run("stock_trainer().train(); model.push_to_hub('user/of-stock-model')", "user/of-stock-trainer")
    pushed, expected = hub.files("user/of-stock-trainer"), hub.files("user/of-stock-model")
    assert set(pushed) == set(expected)
    for name, content in pushed.items():
        assert content.replace(b"of-stock-trainer", b"of-stock-model") == expected[name], name
    assert "base_model: user/base" in pushed["README.md"].decode()
    # One commit beside the empty one, though checkpoints were saved.
    assert len(hub.repos["user/of-stock-trainer"]["log"]) == 2


def test_the_stock_trainers_own_push_is_stopped(run, hub):
    answer = run("stock_trainer().push_to_hub()", "user/stopped", check=False)
    assert "model.push_to_hub(repo_id)" in answer.error
    assert set(hub.files("user/stopped")) == {".gitattributes"}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("stock_trainer(hub_model_id=None)", "hub_model_id"),
        ("stock_trainer(hub_strategy='checkpoint')", "pickles"),
        ("model.config.base_model_name_or_path = folder; stock_trainer()", "nobody else"),
        ("stock_trainer(hub_private_repo=True)", "is public"),
        ("stock_trainer()", "handler.py"),
        (f"options = {{'token': {READ_TOKEN!r}}}; stock_trainer()", "no rights but to read"),
    ],
)
def test_a_stock_trainer_that_could_not_push_is_not_made(code, message, run, hub):
    if "user/unmade" not in hub.repos:
        hub.create("user/unmade")
        hub.commit("user/unmade", {"handler.py": b""})
    assert message in (run(code, "user/unmade", check=False).error or "")


def test_a_tokenizer_of_a_stock_trainer_is_not_pushed_as_a_processor(run, hub):
    run("given = processor.tokenizer; stock_trainer().train()", "user/of-tokenizer")
    assert hub.files("user/of-tokenizer")["processor_config.json"] == hub.files("user/base")["processor_config.json"]


def test_a_pruner_that_was_trained_further_is_pushed_again(run, hub):
    code = "trainer = pruner_trainer(learning_rate=0.01); trainer.train(); trainer.push_to_hub(license='mit')"
    run(code, "user/trained-twice")
    first = hub.files("user/trained-twice")
    code = """
model = Factory.from_pretrained(repo_id)
trainer = pruner_trainer(learning_rate=0.01, max_steps=3)
trainer.train()
result = trainer.push_to_hub().oid
"""
    commit = run(code, "user/trained-twice").result
    second = hub.files("user/trained-twice")
    assert hub.repos["user/trained-twice"]["refs"]["main"] == commit
    assert set(second) == set(first)
    steps = [json.loads(files["training.json"])["steps"] for files in (first, second)]
    digests = [digest(load(files["model.safetensors"])) for files in (first, second)]
    assert steps == [2, 3]
    assert digests[0] != digests[1]
    for files, sha256, count in zip((first, second), digests, steps):
        card = files["README.md"].decode()
        assert json.loads(files["training.json"])["pruner_sha256"] == sha256
        assert f"sha256 `{sha256}`" in card
        assert f"| steps | {count} |" in card
        assert "license: mit" in card


def test_no_repository_is_made_before_the_push(run, hub):
    run("trainer = pruner_trainer(); trainer.train(); result = trainer.hub_model_id", "user/later")
    assert "user/later" not in hub.repos
    run("trainer = pruner_trainer(); trainer.train(); trainer.push_to_hub(license='mit', tags='mine')", "user/later")
    card = hub.files("user/later")["README.md"].decode()
    assert "license: mit" in card
    assert "- mine" in card


@pytest.mark.parametrize(
    ("code", "token", "message"),
    [
        ("pruner_trainer()", READ_TOKEN, "no rights but to read"),
        ("pruner_trainer()", None, "hf auth login"),
        ("pruner_trainer(hub_private_repo=True)", True, "is public"),
        ("pruner_trainer(hub_model_id='someone/else')", True, "no rights in the namespace"),
        ("pruner_trainer(hub_model_id='user/a name')", True, "a name"),
    ],
)
def test_a_push_that_would_fail_is_told_before_the_training(code, token, message, run, hub):
    if "user/in-public" not in hub.repos:
        hub.create("user/in-public")
    before = hub.writes()
    options = {} if token is True else {"token": token}
    answer = run(code, "user/in-public", check=False, **options)
    assert message in (answer.error or "")
    assert hub.writes() == before


@pytest.mark.parametrize(("options", "message"), [("blocking=False", "blocking"), ("language='en'", "no language")])
def test_what_a_push_of_a_pruner_has_not_is_refused(options, message, run, hub):
    answer = run(f"pruner_trainer().push_to_hub({options})", "user/refused", check=False)
    assert message in answer.error
    assert "user/refused" not in hub.repos
