"""How the model of a training is loaded: precision, attention, bits, adapters."""

import importlib.metadata
import json

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.training import PrunerTrainingArguments, loading
from learnpruner.training.loading import load_model
from learnpruner_commands import main
from learnpruner_commands.train_settings import PrunerModelArguments

from new_base import save_base
from tiny_models import FAMILIES, QWEN, tiny_pair


@pytest.fixture
def family():
    return "llava"


@pytest.fixture
def base(family, tmp_path):
    tiny_pair(family)[0].save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def loaded(base, training=None, **settings):
    return load_model(
        PrunerModelArguments(base, **settings),
        PrunerTrainingArguments(output_dir=str(base) + "-out", use_cpu=True, **(training or {})),
    )


@pytest.mark.parametrize(
    ("settings", "training", "expected"),
    [
        ({}, {}, torch.float32),
        ({}, {"bf16": True}, torch.bfloat16),
        ({"dtype": "float32"}, {"bf16": True}, torch.float32),
        ({"dtype": "auto"}, {"bf16": True}, torch.float32),
        ({"dtype": "bfloat16"}, {}, torch.bfloat16),
        ({"dtype": "float16"}, {}, torch.float16),
    ],
)
def test_precision(settings, training, expected, base):
    model = loaded(base, training, **settings)
    core = model.model
    assert {parameter.dtype for parameter in core.language_model.parameters()} == {expected}
    assert {parameter.dtype for parameter in core.pruner.parameters()} == {torch.float32}


def test_the_rest(base):
    model = loaded(base, attn_implementation="eager", pruner_ratio=0.3)
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.pruner_ratio == 0.3
    assert not isinstance(model, PeftModel)
    # A fresh pruner is made of the seed.
    first, same, other = (loaded(base, {"seed": seed}).model.pruner.hidden.weight for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_adapters(base):
    model = loaded(base, lora_rank=3, lora_dropout=0.25)
    adapter = model.active_peft_config
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout, adapter.modules_to_save) == (3, 6, 0.25, ["pruner"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "language_model" not in name} == {n for n in trained if ".pruner." in n}
    assert any("q_proj.lora_A" in name for name in trained)
    adapter = loaded(base, lora_rank=3, lora_alpha=5, lora_target_modules=r".*\.k_proj").active_peft_config
    assert (adapter.lora_alpha, adapter.target_modules) == (5, r".*\.k_proj")


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bits(family, bits, base, monkeypatch):
    """All but the language model's layers are left as they are, in every family; up to the call that loads."""
    given = {}
    monkeypatch.setattr(loading, "find_spec", lambda name: name)
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.50.0" if name == "bitsandbytes" else version(name)
    )
    real = LearnPrunerForConditionalGeneration.from_pretrained
    monkeypatch.setattr(
        loading.LearnPrunerForConditionalGeneration,
        "from_pretrained",
        lambda path, **options: given.update(options) or real(path),
    )
    loaded(base, {"bf16": True}, **{bits: True})
    config = given["quantization_config"]
    assert (config.load_in_8bit, config.load_in_4bit) == (bits == "load_in_8bit", bits == "load_in_4bit")
    towers = ["visual"] if family in QWEN else ["vision_tower", "multi_modal_projector"]
    assert sorted(config.llm_int8_skip_modules) == sorted(["lm_head", *(f"model.{n}" for n in ["pruner", *towers])])
    if bits == "load_in_4bit":
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    assert given["dtype"] == "bfloat16"


def test_bits_without_bitsandbytes(base, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        loaded(base, load_in_8bit=True)


@pytest.fixture
def folder(tmp_path):
    save_base(tmp_path / "base")
    Image.new("RGB", (192, 192), "red").save(tmp_path / "0.png")
    row = {"image": "0.png", "question": "is there a circle?", "answer": "no"}
    (tmp_path / "data.json").write_text(json.dumps([row] * 4))
    settings = {"model_name_or_path": str(tmp_path / "base"), "train_data": str(tmp_path / "data.json")}
    settings |= {"eval_data": settings["train_data"], "output_dir": str(tmp_path / "out"), "use_cpu": True}
    settings |= {"max_steps": 2, "save_steps": 2, "per_device_train_batch_size": 2, "disable_tqdm": True}
    (tmp_path / "config.json").write_text(json.dumps({**settings, "learning_rate": 1e-3}))
    return tmp_path


def test_adapters_by_the_command(folder, capsys):
    """Trained, evaluated, saved with the pruner, said how to open, finished, and another rank is another run."""
    command = ["train", str(folder / "config.json"), "--lora_rank", "4"]
    assert main(command) == 0
    said = capsys.readouterr().out
    saved = load_file(folder / "out" / "adapter_model.safetensors")
    assert any("lora_A" in name for name in saved)
    assert any("pruner" in name for name in saved)
    record = (folder / "out" / "training.json").read_text()
    assert json.loads(record)["r"] == 4
    assert json.loads(record)["accuracy"].keys() > {"1"}
    code = [line for line in said.splitlines() if line.startswith("  model = ")]
    opened = {"LearnPrunerForConditionalGeneration": LearnPrunerForConditionalGeneration, "PeftModel": PeftModel}
    exec("\n".join(line.strip() for line in code), opened)
    pruner = opened["model"].model.pruner.state_dict()
    for name, value in saved.items():
        if ".pruner." in name:
            assert torch.equal(pruner[name.partition(".pruner.")[2]], value)
    assert main(command) == 0
    assert "nothing is trained" in capsys.readouterr().out
    assert (folder / "out" / "training.json").read_text() == record
    assert main([*command[:-1], "8"]) == 2
    assert "is of another run (r 4, not 8" in capsys.readouterr().err


@pytest.mark.slow
def test_bfloat16_by_the_command(folder):
    """A base in bfloat16 and a pruner in float32, trained and saved."""
    assert main(["train", str(folder / "config.json"), "--bf16"]) == 0
    saved = load_file(folder / "out" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert json.loads((folder / "out" / "training.json").read_text())["metrics"]["train_loss"] > 0


def test_eight_bits_by_the_command(folder, monkeypatch):
    pytest.importorskip("bitsandbytes")
    assert main(["train", str(folder / "config.json"), "--load_in_8bit"]) == 0
    assert all(name.startswith("model.pruner.") for name in load_file(folder / "out" / "model.safetensors"))
    assert LearnPrunerForConditionalGeneration.from_pretrained(folder / "out").config.pruner_trained
