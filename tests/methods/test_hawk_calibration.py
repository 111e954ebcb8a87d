"""`learnpruner calibrate-hawk`: the worth of heads, against copies of the stock model that lack one, one question at a
time; and what is refused."""

import json
import random
from copy import deepcopy

import pytest
import torch
from datasets import Dataset
from PIL import Image

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.hub_cards.records import weights_digest
from learnpruner.methods import METHODS, hawk_calibration
from learnpruner.methods.hawk_calibration import calibrate, normalized, without_head
from learnpruner_commands import main

import tiny_llava
import tiny_qwen2_vl
from tiny_models import tiny_pair, tiny_processor

HEADS, NEW = 4, 1
QUESTIONS = ("w7 is w8", "w9 there a circle?", "w10 w11 w12", "w13 color w14", "w15 triangle", "red w16")


def base(family):
    """A stock model whose heads matter, the last most, and its processor."""
    if family == "llava":
        model, processor = tiny_pair("llava")[0], tiny_processor("llava")
        processor.chat_template = tiny_llava.CHAT_TEMPLATE
    else:
        torch.manual_seed(0)
        processor = tiny_qwen2_vl.build_processor()
        model = tiny_qwen2_vl.build_model(processor).eval()
        for name, parameter in model.model.language_model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                torch.nn.init.normal_(parameter, std=0.1)
    attention = model.model.language_model.layers[0].self_attn
    attention.o_proj.weight.data *= torch.arange(HEADS).repeat_interleave(attention.head_dim) ** 2
    return model, processor


def answers(model, processor, rows):
    """Of the stock model, one question at a time."""
    found = []
    for row in rows:
        content = [{"type": "image"}] * ("image" in row) + [{"type": "text", "text": row["question"]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        images = [Image.open(row["image"]).convert("RGB")] if "image" in row else None
        inputs = processor(text=text, images=images, return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
        found.append(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


def questions(folder, model, processor, name, wrong):
    """Answers are the model's own, but for the last, `wrong` of them."""
    rows = []
    for number, question in enumerate(QUESTIONS):
        noise = random.Random(f"{name} {number}").randbytes(32 * 32)
        Image.frombytes("L", (32, 32), noise).save(folder / f"{name}{number}.png")
        rows.append({"question": question, "image": str(folder / f"{name}{number}.png")})
    said = answers(model, processor, rows)
    right = len(rows) - wrong
    return [
        {**row, "answer": answer if number < right else "teal teal teal"}
        for number, (row, answer) in enumerate(zip(rows, said))
    ]


def without(model, head):
    other = deepcopy(model)
    attention = other.model.language_model.layers[0].self_attn
    with torch.no_grad():
        attention.o_proj.weight[:, head * attention.head_dim : (head + 1) * attention.head_dim] = 0
    return other


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_weights_are_the_formulas(family, tmp_path):
    stock, processor = base(family)
    stock.save_pretrained(tmp_path / "base")
    pruned = LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
    sets = {name: questions(tmp_path, stock, processor, name, wrong) for name, wrong in (("one", 0), ("two", 1))}
    record = calibrate(
        pruned, processor, {name: Dataset.from_list(rows) for name, rows in sets.items()}, 3, max_new_tokens=NEW
    )
    total = [0.0] * HEADS
    for name, rows in sets.items():
        accuracy = []
        for model in (stock, *(without(stock, head) for head in range(HEADS))):
            said = answers(model, processor, rows)
            accuracy.append(sum(one == row["answer"] for one, row in zip(said, rows)) / len(rows))
        drops = [accuracy[0] - value for value in accuracy[1:]]
        assert len(set(drops)) > 1
        shifted = [drop - min(drops) for drop in drops]
        for head in range(HEADS):
            total[head] += shifted[head] / sum(shifted) / len(sets)
        assert record["datasets"][name]["n"] == len(rows)
        assert record["datasets"][name]["accuracy"] == accuracy[0]
        assert record["datasets"][name]["without_head"] == accuracy[1:]
    assert record["weights"] == pytest.approx(total)
    assert record["base_sha256"] == weights_digest(pruned)
    assert not pruned.model.language_model.layers[0].self_attn.o_proj._forward_pre_hooks


def test_heads_that_are_worth_the_same_weigh_the_same():
    assert normalized([0.25, 0.25]) == [0.5, 0.5]
    assert normalized([-0.1, 0.1, 0.2]) == pytest.approx([0, 0.4, 0.6])


def test_a_head_is_back_after_an_error():
    attention = base("llava")[0].model.language_model.layers[0].self_attn
    with pytest.raises(RuntimeError), without_head(attention, 1):
        attention.o_proj(torch.zeros(1, 2))  # not as wide as the layer
    assert not attention.o_proj._forward_pre_hooks


@pytest.fixture
def folder(tmp_path):
    stock, processor = base("llava")
    stock.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    rows = questions(tmp_path, stock, processor, "one", 1)
    (tmp_path / "one.json").write_text(json.dumps(rows))
    chat = [{"conversations": [{"from": "human", "value": "is there a circle?"}, {"from": "gpt", "value": "no"}]}]
    (tmp_path / "chat.json").write_text(json.dumps(chat))
    return tmp_path


def run(folder, *flags, data=("one.json", "chat.json"), output="weights.json"):
    files = [str(folder / name) for name in data]
    flags = ["--data", *files, "--output", str(folder / output), *flags]
    return main(["calibrate-hawk", "--model", str(folder / "base"), *flags])


def test_the_command(folder, capsys):
    assert run(folder, "--limit", "2", "--batch-size", "2", "--max-new-tokens", str(NEW)) == 0
    record = json.loads((folder / "weights.json").read_text())
    assert "weights.json" in capsys.readouterr().out
    assert record["model"] == "base"
    assert [one["n"] for one in record["datasets"].values()] == [2, 1]
    assert sum(record["weights"]) == pytest.approx(1)
    assert METHODS["hawk"](head_weights=folder / "weights.json").head_weights == tuple(record["weights"])


def test_bad_input_is_refused_before_the_model_is_loaded(folder, capsys, monkeypatch):
    monkeypatch.setattr(hawk_calibration, "load", lambda *args: pytest.fail("the model was loaded"))
    (folder / "open.json").write_text('[{"messages": [{"role": "user", "content": "is there a circle?"}]}]')
    (folder / "other").mkdir()
    (folder / "other" / "one.json").write_text((folder / "one.json").read_text())
    for arguments, message in (
        ({"data": ["open.json"]}, "does not end in an answer"),
        ({"data": ["one.json", "other/one.json"]}, "one file name"),
        ({"data": ["none.json"]}, "none.json"),
        ({"output": "none/weights.json"}, "no such folder"),
        ({"output": "other"}, "no such folder"),
    ):
        assert run(folder, **arguments) == 2
        assert message in capsys.readouterr().err
