"""Checkpoints: stock ones in both key layouts, full ones, pruner-only ones, and folders that need no package."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from learnpruner import LearnPrunerForConditionalGeneration, LearnPrunerLlavaForConditionalGeneration
from learnpruner import compat_learnpruner as compat
from learnpruner.compat_learnpruner import CACHE
from learnpruner.hub_learnpruner import find_base

from tiny_models import (
    FAMILIES,
    IMAGE,
    LAYERS,
    LLAVA,
    PRUNED,
    QWEN,
    STOCK,
    VIDEO,
    build_inputs,
    samples_of,
    tiny_config,
    tiny_pair,
    tiny_processor,
)

pytestmark = pytest.mark.core
WEIGHTS = "model.safetensors"

# The names that Hub checkpoints use, in place of those of the classes since transformers 4.52.
LLAVA_NAMES = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
    "lm_head.": "language_model.lm_head.",
}
QWEN_NAMES = {"model.language_model.": "model.", "model.visual.": "visual."}


def hub_name(family, name):
    for start, replacement in (QWEN_NAMES if family in QWEN else LLAVA_NAMES).items():
        if name.startswith(start):
            return replacement + name.removeprefix(start)
    return name


@pytest.fixture
def family():
    return "llava"


@pytest.fixture
def stock_folder(tmp_path, family):
    stock, _ = tiny_pair(family)
    stock.save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def edit_weights(folder, change):
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("layout", ["transformers", "hub", "module"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_checkpoint_loads_with_only_the_pruner_missing(family, layout, stock_folder):
    stock, _ = tiny_pair(family)
    if layout != "transformers":
        named = {name: value.contiguous() for name, value in stock.state_dict().items()}
        if layout == "hub":
            named = {hub_name(family, name): value for name, value in named.items()}
        edit_weights(stock_folder, lambda weights: named)
    model, info = PRUNED[family].from_pretrained(stock_folder, pruner_ratio=0.3, output_loading_info=True)
    assert {name.rsplit(".", 2)[0] for name in info["missing_keys"]} == {"model.pruner"}
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.config.pruner_ratio == 0.3
    for name, value in stock.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    inputs = build_inputs(family, samples_of("padded", family))
    assert torch.equal(model(**inputs, pruner_ratio=1.0).logits, stock(**inputs).logits)


def write_as_on_the_hub(folder, family, tied):
    """A checkpoint as Qwen published them: flat, with the names of its time, in bfloat16."""
    stock, _ = tiny_pair(family)
    config = json.loads(stock.config.to_json_string())
    text, vision = config.pop("text_config"), config["vision_config"]
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "initializer_range")
    kept = ("depth", "hidden_size", "num_heads", "patch_size", "spatial_merge_size", "temporal_patch_size")
    kept += ("embed_dim", "mlp_ratio", "out_hidden_size", "intermediate_size", "window_size", "fullatt_block_indexes")
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    flat = {
        "architectures": [STOCK[family].__name__],
        "model_type": family,
        **{name: text[name] for name in names},
        **{name: config[name] for name in tokens},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_dropout": 0.0,
        "max_window_layers": LAYERS,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "vision_config": {"in_chans": 3, **{name: vision[name] for name in kept if name in vision}},
    }
    weights = {hub_name(family, name): value.bfloat16().clone() for name, value in stock.state_dict().items()}
    if tied:
        del weights["lm_head.weight"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(flat))
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", QWEN)
def test_checkpoints_as_the_hub_has_them(family, tied, tmp_path):
    write_as_on_the_hub(tmp_path / "hub", family, tied)
    stock, loading = STOCK[family].from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    model = LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "hub", pruner_ratio=0.4)
    assert model.dtype == stock.dtype == torch.bfloat16
    text, expected = model.config.text_config, stock.config.text_config
    assert text.rope_parameters == expected.rope_parameters
    assert text.rope_parameters["mrope_section"] == [2, 1, 1]
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    inputs = build_inputs(family, samples_of("image_and_video", family))
    assert torch.equal(model(**inputs, pruner_ratio=1.0).logits, stock(**inputs).logits)
    arguments = {**inputs, "max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}
    assert torch.equal(model.generate(**arguments, pruner_ratio=1.0), stock.generate(**arguments))
    pruned = model(**inputs)
    assert pruned.kept_mask is not None
    model.train_pruner_only().eval().save_pretrained(tmp_path / "light")
    model.save_pretrained(tmp_path / "merged", pruner_only=False)
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / WEIGHTS)) != tied
    for folder in ("light", "merged"):
        again = LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / folder)
        assert again.dtype == torch.bfloat16
        assert again.config.text_config.rope_parameters == text.rope_parameters
        assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
        assert torch.equal(again(**inputs).logits, pruned.logits)
        assert torch.equal(again(**inputs, pruner_ratio=1.0).logits, stock(**inputs).logits)
        if folder == "light":
            shutil.rmtree(tmp_path / "hub")


@pytest.mark.parametrize(
    "lost",
    ["language_model.model.layers.2.mlp.up_proj.weight", "language_model.lm_head.weight", "multi_modal_projector"],
)
def test_any_other_missing_weight_is_an_error(lost, stock_folder):
    edit_weights(stock_folder, lambda weights: {k: v for k, v in weights.items() if not k.startswith(lost)})
    with pytest.raises(RuntimeError, match="lacks weights"):
        LearnPrunerForConditionalGeneration.from_pretrained(stock_folder)


def test_a_full_checkpoint_without_its_pruner_is_an_error(stock_folder, tmp_path):
    LearnPrunerForConditionalGeneration.from_pretrained(stock_folder).save_pretrained(tmp_path / "full")
    edit_weights(tmp_path / "full", lambda weights: {k: v for k, v in weights.items() if "pruner" not in k})
    with pytest.raises(RuntimeError, match=r"model\.pruner"):
        LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "full")


@pytest.mark.parametrize("kind", ["stock", "full", "pruner_only"])
def test_arguments_of_from_pretrained(kind, stock_folder, tmp_path):
    edit_weights(stock_folder, lambda weights: {name: value.bfloat16() for name, value in weights.items()})
    folder, config = stock_folder, json.loads((stock_folder / "config.json").read_text())
    (stock_folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    if kind != "stock":
        model = LearnPrunerForConditionalGeneration.from_pretrained(stock_folder, dtype="auto")
        folder = tmp_path / kind
        (model.train_pruner_only() if kind == "pruner_only" else model).save_pretrained(folder)
    for dtype, expected in (("auto", torch.bfloat16), (torch.float16, torch.float16), ("float32", torch.float32)):
        model = LearnPrunerForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", pruner_ratio=0.25, pruner_layer=1, device_map="cpu"
        )
        assert model.lm_head.weight.dtype == expected
        assert {parameter.dtype for parameter in model.model.pruner.parameters()} == {torch.float32}
        assert model.config.text_config._attn_implementation == "eager"
        assert (model.config.pruner_ratio, model.config.pruner_layer) == (0.25, 1)
    with pytest.raises(TypeError, match="pruner_ratoi"):
        LearnPrunerForConditionalGeneration.from_pretrained(folder, pruner_ratoi=0.5)


def test_no_checkpoint_there(tmp_path):
    for nowhere in (str(tmp_path / "nowhere"), tmp_path / "nowhere"):
        with pytest.raises(OSError, match=r"No checkpoint at .*nowhere"):
            LearnPrunerForConditionalGeneration.from_pretrained(nowhere)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_factory_picks_the_class(family, stock_folder, tmp_path):
    model = LearnPrunerForConditionalGeneration.from_pretrained(stock_folder, pruner_ratio=0.5, dtype=torch.bfloat16)
    assert type(model) is PRUNED[family]
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.model.pruner.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "full")
    assert type(LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "full")) is PRUNED[family]


def test_unsupported_checkpoints_name_what_is_supported(tmp_path):
    transformers.LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="learnpruner_llava_next"):
        LearnPrunerForConditionalGeneration.from_pretrained(tmp_path)
    tiny_config("llava_next").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="picks the class"):
        LearnPrunerLlavaForConditionalGeneration.from_pretrained(tmp_path)
    config = PRUNED["llava"].config_class.from_base_config(tiny_config("llava"))
    config.text_config = transformers.GPTNeoXConfig(num_hidden_layers=4, hidden_size=32, num_attention_heads=4)
    with pytest.raises(ValueError, match=r"llama.*mistral.*qwen2.*gpt_neox"):
        LearnPrunerLlavaForConditionalGeneration(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_checkpoint_round_trip(family, stock_folder, tmp_path):
    model = PRUNED[family].from_pretrained(stock_folder, pruner_ratio=0.4)
    model.save_pretrained(tmp_path / "full")
    shutil.rmtree(stock_folder)
    again = PRUNED[family].from_pretrained(tmp_path / "full")
    inputs = build_inputs(family, samples_of("mixed", family))
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert again.config.base_model_name_or_path is None


@pytest.mark.parametrize("family", FAMILIES)
def test_pruner_only_checkpoint(family, stock_folder, tmp_path):
    model = PRUNED[family].from_pretrained(stock_folder, pruner_ratio=0.4).train_pruner_only().eval()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".pruner." in n
    }
    model.save_pretrained(tmp_path / "light")
    assert set(load_file(tmp_path / "light" / WEIGHTS)) == {n for n in model.state_dict() if ".pruner." in n}
    loaded = LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "light")
    inputs = build_inputs(family, samples_of("mixed", family))
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    # Saved again, it is pruner-only still; merged, it needs no base.
    loaded.save_pretrained(tmp_path / "again")
    assert os.path.getsize(tmp_path / "again" / WEIGHTS) == os.path.getsize(tmp_path / "light" / WEIGHTS)
    loaded.save_pretrained(tmp_path / "merged", pruner_only=False)
    assert loaded.config.base_model_name_or_path == str(stock_folder)
    shutil.rmtree(stock_folder)
    merged = LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged(**inputs).logits, model(**inputs).logits)


def test_code_of_the_base_is_not_run_by_trust_in_the_pruner(stock_folder, tmp_path):
    (stock_folder / "custom_generate").mkdir()
    code = f"open({str(tmp_path / 'has_run')!r}, 'w')\ndef generate(model, **kwargs): return 'of the base'\n"
    (stock_folder / "custom_generate" / "generate.py").write_text(code)
    model = LearnPrunerForConditionalGeneration.from_pretrained(stock_folder).train_pruner_only()
    model.save_pretrained(tmp_path / "light")
    loaded = LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "light", trust_remote_code=True)
    assert "generate" not in vars(loaded)
    assert not (tmp_path / "has_run").exists()
    # Where the stock checkpoint itself is opened, it is what the caller trusts, or not.
    assert "generate" not in vars(LearnPrunerForConditionalGeneration.from_pretrained(stock_folder))
    trusted = LearnPrunerForConditionalGeneration.from_pretrained(stock_folder, trust_remote_code=True)
    assert trusted.generate() == "of the base"


def test_pruner_only_checkpoint_whose_base_is_gone(stock_folder, tmp_path):
    model = LearnPrunerForConditionalGeneration.from_pretrained(stock_folder).train_pruner_only().eval()
    model.save_pretrained(tmp_path / "light")
    shutil.move(stock_folder, tmp_path / "moved")
    with pytest.raises(OSError, match="base_model_name_or_path="):
        LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "light")
    found = LearnPrunerForConditionalGeneration.from_pretrained(
        tmp_path / "light", base_model_name_or_path=str(tmp_path / "moved")
    )
    inputs = build_inputs("llava", samples_of("one", "llava"))
    assert torch.equal(found(**inputs).logits, model(**inputs).logits)


def test_base_beside_the_pruner(stock_folder, tmp_path, monkeypatch):
    """A local folder may name its base relative to itself, and opens wherever the two are moved."""
    model = LearnPrunerForConditionalGeneration.from_pretrained(stock_folder).train_pruner_only().eval()
    model.config.base_model_name_or_path = "../stock"
    model.save_pretrained(tmp_path / "light")
    (tmp_path / "elsewhere").mkdir()
    for name in ("stock", "light"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    found = LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "elsewhere" / "light")
    inputs = build_inputs("llava", samples_of("one", "llava"))
    assert torch.equal(found(**inputs).logits, model(**inputs).logits)
    # Saved from there, the path still leads to the base.
    found.save_pretrained(tmp_path / "again")
    again = LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert torch.equal(again(**inputs).logits, found(**inputs).logits)
    # A folder given for this call is relative to the caller, not to the checkpoint.
    monkeypatch.chdir(tmp_path / "elsewhere")
    light = tmp_path / "elsewhere" / "light"
    given = LearnPrunerForConditionalGeneration.from_pretrained(light, base_model_name_or_path="./stock")
    assert torch.equal(given(**inputs).logits, found(**inputs).logits)
    # And the base is as safe as one that is named in full.
    found.config.base_model_name_or_path = "../stock"
    with pytest.raises(ValueError, match="holds the base model"):
        found.save_pretrained(tmp_path / "elsewhere" / "stock")


def test_a_hub_repository_names_no_folder_of_this_machine():
    with pytest.raises(ValueError, match="which only a local folder may"):
        find_base("user/light", "../stock")
    assert find_base("user/light", "user/base") == "user/base"


def test_pruner_of_another_size_is_an_error(stock_folder, tmp_path):
    model = LearnPrunerForConditionalGeneration.from_pretrained(stock_folder).train_pruner_only()
    model.save_pretrained(tmp_path / "light")
    with pytest.raises(RuntimeError, match="does not fit"):
        LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "light", pruner_hidden_size=64)


def test_a_pruner_is_not_written_over_its_base(stock_folder):
    model = LearnPrunerForConditionalGeneration.from_pretrained(stock_folder).train_pruner_only()
    before = (stock_folder / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match="holds the base model"):
        model.save_pretrained(f"{stock_folder}/../stock/")
    assert (stock_folder / WEIGHTS).read_bytes() == before


def test_what_was_unfrozen_is_not_lost(stock_folder, tmp_path):
    model = LearnPrunerForConditionalGeneration.from_pretrained(stock_folder).train_pruner_only()
    model.lm_head.weight.requires_grad_(True)
    model.lm_head.weight.data.zero_()
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")
    assert not loaded.lm_head.weight.any()
    assert loaded.config.base_model_name_or_path is None
    # A pruner-only checkpoint opens with its base frozen, so that saving it again stays small.
    fresh = LearnPrunerForConditionalGeneration.from_pretrained(stock_folder).train_pruner_only()
    fresh.save_pretrained(tmp_path / "light")
    loaded = LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "light")
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == {
        name for name, _ in loaded.named_parameters() if ".pruner." in name
    }


def test_shards(stock_folder, tmp_path):
    model = LearnPrunerForConditionalGeneration.from_pretrained(stock_folder).train_pruner_only()
    model.save_pretrained(tmp_path / "light", max_shard_size="10KB")
    assert not (tmp_path / "light" / WEIGHTS).exists()
    LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "light")
    model.save_pretrained(tmp_path / "full", max_shard_size="100KB", pruner_only=False)
    assert not (tmp_path / "full" / WEIGHTS).exists()
    LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "full")


def test_base_in_a_subfolder(stock_folder, tmp_path):
    model = LearnPrunerForConditionalGeneration.from_pretrained(tmp_path, subfolder="stock").train_pruner_only()
    model.save_pretrained(tmp_path / "light")
    assert LearnPrunerForConditionalGeneration.from_pretrained(
        tmp_path / "light"
    ).config.base_model_name_or_path == str(stock_folder)


def test_an_offloaded_pruner_is_refused(stock_folder, tmp_path):
    names = ("vision_tower", "multi_modal_projector", "language_model")
    device_map = {f"model.{name}": "cpu" for name in names} | {"model.pruner": "disk", "lm_head": "cpu"}
    with pytest.raises(ValueError, match="offloads the pruner"):
        LearnPrunerForConditionalGeneration.from_pretrained(
            stock_folder, device_map=device_map, offload_folder=tmp_path / "offload"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_without_its_head_is_not_loaded_alone(family, stock_folder):
    model = PRUNED[family].from_pretrained(stock_folder)
    with pytest.raises(NotImplementedError, match="conditional generation"):
        type(model.model).from_pretrained(stock_folder)


ON_THE_HUB = """
import sys, torch
from learnpruner import LearnPrunerForConditionalGeneration as Factory
base, light, folder = "user/base", "user/light", sys.argv[1]
model = Factory.from_pretrained(base, pruner_ratio=0.4).train_pruner_only()
model.save_pretrained(folder)
assert model.config.base_model_name_or_path == base
assert model.config.base_model_revision == "a" * 40, model.config.base_model_revision
loaded = Factory.from_pretrained(base, revision="a" * 40).base
assert (loaded.name, loaded.revision) == (base, "a" * 40)
for arguments in ({}, {"revision": "b" * 40}):
    loaded = Factory.from_pretrained(light, **arguments)
    assert loaded.config.base_model_revision == "a" * 40
    from transformers import AutoModel
    for trust in (False, True):
        remote = AutoModel.from_pretrained(light, trust_remote_code=trust, **arguments)
        assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), remote.parameters()))
"""


def test_hub_ids_and_revisions(stock_folder, tmp_path):
    """From a Hub cache laid out by hand: the base is named at the commit that was loaded, and found there again."""

    def publish(folder, repository, commit):
        place = tmp_path / "home" / "hub" / f"models--{repository.replace('/', '--')}"
        shutil.copytree(folder, place / "snapshots" / commit)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(commit)

    publish(stock_folder, "user/base", "a" * 40)
    model = LearnPrunerForConditionalGeneration.from_pretrained(stock_folder).train_pruner_only()
    model.config.base_model_name_or_path, model.config.base_model_revision = "user/base", "a" * 40
    model.save_pretrained(tmp_path / "light")
    publish(tmp_path / "light", "user/light", "b" * 40)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", ON_THE_HUB, str(tmp_path / "again")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


def test_nothing_to_name_as_a_base(tmp_path):
    _, pruned = tiny_pair()
    with pytest.raises(ValueError, match="No base to name"):
        pruned.save_pretrained(tmp_path, pruner_only=True)
    assert not os.listdir(tmp_path)
    pruned.train_pruner_only().save_pretrained(tmp_path)
    assert any("lm_head" in name for name in load_file(tmp_path / WEIGHTS))


@pytest.mark.parametrize(
    ("version", "error", "warns"),
    [("5.19.4", True, False), ("5.20.0", False, False), ("5.99.1", False, True), ("6.0.0", False, True)],
)
def test_transformers_version(version, error, warns, monkeypatch, stock_folder, caplog):
    """Too old is refused. Newer than tested runs, warns once, and names the command that checks."""
    monkeypatch.setattr(compat.transformers, "__version__", version)
    if error:
        with pytest.raises(ImportError, match="pip install"):
            LearnPrunerForConditionalGeneration.from_pretrained(stock_folder)
    else:
        with caplog.at_level("WARNING"):
            for _ in range(2):
                model = LearnPrunerForConditionalGeneration.from_pretrained(stock_folder, pruner_ratio=0.3)
        assert len(model(**build_inputs("llava", samples_of("padded", "llava"))).kept_mask) == 2
        warnings = [record.getMessage() for record in caplog.records if "was tested up to" in record.getMessage()]
        assert len(warnings) == warns
        assert all("learnpruner doctor" in warning for warning in warnings)


def test_a_name_that_transformers_lost_is_named(monkeypatch):
    monkeypatch.setattr(compat, "GENERATE_STEPS", (*compat.GENERATE_STEPS, "_prepare_what_no_release_has"))
    with pytest.raises(ImportError, match=r"has no _prepare_what_no_release_has.*pip install -U learnpruner"):
        compat.check_transformers()


ELSEWHERE = """
import json, os, sys
# As where only torch and transformers are installed.
for name in ("learnpruner", "datasets", "evaluate"):
    sys.modules[name] = None
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
image, prompt, *folders = sys.argv[1:]


def results_of(folder):
    inputs = torch.load(folder + "-inputs.pt")
    with_processor = os.path.exists(folder + "/processor_config.json")
    if with_processor:
        processed = AutoProcessor.from_pretrained(folder)(images=Image.open(image), text=prompt, return_tensors="pt")
        assert all(torch.equal(processed[name], value) for name, value in inputs.items())
    results = {"kept": []}
    for auto in (AutoModel, AutoModelForImageTextToText):
        model = auto.from_pretrained(folder, trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
        results[auto.__name__] = output.sequences.tolist()
        cache = next(output[name] for name in ("cache", "past_key_values") if name in output)
        results["kept"].append(cache.kept_mask[-1].sum().item())
    if with_processor:
        pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
        answer = pipe(images=Image.open(image), text=prompt, generate_kwargs={"max_new_tokens": 6, "do_sample": False})
        results["pipeline"] = answer[0]["generated_text"]
    model.save_pretrained(folder + "-again")
    try:
        AutoModel.from_pretrained(folder)
        results["without_trust"] = "loaded"
    except ValueError as error:
        results["without_trust"] = str(error)
    return results


print("RESULTS" + json.dumps([results_of(folder) for folder in folders]))
"""


@pytest.mark.parametrize("kind", ["full", "pruner_only"])
def test_a_saved_folder_opens_without_the_package(kind, tmp_path):
    """One process opens a folder of each family, one after the other."""
    Image.new("RGB", (50, 40), "teal").save(tmp_path / "image.png")
    prompt = "<s> w7 <image> w8 w9 w10"
    made = [saved_folder(family, kind, prompt, tmp_path) for family in FAMILIES]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "image.png"), prompt, *(str(one[0]) for one in made)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.split("RESULTS")[1])
    for (folder, processor, inputs, expected), results in zip(made, found, strict=True):
        assert results["AutoModel"] == results["AutoModelForImageTextToText"] == expected.sequences.tolist()
        assert results["kept"] == [expected[CACHE].kept_mask[-1].sum().item()] * 2
        if processor is not None:
            new = expected.sequences[:, inputs["input_ids"].shape[1] :]
            assert results["pipeline"].endswith(processor.batch_decode(new, skip_special_tokens=True)[0])
        assert "trust_remote_code=True" in results["without_trust"]
        # Saved again from there, the folder is whole: same code, same weights, our class here.
        files = {name for name in os.listdir(folder) if name.endswith((".py", ".safetensors"))}
        assert files <= set(os.listdir(f"{folder}-again"))
        again = LearnPrunerForConditionalGeneration.from_pretrained(f"{folder}-again")
        assert torch.equal(again.generate(**inputs, max_new_tokens=6, do_sample=False), expected.sequences)


def saved_folder(family, kind, prompt, tmp_path):
    """A checkpoint, with inputs for it in a file beside it.

    Returns:
        Its folder, its processor (`None` where torchvision would be needed), the inputs, and what it answers.
    """
    folder, processor = tmp_path / family.replace("_", "-"), None
    tiny_pair(family)[0].save_pretrained(tmp_path / f"stock-{family}")
    model = PRUNED[family].from_pretrained(tmp_path / f"stock-{family}", pruner_ratio=0.3)
    if kind == "pruner_only":
        model.train_pruner_only().eval()
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    if family in LLAVA:
        processor = tiny_processor(family)
        processor.save_pretrained(folder)
        inputs = dict(processor(images=Image.open(tmp_path / "image.png"), text=prompt, return_tensors="pt"))
    else:
        inputs = build_inputs(family, samples_of("one", family))
    torch.save(inputs, f"{folder}-inputs.pt")
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    return folder, processor, inputs, expected


def test_the_auto_classes_know_the_package(stock_folder, tmp_path):
    LearnPrunerForConditionalGeneration.from_pretrained(stock_folder).save_pretrained(tmp_path / "full")
    for auto in (transformers.AutoModel, transformers.AutoModelForImageTextToText):
        for trust in (False, True):
            model = auto.from_pretrained(tmp_path / "full", trust_remote_code=trust)
            assert type(model) is LearnPrunerLlavaForConditionalGeneration


def test_a_stock_class_does_not_take_it_for_its_own(stock_folder, tmp_path, caplog):
    """A model type of its own keeps the Auto classes from it, and has transformers warn where a class is named."""
    model = LearnPrunerForConditionalGeneration.from_pretrained(stock_folder)
    model.save_pretrained(tmp_path / "full")
    assert json.loads((tmp_path / "full" / "config.json").read_text())["model_type"] == "learnpruner_llava"
    with caplog.at_level("WARNING"):
        STOCK["llava"].from_pretrained(tmp_path / "full")
    assert "learnpruner_llava" in caplog.text
