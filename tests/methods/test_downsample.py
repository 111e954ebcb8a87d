"""The smaller image: its grid by trying all, and its tokens by the stock tower, one image at a time."""

import pytest
import torch

from learnpruner.methods import METHODS
from learnpruner.methods.downsample import grid_of

from tiny_models import IMAGE, PATCH, build_inputs, samples_of, tiny_pair


def test_the_grid_is_the_largest_that_fits():
    for budget in range(1, 200):
        rows, columns = grid_of(budget)
        assert rows * columns <= budget
        assert rows <= columns <= 2 * rows
        for other_rows in range(1, budget + 1):
            for other_columns in range(1, budget // other_rows + 1):
                if max(other_rows, other_columns) <= 2 * min(other_rows, other_columns):
                    assert other_rows * other_columns <= rows * columns
                    if other_rows * other_columns == rows * columns:
                        assert abs(other_rows - other_columns) >= columns - rows


@pytest.mark.parametrize("batch", ["mixed", "image_last"])
@pytest.mark.parametrize(("ratio", "rows", "columns"), [(0.75, 3, 4), (0.45, 2, 3), (0.07, 1, 1)])
def test_tokens_are_those_of_a_smaller_image(batch, ratio, rows, columns):
    stock, pruned = tiny_pair("llava")
    samples = samples_of(batch, "llava")
    inputs = build_inputs("llava", samples)
    seen = []
    with pruned.model.language_model.register_forward_pre_hook(
        lambda *of: seen.append(of[2]["inputs_embeds"]), with_kwargs=True
    ):
        outputs = pruned(**inputs, schedule=METHODS["downsample"](ratio))
    places = METHODS["uniform"](rows * columns / 16)
    assert torch.equal(outputs.kept_mask[0], pruned(**inputs, schedule=places).kept_mask[0])
    image = 0
    for row, sample in enumerate(samples):
        kept = outputs.kept_mask[0][row] & (inputs["input_ids"][row] == IMAGE)
        tokens = list(seen[0][row][kept])
        for _ in filter(lambda part: isinstance(part, tuple), sample):
            small = torch.nn.functional.interpolate(
                inputs["pixel_values"][image : image + 1],
                (rows * PATCH, columns * PATCH),
                mode="bicubic",
                antialias=True,
            )
            states = stock.model.vision_tower(small, interpolate_pos_encoding=True, output_hidden_states=True)
            expected = stock.model.multi_modal_projector(states.hidden_states[-2][0, 1:])
            assert len(expected) == rows * columns
            for value in expected:
                assert (tokens.pop(0) - value).abs().max() < 1e-5
            image += 1
        assert not tokens


@pytest.mark.parametrize(
    ("family", "message"),
    [("llava_next", "one crop an image.*image_grid_pinpoints"), ("qwen2_vl", "CLIP tower.*processor a smaller image")],
)
def test_other_towers_are_refused(family, message):
    _, pruned = tiny_pair(family)
    with pytest.raises(ValueError, match=message):
        METHODS["downsample"](0.5).cuts(pruned.model)


def test_encoded_images_alone_are_refused():
    _, pruned = tiny_pair("llava")
    inputs = build_inputs("llava", samples_of("one", "llava"))
    encoded = pruned.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    with pytest.raises(ValueError, match="pass pixel_values"):
        pruned(**inputs, mm_encoder_outputs={"image": encoded}, schedule=METHODS["downsample"](0.5))
