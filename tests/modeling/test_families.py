"""What a family says of itself, so that nobody else has to know it."""

import ast
from pathlib import Path

import pytest
import torch
from transformers import Qwen2VLImageProcessorPil

from learnpruner.compare import model_for, shown_pixels
from learnpruner.doctor_models import BUILDERS
from learnpruner.families import FAMILIES as CONFIGURATIONS
from learnpruner.families import model_class
from learnpruner.model_learnpruner import PrunedModelMixin

from speed_presets import IMAGES
from tiny_models import FAMILIES, PATCH, PRUNED, SIDE, build_inputs, samples_of, tiny_pair, tiny_processor, vision_tower

ROOT = Path(__file__).parents[2]
QUESTIONS = ("encoder_width", "vision_kinds", "encode_images", "encoder_features", "lay_out", "grids", "first_image")
QUESTIONS += ("token_side",)
# Names of stock modules and arguments that one family has and another lacks.
OF_A_FAMILY = {"vision_tower", "visual", "image_sizes", "image_grid_thw", "video_grid_thw", "spatial_merge_size"}


def test_the_list_is_the_one_that_tests_run_over():
    assert {model_class(each) for each in CONFIGURATIONS} == set(PRUNED.values())
    assert set(PRUNED) == set(FAMILIES)


def test_what_is_made_for_each_family_is_there():
    """The doctor's tiny model, and the inputs of the speed benchmark."""
    known = {each.base_model_type for each in CONFIGURATIONS}
    assert set(BUILDERS) == known
    assert set(IMAGES) == known


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_answers_every_question(family):
    model = PRUNED[family].model_class
    for question in QUESTIONS:
        assert getattr(model, question) is not getattr(PrunedModelMixin, question), question


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_is_found_by_its_stock_name(family):
    for model in tiny_pair(family):
        assert model.get_encoder("image") is model.model.get_encoder("image") is vision_tower(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_grids_hold_the_patches_of_each_part(family):
    """All tokens but structure, which ends the rows of the last grid."""
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("mixed", family))
    prompt = pruned.model.read_prompt(inputs)
    encoded = pruned.model.encode_images(inputs, prompt)
    (parts,) = pruned.model.pruner_features(encoded, prompt).values()
    grids = pruned.model.grids("image", encoded, prompt)
    assert len(grids) == len(parts) == 3
    for part, grid in zip(parts, grids):
        structure = part.isnan().any(-1)
        assert sum(rows * columns for rows, columns in grid) == int((~structure).sum())
        if structure.any():
            rows, columns = grid[-1]
            assert structure[-rows * (columns + 1) :].view(rows, columns + 1).nonzero()[:, 1].unique().tolist() == [
                columns
            ]
            assert int(structure.sum()) == rows


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_laid_out_as_features_are(family):
    """Any values of the patches go where the patches' features go."""
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("mixed", family))
    prompt = pruned.model.read_prompt(inputs)
    encoded = pruned.model.encode_images(inputs, prompt)
    features = pruned.model.encoder_features(encoded)["image"]
    laid = pruned.model.lay_out("image", -features, encoded, prompt)
    for one, other in zip(laid, pruned.model.pruner_features(encoded, prompt)["image"]):
        assert torch.equal(one.nan_to_num(0.0), -other.nan_to_num(0.0))


def test_a_processor_is_of_the_family_whose_layout_it_returns():
    assert model_for(tiny_processor("llava")) is PRUNED["llava"].model_class
    assert model_for(tiny_processor("llava_next")) is PRUNED["llava_next"].model_class
    processor = tiny_processor("llava")
    processor.image_processor = Qwen2VLImageProcessorPil(patch_size=PATCH // 2, merge_size=2)
    assert model_for(processor) is PRUNED["qwen2_vl"].model_class


def test_the_first_crop_of_llava_next_is_the_whole_image():
    inputs = {"pixel_values": torch.rand(2, 3, 3, SIDE, SIDE)}
    processor = tiny_processor("llava_next")
    processor.image_processor.image_mean, processor.image_processor.image_std = [0.0] * 3, [1.0] * 3
    assert torch.equal(shown_pixels(processor, inputs), inputs["pixel_values"][0, 0].permute(1, 2, 0))


def names(path):
    """Names, attributes and strings of a file's code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_nobody_else_knows_a_family():
    files = [
        path for folder in ("modeling", "methods", "training", "hub_cards") for path in (ROOT / folder).rglob("*.py")
    ]
    families = [path for path in files if path.name.startswith("modeling_learnpruner_")]
    assert OF_A_FAMILY - {"vision_tower", "visual"} <= {name for path in families for name in names(path)}
    # The doctor builds tiny models of each by hand.
    others = [path for path in files if path not in families and path.name != "doctor_models.py"]
    known = {path.name: OF_A_FAMILY & set(names(path)) for path in others}
    assert {name: found for name, found in known.items() if found} == {}
