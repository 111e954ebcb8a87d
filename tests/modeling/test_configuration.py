import json

import pytest

from learnpruner import LearnPrunerLlavaConfig
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


def test_configuration_of_a_newer_release_is_refused(tmp_path):
    config_of().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["learnpruner_version"] = "99.0.0"
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="pip install -U learnpruner"):
        LearnPrunerLlavaConfig.from_pretrained(tmp_path)
