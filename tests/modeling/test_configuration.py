import copy
import dataclasses
import json

import pytest

import learnpruner
from learnpruner import LearnPrunerLlavaConfig, configuration_learnpruner
from learnpruner.compat_learnpruner import CACHE

from tiny_models import FAMILIES, LAYERS, PRUNED, tiny_config

pytestmark = pytest.mark.core

BAD = [
    ("pruner_ratio", 0.0),
    ("pruner_ratio", -0.1),
    ("pruner_ratio", 1.01),
    ("pruner_ratio", float("nan")),
    ("pruner_layer", 0),
    ("pruner_layer", LAYERS + 1),
    ("pruner_stage_ratio", 0.5),
    ("pruner_stage_ratio", float("inf")),
    ("pruner_diversity", 1.5),
    ("pruner_diversity", -0.1),
    ("pruner_hidden_size", 0),
    ("pruner_query", "first"),
]


def config_of(family="llava", **fields):
    return PRUNED[family].config_class.from_base_config(tiny_config(family), **fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults(family):
    config = config_of(family)
    assert config.model_type == f"learnpruner_{family}"
    assert config.pruner_ratio == 1 / 9
    assert (config.pruner_stage_ratio, config.pruner_diversity, config.pruner_hidden_size) == (3.0, 0.1, 512)
    assert (config.pruner_query, config.pruner_trained) == ("all", False)
    assert (config.base_model_name_or_path, config.base_model_revision) == (None, None)
    assert {"kept_mask", "vision_scores", CACHE} < set(config.keys_to_ignore_at_inference)


@pytest.mark.parametrize(("depth", "layer"), [(32, 12), (28, 11), (40, 15), (8, 3), (2, 1), (1, 1)])
def test_default_layer_scales_with_depth(depth, layer):
    base = tiny_config()
    base.text_config.num_hidden_layers = depth
    assert LearnPrunerLlavaConfig.from_base_config(base).pruner_layer == layer


def test_no_layer_means_the_default_layer():
    config = config_of(pruner_layer=1)
    config.pruner_layer = None
    assert config.pruner_layer == 2


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values_are_refused_on_construction(name, value):
    with pytest.raises(ValueError, match=name):
        config_of(**{name: value})


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values_are_refused_on_assignment_and_change_nothing(name, value):
    config = config_of()
    before = getattr(config, name)
    with pytest.raises(ValueError, match=name):
        setattr(config, name, value)
    assert getattr(config, name) == before


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values_are_refused_on_loading(name, value, tmp_path):
    config_of().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=name):
        LearnPrunerLlavaConfig.from_pretrained(tmp_path, **{name: value})


def test_wrong_types_are_refused():
    with pytest.raises(Exception, match="pruner_ratio"):
        config_of(pruner_ratio="a tenth")


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_and_override(family, tmp_path):
    config_of(family, pruner_ratio=0.3, pruner_layer=1).save_pretrained(tmp_path)
    loaded = PRUNED[family].config_class.from_pretrained(tmp_path, pruner_ratio=0.7)
    assert (loaded.pruner_ratio, loaded.pruner_layer) == (0.7, 1)
    assert loaded.text_config.num_hidden_layers == LAYERS


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_configuration_file_becomes_ours(family, tmp_path):
    tiny_config(family).save_pretrained(tmp_path)
    config = PRUNED[family].config_class.from_pretrained(tmp_path, pruner_ratio=0.2)
    assert (config.model_type, config.pruner_ratio) == (f"learnpruner_{family}", 0.2)


def test_other_family_is_refused():
    with pytest.raises(ValueError, match="llava_next"):
        LearnPrunerLlavaConfig.from_base_config(tiny_config("llava_next"))


def rewrite(folder, without=(), **fields):
    """A stored configuration with other fields, or without some."""
    content = {**json.loads((folder / "config.json").read_text()), **fields}
    content = {name: value for name, value in content.items() if name not in without}
    (folder / "config.json").write_text(json.dumps(content))


def test_configuration_of_a_newer_release_is_refused(tmp_path):
    config_of().save_pretrained(tmp_path)
    rewrite(tmp_path, learnpruner_version="99.0.0")
    with pytest.raises(ValueError, match="pip install -U learnpruner"):
        LearnPrunerLlavaConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("version", ["", "new", "1", "v0.1"])
def test_a_version_that_is_none_is_refused(version):
    with pytest.raises(ValueError, match=r"learnpruner_version is a release such as 0\.1\.0, got"):
        config_of(learnpruner_version=version)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_version_that_wrote_it_is_kept(family, tmp_path):
    config = config_of(family)
    assert config.learnpruner_version == learnpruner.__version__
    config.save_pretrained(tmp_path / "old")
    rewrite(tmp_path / "old", learnpruner_version="0.1.0")
    loaded = type(config).from_pretrained(tmp_path / "old", pruner_ratio=0.3)
    loaded.save_pretrained(tmp_path / "again")
    again = type(config).from_pretrained(tmp_path / "again")
    for kept in (loaded, again, type(config).from_base_config(again), copy.deepcopy(again)):
        assert (kept.learnpruner_version, kept.pruner_ratio) == ("0.1.0", 0.3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_that_is_missing_takes_the_default_of_the_version_that_wrote_it(family, tmp_path, monkeypatch):
    config_class = PRUNED[family].config_class
    monkeypatch.setattr(configuration_learnpruner, "__version__", "0.5.0")
    # As if 0.3 and 0.5 had changed the default of one, and 0.5 that of another.
    changed = {
        "0.3": {"pruner_stage_ratio": 2.0},
        "0.5": {"pruner_stage_ratio": 2.5, "pruner_query": "last"},
    }
    monkeypatch.setattr(configuration_learnpruner, "DEFAULTS_BEFORE", changed)
    config_of(family, pruner_diversity=0.7).save_pretrained(tmp_path)
    wanted = {
        "0.1.0": (2.0, "last"),
        "0.2.9": (2.0, "last"),
        "0.3.0": (2.5, "last"),
        "0.4.1.dev0": (2.5, "last"),
        "0.5.0": (3.0, "all"),
    }
    for version, defaults in wanted.items():
        rewrite(tmp_path, ("pruner_stage_ratio", "pruner_query"), learnpruner_version=version)
        loaded = config_class.from_pretrained(tmp_path)
        assert (loaded.pruner_stage_ratio, loaded.pruner_query) == defaults
        assert (loaded.pruner_diversity, loaded.learnpruner_version) == (0.7, version)
        # What is written down, or given, goes before.
        assert config_class.from_pretrained(tmp_path, pruner_query="all").pruner_query == "all"
    rewrite(tmp_path, pruner_query="all", learnpruner_version="0.1.0")
    assert config_class.from_pretrained(tmp_path).pruner_query == "all"
    # A fresh one has the defaults of today.
    assert (config_of(family).pruner_stage_ratio, config_of(family).pruner_query) == (3.0, "all")


def test_former_defaults_are_of_fields_that_are_there():
    for release, fields in configuration_learnpruner.DEFAULTS_BEFORE.items():
        assert configuration_learnpruner.minor_release(release) <= configuration_learnpruner.minor_release(
            learnpruner.__version__
        )
        assert set(fields) <= {field.name for field in dataclasses.fields(configuration_learnpruner.VideoPrunerConfig)}
