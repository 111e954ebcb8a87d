"""Which files a checkpoint may have, by name and by content, and whose code it may run."""

import hashlib
import io
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch

import learnpruner
from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.hub_cards.checks import check_code, list_files, refuse_unknown, refuse_weights

EASY_VQA = Path(__file__).parents[2] / "examples" / "easy_vqa"

# What a push writes, what transformers saves of tokenizers and processors, and what people add by hand.
GOOD = [
    *("README.md", "config.json", "generation_config.json", "model.safetensors", "model-00001-of-00002.safetensors"),
    *("model.safetensors.index.json", "modeling_learnpruner_llava.py", "processor_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "merges.txt", "vocab.json"),
    *("tokenizer.model", "spiece.model", "results/half-0.05.json", ".eval_results/easy.yaml", "kept_tokens.png"),
    *("training.json", ".gitattributes", ".gitignore", "LICENSE", "LICENSE-MODEL", "NOTICE", "LICENSE.txt", "a.JPG"),
    "results/learnpruner.th.json",
]
PICKLED = ["model.pth.tar", "state.pkl.gz", "a.th", "a.mar", "a.PT", "sub/rng_state.pth", "pytorch_model.bin", "a.npy"]
COMPILED = ["kernel.so", "kernel.cpython-311.so", "kernel.dll", "helper.pyc", "__pycache__/a.cpython-311.pyc"]
UNKNOWN = [
    "state",
    "README",
    "helper.PY",
    "run.sh",
    "Dockerfile",
    "page.html",
    "notebook.ipynb",
    "data.zip",
    "x.json.gz",
]


def test_known_files_pass():
    refuse_weights(GOOD, "here")
    refuse_unknown(GOOD, "here")


@pytest.mark.parametrize(
    ("names", "message"),
    [(PICKLED, "pickled"), (COMPILED, "compiled"), (["x.safetensors", "a.gguf"], "not this model")],
)
def test_pickles_machine_code_and_other_weights_are_refused_by_name(names, message):
    for name in names:
        with pytest.raises(ValueError, match=rf"{message}.*: {re.escape(name)}\. Remove"):
            refuse_weights([*GOOD, name], "here")


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_files_are_refused_by_verify(name):
    refuse_weights([*GOOD, name], "here")
    with pytest.raises(ValueError, match=f": {name}. Remove them"):
        refuse_unknown([*GOOD, name], "here")


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("content", [pickle.dumps({}), pickle.dumps([1], protocol=2), saved({})])
def test_pickles_are_found_under_any_name(content, tmp_path):
    (tmp_path / "weights").write_bytes(content)
    (tmp_path / "notes").write_text("PK is a name")
    with pytest.raises(ValueError, match=r"pickled files.*: weights\. Remove"):
        refuse_weights(["notes", "weights"], "here", tmp_path)


@pytest.mark.parametrize("name", ["weights.txt", "model.png", "vocab.json", "LICENSE"])
def test_pickles_are_found_under_the_names_of_texts_and_pictures(name, tmp_path):
    (tmp_path / name).write_bytes(saved({}))
    with pytest.raises(ValueError, match=rf"pickled files.*: {re.escape(name)}\. Remove"):
        refuse_weights([name], "here", tmp_path)


def test_safetensors_may_begin_with_any_length(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x02\0\0\0\0\0\0{")
    refuse_weights(["model.safetensors"], "here", tmp_path)


@pytest.mark.parametrize("target", ["weights.txt", "../model.safetensors", "x.safetensors", "model.safetensors.bin"])
def test_an_index_names_the_models_own_weights_alone(target, checkpoint):
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}))
    check_code(checkpoint)
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": target}}))
    with pytest.raises(ValueError, match=rf"index\.json names weights that are not this model's: {re.escape(target)}"):
        check_code(checkpoint)


@pytest.mark.parametrize(
    "place",
    [
        ["attn_implementation"],
        ["_attn_implementation"],
        ["_attn_implementation_internal"],
        ["_experts_implementation"],
        ["text_config", "_attn_implementation"],
        ["attn_implementation", "text_config"],
    ],
)
def test_kernels_of_another_repository_are_refused(place, checkpoint):
    written = json.loads((checkpoint / "config.json").read_text())
    for value in ("sdpa", "evil/kernel", "flash|evil/kernel@main:run"):
        content = json.loads(json.dumps(written))
        inner = content
        for key in place[:-1]:
            inner = inner.setdefault(key, {})
        inner[place[-1]] = value
        (checkpoint / "config.json").write_text(json.dumps(content))
        if value == "sdpa":
            check_code(checkpoint)
            continue
        with pytest.raises(ValueError, match=rf"names kernels of another repository to run: {re.escape(value)}"):
            check_code(checkpoint)


def test_links_may_not_leave_a_folder(tmp_path):
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    for place in (folder, outside):
        place.mkdir()
        (place / "a.json").write_text("{}")
    (folder / "same.json").symlink_to("a.json")
    (folder / ".git").mkdir()
    (folder / ".git" / "index").write_bytes(b"")
    assert list_files(folder) == ["a.json", "same.json"]
    # A folder that is itself behind a link is looked into.
    (tmp_path / "link").symlink_to(folder)
    assert list_files(tmp_path / "link") == ["a.json", "same.json"]
    for target in (outside, outside / "a.json", tmp_path / "nowhere"):
        (folder / "results").symlink_to(target)
        with pytest.raises(ValueError, match=r"results in .* is a link to a place outside"):
            list_files(folder)
        (folder / "results").unlink()


@pytest.fixture
def checkpoint(base_folder, tmp_path):
    LearnPrunerForConditionalGeneration.from_pretrained(base_folder).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_code_of_this_release_is_listed_with_its_sha256(checkpoint):
    expected = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.glob("*.py")}
    assert check_code(checkpoint) == expected
    assert "modeling_learnpruner_llava.py" in expected


def test_code_of_another_release_says_which(checkpoint):
    (checkpoint / "scores_learnpruner.py").write_text("# older\n")
    with pytest.raises(ValueError, match=r"scores_learnpruner\.py") as error:
        check_code(checkpoint)
    assert "pip install" not in str(error.value)
    # The configuration keeps the release that wrote it first, whoever wrote the code.
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["learnpruner_version"] == learnpruner.__version__
    (checkpoint / "config.json").write_text(json.dumps({**config, "learnpruner_version": "0.0.6"}))
    with pytest.raises(ValueError, match=r"scores_learnpruner\.py") as error:
        check_code(checkpoint)
    assert "pip install" not in str(error.value)
    path = checkpoint / "configuration_learnpruner.py"
    code = path.read_text()
    assert f'__version__ = "{learnpruner.__version__}"\n' in code
    path.write_text(code.replace(learnpruner.__version__, "0.0.7"))
    with pytest.raises(ValueError, match=r"Its code is of 0\.0\.7: `pip install learnpruner==0\.0\.7` to verify it"):
        check_code(checkpoint)
    # No command is made of anything but a version.
    path.write_text(code.replace(learnpruner.__version__, "0.0.7 evil"))
    with pytest.raises(ValueError, match=r"_learnpruner\.py") as error:
        check_code(checkpoint)
    assert "evil" not in str(error.value)


def test_code_under_another_case_is_refused(checkpoint):
    shutil.move(checkpoint / "scores_learnpruner.py", checkpoint / "scores_learnpruner.PY")
    with pytest.raises(ValueError, match=r"scores_learnpruner\.PY"):
        check_code(checkpoint)


def test_a_processor_with_code_of_its_own_is_named():
    with pytest.raises(
        ValueError, match=r"The processor at .* runs code of its own, processing_tiny_qwen2_vl\."
    ) as error:
        check_code(EASY_VQA / "tiny-qwen2-vl")
    assert "processor.save_pretrained(folder)" in str(error.value)
