"""Every form of `from_pretrained` that the stock method takes; and what is saved beside the weights comes back."""

import json
import shutil
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig, pipeline
from transformers.models.auto import modeling_auto

from learnpruner import LearnPrunerForConditionalGeneration

from tiny_models import FAMILIES, LLAVA, PRUNED, STOCK, build_inputs, samples_of, tiny_pair, tiny_processor

pytestmark = pytest.mark.core
KINDS = ("full", "pruner_only")
FACTORY = LearnPrunerForConditionalGeneration.from_pretrained
RATIO = 0.3


# Whole checkpoints are read by the stock loader, which knows no family.
SAVED = [*(("llava", "full"), ("qwen2_5_vl", "full")), *((family, "pruner_only") for family in FAMILIES)]


@pytest.fixture(scope="module", params=SAVED, ids="-".join)
def saved(request, tmp_path_factory):
    """A checkpoint whose pruner, ratio and generation settings are not what a new model has; and what it answers."""
    family, kind = request.param
    folder = tmp_path_factory.mktemp("saved")
    tiny_pair(family)[0].save_pretrained(folder / "base")
    model = PRUNED[family].from_pretrained(folder / "base", pruner_ratio=RATIO)
    torch.manual_seed(1)
    for parameter in model.model.pruner.parameters():
        parameter.data.normal_()
    model.config.pruner_trained = True
    model.generation_config.max_new_tokens, model.generation_config.repetition_penalty = 7, 1.3
    if kind == "pruner_only":
        model.train_pruner_only().eval()
    model.save_pretrained(folder / "plain")
    inputs = build_inputs(family, samples_of("padded", family))
    with torch.no_grad():
        logits = model(**inputs).logits
    return SimpleNamespace(model=model, folder=folder, family=family, kind=kind, inputs=inputs, logits=logits)


def check(saved, model):
    """The model is the saved one, whole."""
    assert type(model) is PRUNED[saved.family]
    with torch.no_grad():
        assert torch.equal(model.eval()(**saved.inputs).logits, saved.logits)
    settings = model.generation_config
    assert (settings.max_new_tokens, settings.repetition_penalty) == (7, 1.3)
    assert model.config.pruner_trained
    assert (model.config.base_model_name_or_path is not None) == (saved.kind == "pruner_only")


def loaders(saved):
    return FACTORY, PRUNED[saved.family].from_pretrained, AutoModelForImageTextToText.from_pretrained


def test_variants_shards_and_subfolders_come_back(saved, tmp_path):
    for name, arguments in {
        "variant": {"variant": "fp16"},
        "shards": {"max_shard_size": "20KB"},
        "shards-of-a-variant": {"variant": "fp16", "max_shard_size": "20KB"},
        "a/subfolder": {},
    }.items():
        saved.model.save_pretrained(tmp_path / name, **arguments)
        assert (len(list((tmp_path / name).glob("*.safetensors"))) > 1) == ("shards" in name)
        place = {"variant": "fp16"} if "variant" in arguments else {}
        path = tmp_path / name
        if name == "a/subfolder":
            path, place = tmp_path, {"subfolder": name}
        for load in loaders(saved):
            check(saved, load(path, **place))
    for load in loaders(saved):
        with pytest.raises(OSError, match=r"model\.nowhere\.safetensors"):
            load(tmp_path / "variant", variant="nowhere")


def test_configurations_in_all_forms(saved, tmp_path):
    plain, stored = saved.folder / "plain", saved.folder / "plain" / "config.json"
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(stored, tmp_path / "elsewhere")
    given = saved.model.config.to_dict()
    for load in loaders(saved):
        check(saved, load(plain, config=saved.model.config))
        check(saved, load(str(plain), config=AutoConfig.from_pretrained(plain)))
    for load in loaders(saved)[:2]:  # Auto classes take no path here
        for config in (plain, str(plain), stored, str(stored), tmp_path / "elsewhere"):
            check(saved, load(plain, config=config))
    assert saved.model.config.to_dict() == given


def test_overrides_of_the_configuration(saved):
    plain = saved.folder / "plain"
    for load in loaders(saved):
        model = load(plain, output_attentions=True, pruner_ratio=0.5, text_config={"attention_dropout": 0.25})
        assert model.config.output_attentions
        assert model.config.pruner_ratio == 0.5
        assert model.config.text_config.attention_dropout == 0.25
        assert model.config.text_config.num_hidden_layers == saved.model.config.text_config.num_hidden_layers
        model = load(plain, dtype=torch.bfloat16, attn_implementation="eager", device_map="cpu")
        assert model.lm_head.weight.dtype == torch.bfloat16
        assert {parameter.dtype for parameter in model.model.pruner.parameters()} == {torch.float32}
        for part in (model.config, model.config.text_config, model.config.vision_config):
            assert part._attn_implementation == "eager"
        assert load(plain, generation_config=GenerationConfig(max_new_tokens=3)).generation_config.max_new_tokens == 3
        with pytest.raises(TypeError, match="pruner_ratoi"):
            load(plain, pruner_ratoi=0.5)
        # What a pipeline does: a configuration, and again the fields that it was read with.
        config = AutoConfig.from_pretrained(plain, pruner_ratio=0.5)
        assert load(plain, config=config, pruner_ratio=0.5).config.pruner_ratio == 0.5


def test_weights_in_memory(saved):
    """The stock form for weights that are no files; they are the model's own, so that no base is named for them."""
    saved.model.train(False)
    for load in loaders(saved)[:2]:
        for config in (saved.model.config, saved.folder / "plain"):
            model = load(None, config=config, state_dict=saved.model.state_dict())
            with torch.no_grad():
                assert torch.equal(model.eval()(**saved.inputs).logits, saved.logits)
            assert model.config.base_model_name_or_path is None
            untrained = deepcopy(saved.model.config)
            untrained.pruner_trained = False
            assert load(None, config=untrained, state_dict=saved.model.state_dict()).config.pruner_trained
        without = {name: value for name, value in saved.model.state_dict().items() if "pruner" not in name}
        with pytest.raises(RuntimeError, match=r"model\.pruner"):
            load(None, config=saved.model.config, state_dict=without)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_checkpoint_in_all_forms(family, tmp_path):
    stock, _ = tiny_pair(family)
    stock.save_pretrained(tmp_path)
    inputs = build_inputs(family, samples_of("padded", family))
    expected = stock(**inputs).logits
    ours = PRUNED[family].config_class.from_base_config(stock.config, pruner_ratio=RATIO)
    for arguments in (
        {},
        {"config": stock.config},
        {"config": tmp_path},
        {"config": tmp_path / "config.json"},
        {"config": ours},
        {"config": AutoConfig.from_pretrained(tmp_path, attn_implementation="sdpa"), "pruner_ratio": RATIO},
    ):
        model = FACTORY(tmp_path, **arguments)
        assert torch.equal(model(**inputs, pruner_ratio=1.0).logits, expected)
        assert model.base.name == str(tmp_path)
        assert not model.config.pruner_trained
    model = FACTORY(None, config=stock.config, state_dict=stock.state_dict())
    assert torch.equal(model(**inputs, pruner_ratio=1.0).logits, expected)
    assert model.base.name is None
    eager = AutoConfig.from_pretrained(tmp_path, attn_implementation="eager")
    assert FACTORY(tmp_path, config=eager).config.text_config._attn_implementation == "eager"


def test_a_base_that_is_only_a_variant_is_not_named(tmp_path, caplog):
    """A pruner's checkpoint says where its base is, not which of its files."""
    tiny_pair("llava")[0].save_pretrained(tmp_path / "base", variant="fp16")
    model = FACTORY(tmp_path / "base", variant="fp16").train_pruner_only()
    assert "Checkpoints will hold all weights" in caplog.text
    model.save_pretrained(tmp_path / "saved")
    again = FACTORY(tmp_path / "saved").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_a_base_given_for_a_call_is_named_in_full(tmp_path, monkeypatch):
    tiny_pair("llava")[0].save_pretrained(tmp_path / "base")
    FACTORY(tmp_path / "base").train_pruner_only().save_pretrained(tmp_path / "light")
    (tmp_path / "deep").mkdir()
    shutil.move(tmp_path / "base", tmp_path / "deep" / "moved")
    monkeypatch.chdir(tmp_path / "deep")
    FACTORY(tmp_path / "light", base_model_name_or_path="./moved").save_pretrained(tmp_path / "again")
    monkeypatch.chdir(tmp_path)
    assert FACTORY(tmp_path / "again").config.base_model_name_or_path == str(tmp_path / "deep" / "moved")


AUTO_CLASSES = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForPreTraining")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_auto_class_that_opens_the_stock_one(family, tmp_path):
    """Nor does any other know the stock family: they are asked, not listed."""
    stock, model = tiny_pair(family)
    model.save_pretrained(tmp_path)
    config = type(stock.config)
    autos = {
        name: auto
        for name, auto in vars(modeling_auto).items()
        if name.startswith("AutoModel") and config in (getattr(auto, "_model_mapping", None) or ())
    }
    assert set(autos) <= set(AUTO_CLASSES)
    assert set(autos) == set(AUTO_CLASSES) or family not in LLAVA
    for auto in autos.values():
        assert type(auto.from_pretrained(tmp_path)) is PRUNED[family]
    assert set(AUTO_CLASSES) | {"AutoConfig"} == set(AutoConfig.from_pretrained(tmp_path).auto_map)
    # `transformers serve` and pipelines look for the type and for the class by names.
    for name in ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"):
        assert getattr(modeling_auto, name)[model.config.model_type] == type(model).__name__
        assert getattr(modeling_auto, name)[stock.config.model_type] == type(stock).__name__


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", LLAVA)
def test_a_pipeline_takes_the_ratio(family, kind, tmp_path, caplog):
    tiny_pair(family)[0].save_pretrained(tmp_path / "base")
    model = FACTORY(tmp_path / "base")
    (model.train_pruner_only() if kind == "pruner_only" else model).save_pretrained(tmp_path / "saved")
    tiny_processor(family).save_pretrained(tmp_path / "saved")
    build = partial(pipeline, "image-text-to-text", model=str(tmp_path / "saved"))
    pipe = build(model_kwargs={"pruner_ratio": 0.25})
    assert type(pipe.model) is PRUNED[family]
    assert pipe.model.config.pruner_ratio == 0.25
    assert "is not supported" not in caplog.text
    with pytest.raises(ValueError, match="pruner_ratoi"):  # the pipeline's own, around the model's
        build(model_kwargs={"pruner_ratoi": 0.25})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_of_a_base_is_read_as_for_the_base(family, tmp_path):
    """For some families transformers does not believe the class that is stored."""
    stock, model = tiny_pair(family)
    for name, each in {"stock": stock, "pruned": model}.items():
        each.config.save_pretrained(tmp_path / name)
        tiny_processor("llava").tokenizer.save_pretrained(tmp_path / name)
        path = tmp_path / name / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "LlamaTokenizer"}))
    kinds = {type(AutoTokenizer.from_pretrained(tmp_path / name)) for name in ("stock", "pruned")}
    assert len(kinds) == 1


def test_stock_classes_are_as_they_were():
    """Entries were added to transformers' tables, none was changed."""
    for family, stock in STOCK.items():
        assert AutoModelForImageTextToText._model_mapping[type(tiny_pair(family)[0].config)] is stock
