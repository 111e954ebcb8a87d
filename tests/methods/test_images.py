"""What methods read of encoded images: which layer of a tower, and where patches stand."""

import pytest
import torch
from transformers import (
    Aimv2VisionConfig,
    BeitConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    LlavaConfig,
    MLCDVisionConfig,
    SiglipVisionConfig,
    ViTConfig,
)

from learnpruner import Cut
from learnpruner.methods import METHODS
from learnpruner.methods.base import TopKImages
from learnpruner.methods.images import grids

from tiny_models import IMAGE, build_inputs, samples_of, tiny_config, tiny_pair

CLS = ["cls_attention", "visionzip", "vispruner"]


@pytest.mark.parametrize("layer", [1, 0, [-2], [-2, -1], -4])
@pytest.mark.parametrize("name", CLS)
def test_a_call_reads_one_layer_counted_from_the_end(name, layer):
    _, pruned = tiny_pair("llava")
    if layer == [-2, -1]:
        pruned.model.multi_modal_projector.linear_1 = torch.nn.Linear(48, 32)
    inputs = build_inputs("llava", samples_of("padded", "llava"))
    with pytest.raises(ValueError, match=r"counted from the end, -1 to -3, and vision_feature_layer is "):
        pruned(**inputs, schedule=METHODS[name](0.5), vision_feature_layer=layer)


@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_the_layer_of_a_call_is_the_one_read(layer):
    stock, pruned = tiny_pair("llava")
    inputs = build_inputs("llava", samples_of("padded", "llava"))
    scores = pruned(**inputs, schedule=METHODS["cls_attention"](0.5), vision_feature_layer=layer).vision_scores[0]
    stock.set_attn_implementation("eager")
    maps = stock.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions[layer]
    assert (scores[~scores.isnan()] - maps[:, :, 0, 1:].mean(1).flatten()).abs().max() < 1e-6


TOWER = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.3,
}


def with_tower(kind, registers=0, **fields):
    """Both models with another tower, and inputs of two samples; registers are tokens as patches are."""
    text = tiny_config().text_config
    vision = {"text_config": text, "vision_config": kind(**TOWER, **fields)}
    config = LlavaConfig(**vision, image_token_index=IMAGE, image_seq_length=16 + registers)
    inputs = build_inputs("llava", samples_of("padded", "llava"))
    ids = torch.tensor(
        [[0, 0, 1, 4] + [IMAGE] * (16 + registers) + [5], [1, 4, 7] + [IMAGE] * (16 + registers) + [8, 9]]
    )
    inputs["input_ids"], inputs["attention_mask"] = ids, (ids != 0).long()
    return *tiny_pair(config=config), inputs


@pytest.mark.parametrize(("kind", "registers"), [(Dinov2Config, 0), (Dinov2WithRegistersConfig, 4), (ViTConfig, 0)])
@pytest.mark.parametrize("layer", [-1, -2])
def test_any_tower_with_a_class_token_is_read(kind, registers, layer):
    """What is read is the tower's own attention, as it returns it in eager mode."""
    stock, pruned, inputs = with_tower(kind, registers)
    tower = stock.model.vision_tower
    tower.set_attn_implementation("eager")
    maps = tower(inputs["pixel_values"], output_attentions=True).attentions[layer]
    arguments = {**inputs, "vision_feature_layer": layer}
    for name in CLS:
        outputs = pruned(**arguments, schedule=METHODS[name](0.5))
        scores = outputs.vision_scores[0]
        assert (scores[~scores.isnan()] - maps[:, :, 0, 1:].mean(1).flatten()).abs().max() < 1e-6
        assert (outputs.kept_mask[0] & (inputs["input_ids"] == IMAGE)).sum(1).tolist() == [8 + registers // 2] * 2
        tokens = pruned.generate(**arguments, schedule=METHODS[name](0.5), max_new_tokens=2)
        assert tokens.shape[1] == inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        (SiglipVisionConfig, {}, "that of LearnPrunerLlavaModel has none"),
        (Aimv2VisionConfig, {}, "that of LearnPrunerLlavaModel has none"),  # its class token pools what comes out
        (DINOv3ViTConfig, {}, "turns or biases"),
        (MLCDVisionConfig, {}, "turns or biases"),
        (BeitConfig, {"use_relative_position_bias": True}, "turns or biases"),
    ],
)
def test_towers_whose_attention_is_another_are_refused(kind, fields, says):
    _, pruned, inputs = with_tower(kind, **fields)
    pruned.model.vision_tower.forward = None  # would raise TypeError
    for name in CLS:
        with pytest.raises(ValueError, match=rf"{name} .*{says}.*: take a method that reads the decoder"):
            pruned(**inputs, schedule=METHODS[name](0.5))


def with_cls(of_call):
    """A model and inputs whose tokens include [CLS]: as the configuration says, or as the call does."""
    config = tiny_config()
    if not of_call:
        config.vision_feature_select_strategy = "full"
    _, pruned = tiny_pair(config=config)
    ids = torch.tensor([[1, 2] + [IMAGE] * 17 + [3, 4]])
    pixels = build_inputs("llava", samples_of("one", "llava"))["pixel_values"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return pruned, {**inputs, "vision_feature_select_strategy": "full"} if of_call else inputs


@pytest.mark.parametrize("of_call", [False, True])
@pytest.mark.parametrize("name", CLS)
def test_tokens_of_cls_are_refused(name, of_call):
    pruned, inputs = with_cls(of_call)
    if not of_call:
        pruned.model.vision_tower.forward = None  # would raise TypeError
    with pytest.raises(ValueError, match="vision_feature_select_strategy='full' tokens include"):
        pruned(**inputs, schedule=METHODS[name](0.5))


@pytest.mark.parametrize("name", ["uniform", "pool", "oracle_boxes"])
def test_tokens_that_are_no_square_have_no_places(name):
    pruned, inputs = with_cls(of_call=False)
    settings = {"boxes": [[(4, 4, 20, 12)]], "picture": (32, 32)} if name == "oracle_boxes" else {}
    with pytest.raises(ValueError, match="17 tokens are no square of patches"):
        pruned(**inputs, schedule=METHODS[name](0.5, **settings))


def test_methods_that_read_no_places_take_cls():
    pruned, inputs = with_cls(of_call=False)
    for name in ("random", "divprune", "hawk", "fastv"):
        kept = pruned(**inputs, schedule=METHODS[name](0.7)).kept_mask[0]
        assert kept.sum() < inputs["input_ids"].shape[1]


class Spy(TopKImages):
    """Keeps by chance, and what it saw."""

    def __call__(self, images):
        self.images = images
        return torch.rand(images.present.shape)


@pytest.mark.parametrize("per_frame", [True, False])
def test_grids_are_those_of_what_is_encoded(per_frame):
    """Of what a conversation gave, the videos and images of this call."""
    _, pruned = tiny_pair("qwen2_vl", pruner_per_frame=per_frame)
    video, image, other = (2, 24, 32), (16, 32), (32, 32)
    earlier = torch.tensor([[1, 12, 8]])
    spy = Spy()
    schedule = (Cut(0, lambda tokens: tokens - 1, spy),)
    for sample, given, expected in (
        # After a video, an image; after an image, a video.
        ([2, other, 3], {"video_grid_thw": torch.tensor([[2, 4, 8]])}, [[(4, 4)]]),
        ([2, video, 3], {"image_grid_thw": earlier}, [[(3, 4)]] * 2 if per_frame else [[(3, 4)] * 2]),
        ([image, 2, video, 1, other, 3], {}, [[(2, 4)], [(4, 4)], *([[(3, 4)]] * 2 if per_frame else [[(3, 4)] * 2])]),
    ):
        pruned(**build_inputs("qwen2_vl", [sample]), **given, schedule=schedule)
        assert grids(spy.images) == expected


@pytest.mark.parametrize("modality", ["image", "video"])
def test_a_later_turn_has_the_grids_of_its_own(modality):
    _, pruned = tiny_pair("qwen2_vl")
    parts = [(16, 32), (2, 24, 32)] if modality == "video" else [(2, 32, 32), (32, 32)]
    inputs = build_inputs("qwen2_vl", [[2, parts[0], 3, (2, 24, 24), 1, (16, 24), 2, parts[1], 4]])
    encode = pruned.model.get_image_features if modality == "image" else pruned.model.get_video_features
    pixels = "pixel_values" if modality == "image" else "pixel_values_videos"
    grid = inputs[f"{modality}_grid_thw"]
    with torch.no_grad():
        encoded = encode(inputs[pixels][-int(grid[-1].prod()) :], grid[-1:], return_dict=True)
    spy, start = Spy(), inputs["input_ids"].shape[1] - 4 - encoded.pooler_output[0].shape[0]
    positions, _ = pruned.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"], inputs["video_grid_thw"]
    )
    pruned(
        input_ids=inputs["input_ids"][:, start:],
        attention_mask=inputs["attention_mask"][:, start:],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        position_ids=positions[..., start:],
        image_grid_thw=inputs["image_grid_thw"],
        video_grid_thw=inputs["video_grid_thw"],
        mm_encoder_outputs={modality: encoded},
        schedule=(Cut(0, lambda tokens: tokens - 1, spy),),
    )
    assert grids(spy.images) == ([[(4, 4)]] if modality == "image" else [[(3, 4)]] * 2)
