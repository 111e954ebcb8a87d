"""A fake Hub, and a process that talks to it: huggingface_hub reads its address once, when it is imported."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from fake_hub import TOKEN, FakeHub, environment
from recorded import digest, records, speed_record, write
from tiny_models import tiny_pair, tiny_processor

# Runs pieces of code one after another, and answers each with a line of JSON: importing torch takes seconds.
WORKER = """
import contextlib, io, json, os, sys, traceback
import torch
import learnpruner, learnpruner.hub_cards
from learnpruner_commands import main
torch.set_num_threads(1)
for line in sys.stdin:
    task = json.loads(line)
    out, err, names = io.StringIO(), io.StringIO(), {"main": main, "torch": torch, "result": None, **task["names"]}
    answer = {"error": None}
    os.environ.pop("HF_TOKEN", None)
    if task["token"]:
        os.environ["HF_TOKEN"] = task["token"]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            exec(task["code"], names)
    except BaseException as error:
        answer["error"] = f"{type(error).__name__}: {error}"
        answer["trace"] = traceback.format_exc()
    print(json.dumps({**answer, "result": names["result"], "out": out.getvalue(), "err": err.getvalue()}), flush=True)
"""

CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


@dataclass
class Answer:
    """What a piece of code came to: its variable `result`, its error, and what it printed."""

    result: object
    error: str | None
    out: str
    err: str
    trace: str = field(default="", repr=False)


@pytest.fixture(scope="session", autouse=True)
def _gradio_folder(tmp_path_factory):
    """Gradio copies pictures into a folder of its own, which would stay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        yield


@pytest.fixture(scope="session")
def hub():
    return FakeHub()


@pytest.fixture(scope="session")
def worker(hub, tmp_path_factory):
    """`worker(code, token=..., **names)` -> [`Answer`]; an error is the caller's to look at, or with `check` fails."""
    home = tmp_path_factory.mktemp("home")
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=home,
        env=environment(hub, home),
    )

    def run(code, token=TOKEN, check=True, **names):
        task = {"code": code, "token": token, "names": {name: _plain(value) for name, value in names.items()}}
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
        answer = Answer(**json.loads(process.stdout.readline()))
        assert answer.error is None or not check, answer.trace
        return answer

    yield run
    process.stdin.close()
    process.wait(timeout=30)


def _plain(value):
    return str(value) if isinstance(value, Path) else value


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A tiny stock LLaVA and its processor."""
    folder = tmp_path_factory.mktemp("base")
    stock, _ = tiny_pair()
    stock.save_pretrained(folder)
    processor = tiny_processor("llava")
    processor.chat_template = CHAT
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A file of questions to train a pruner on."""
    folder = tmp_path_factory.mktemp("data")
    Image.new("RGB", (32, 32), "teal").save(folder / "0.png")
    rows = [{"image": "0.png", "question": "w7 w8", "answer": f"w{number}"} for number in (20, 21, 22, 23)]
    (folder / "questions.json").write_text(json.dumps(rows))
    return folder / "questions.json"


@pytest.fixture(scope="session")
def base(hub, base_folder):
    """The commit of the base on the Hub."""
    return hub.publish("user/base", base_folder)


@pytest.fixture(autouse=True)
def _no_failures(hub):
    yield
    hub.fail = hub.between = None


@pytest.fixture(scope="session")
def light(base, worker, tmp_path_factory):
    """A folder with a trained pruner alone, on the base of the Hub, and its processor."""
    folder = tmp_path_factory.mktemp("light")
    worker(
        """
from transformers import AutoProcessor
from learnpruner import LearnPrunerForConditionalGeneration as Factory
torch.manual_seed(1)
model = Factory.from_pretrained("user/base", pruner_ratio=0.4).train_pruner_only()
for layer in (model.model.pruner.hidden, model.model.pruner.output):
    torch.nn.init.normal_(layer.weight, std=0.5)
model.config.pruner_trained = True
model.save_pretrained(folder)
AutoProcessor.from_pretrained("user/base").save_pretrained(folder)
""",
        folder=folder,
    )
    return folder


@pytest.fixture(scope="session")
def digests(light):
    """sha256 of the base and of the pruner of `light`."""
    stock, _ = tiny_pair()
    return digest(stock.state_dict()), digest(load_file(light / "model.safetensors"))


@pytest.fixture(scope="session")
def evidence(digests, tmp_path_factory):
    """Files of results of the weights of `light`."""
    return write(tmp_path_factory.mktemp("evidence"), {**records(*digests), "speed.json": speed_record(*digests)})
