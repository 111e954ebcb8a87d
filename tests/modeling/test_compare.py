"""What `learnpruner compare` and its pictures promise: patches where the model saw them, and errors of one line."""

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.accounting import mean_tokens
from learnpruner.budget_learnpruner import keep_counts
from learnpruner.compare import compare, dim_dropped, load_image, patch_grids, save_picture, token_side
from learnpruner_commands import main

import tiny_qwen2_vl
from tiny_models import LAYERS, LLAVA, PATCH, PATCHES, QWEN, SIDE, tiny_config, tiny_pair, tiny_processor


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A stock LLaVA with its processor, as `base` in the current folder, beside `image.png`."""
    monkeypatch.chdir(tmp_path)
    tiny_pair("llava")[0].save_pretrained("base")
    tiny_processor("llava").save_pretrained("base")
    Image.new("RGB", (50, 40), "teal").save("image.png")
    return tmp_path


def bad_input(command, capsys):
    """Runs a command that must fail with status 2 and one line, and returns that line."""
    try:
        status = main(command)
    except SystemExit as stop:
        status = stop.code
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line.startswith("learnpruner")]
    assert status == 2
    assert len(lines) == 1
    return lines[0]


@pytest.mark.core
def test_the_picture_shows_the_crop_that_the_model_saw(tmp_path):
    """LLaVA-1.5's processor crops the centre: the sides of a wide image never reach the model."""
    processor = tiny_processor("llava")
    processor.image_processor.size = {"shortest_edge": SIDE}
    processor.image_processor.crop_size = {"height": SIDE, "width": SIDE}
    processor.image_processor.do_center_crop = True
    image = Image.new("RGB", (3 * SIDE, SIDE), "red")
    image.paste((64, 128, 192), (SIDE, 0, 2 * SIDE, SIDE))
    comparison = compare(tiny_pair("llava")[1], processor, image, "w8", 0.3, max_new_tokens=1)
    expected = torch.tensor([64, 128, 192]).div(255).expand(SIDE, SIDE, 3)
    torch.testing.assert_close(comparison.pixels, expected, atol=1e-5, rtol=0)


@pytest.mark.core
@pytest.mark.parametrize("family", LLAVA)
def test_the_picture_darkens_exactly_the_dropped_patches(family, tmp_path):
    image = Image.new("RGB", (SIDE, SIDE), "white")
    comparison = compare(tiny_pair(family)[1], tiny_processor(family), image, "w8", 0.3, max_new_tokens=1)
    grids = patch_grids(comparison, PATCH)
    for grid, kept in zip(grids, comparison.kept):
        assert grid.shape == (SIDE // PATCH, SIDE // PATCH)
        assert grid.flatten().tolist() == kept[:PATCHES].tolist()
    for grid, picture in zip(grids, dim_dropped(comparison, PATCH)):
        # One number for each patch: all of its pixels are alike.
        patches = picture.unflatten(1, (-1, PATCH)).unflatten(0, (-1, PATCH)).transpose(1, 2).flatten(2)
        expected = torch.where(grid, 1.0, 0.18)[..., None].expand_as(patches)
        torch.testing.assert_close(patches, expected, atol=1e-5, rtol=0)
    save_picture(comparison, PATCH, tmp_path / "out.png")
    grey = torch.frombuffer(bytearray(Image.open(tmp_path / "out.png").convert("L").tobytes()), dtype=torch.uint8)
    # White under a shade of 0.82. A patch is about 103 pixels wide in a panel of 4.2 inches at 110 dpi.
    dark = ((grey.int() - 46).abs() <= 2).sum().item()
    dropped = sum((~grid).sum().item() for grid in grids)
    assert dark / dropped == pytest.approx(103**2, rel=0.05)


def test_qwen_is_shown_at_its_own_size(tmp_path):
    """Pixels come as blocks of patches there: they are put together again, and a token is a block."""
    torch.manual_seed(0)
    processor = tiny_qwen2_vl.build_processor()
    tiny_qwen2_vl.build_model(processor).save_pretrained(tmp_path / "base")
    model = LearnPrunerForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
    image = Image.effect_mandelbrot((64, 40), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    comparison = compare(model, processor, image, "is there a circle?", 0.3, max_new_tokens=1)
    assert token_side(processor) == 8
    assert comparison.tokens[0] == 5 * 8
    expected = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(40, 64, 3) / 255
    torch.testing.assert_close(comparison.pixels, expected, atol=1e-5, rtol=0)
    for grid, kept in zip(patch_grids(comparison, token_side(processor)), comparison.kept):
        assert grid.shape == (5, 8)
        assert grid.flatten().tolist() == kept.tolist()


def test_pixels_of_no_patch_stay_bright():
    """At a patch of 14, a tower of 30 pixels leaves a rim that no token stands for."""
    comparison = compare(tiny_pair("llava")[1], tiny_processor("llava"), Image.new("RGB", (SIDE, SIDE)), "w8", 0.3, 1)
    comparison.pixels = torch.ones(SIDE + 3, SIDE + 5, 3)
    for picture in dim_dropped(comparison, PATCH):
        assert (picture[SIDE:] == 1).all()
        assert (picture[:, SIDE:] == 1).all()


def test_the_mean_is_over_the_layers():
    pruned, processor = tiny_pair("llava")[1], tiny_processor("llava")
    image = Image.new("RGB", (SIDE, SIDE))
    for ratio in (0.3, 1.0):
        comparison = compare(pruned, processor, image, "w8", ratio, max_new_tokens=1)
        layers = (0, pruned.config.pruner_layer)[: len(comparison.kept)]
        assert comparison.mean_tokens == mean_tokens(comparison.tokens[1:], layers, PATCHES, LAYERS)
        assert comparison.mean_tokens == pytest.approx(ratio * PATCHES, abs=1)


def test_an_image_stands_as_its_camera_was_held(tmp_path):
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (10, 20)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_stands_on_white(mode, tmp_path):
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    picture, options = image.convert("RGBA" if mode == "P" else mode), {}
    if mode == "P":
        picture = Image.new("P", (2, 1))
        picture.putpalette([10, 20, 30, 40, 50, 60])
        picture.putpixel((1, 0), 1)
        options = {"transparency": 0}
    picture.save(tmp_path / "seen.png", **options)
    found = load_image(tmp_path / "seen.png")
    assert found.getpixel((0, 0)) == (255, 255, 255)
    assert found.getpixel((1, 0)) != (255, 255, 255)


@pytest.fixture
def qwen(tmp_path, monkeypatch):
    """The small Qwen2-VL of the examples, untrained, whose processor is code in its folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    processor = tiny_qwen2_vl.build_processor()
    tiny_qwen2_vl.build_model(processor).save_pretrained("base")
    processor.save_pretrained("base")
    Image.new("RGB", (64, 40), "teal").save("image.png")


def test_compare_runs_a_processors_own_code_where_it_may(qwen, capsys):
    command = ["compare", "base", "--image", "image.png", "--question", "is there a circle?", "--max-new-tokens", "1"]
    line = bad_input(command, capsys)
    assert "trust_remote_code" in line
    assert main([*command, "--ratio", "0.3", "--trust-remote-code"]) == 0
    first, second = keep_counts(40, 0.3, num_layers=8, pruner_layer=3, stage_ratio=3.0)
    assert f"40 -> {first} -> {second}" in capsys.readouterr().out


@pytest.mark.parametrize("family", QWEN)
def test_budget_of_any_size_needs_tokens(family, tmp_path, capsys):
    tiny_config(family).save_pretrained(tmp_path)
    assert "--tokens" in bad_input(["budget", str(tmp_path)], capsys)


def test_a_class_token_before_the_patches_is_not_drawn():
    config = tiny_config("llava")
    config.vision_feature_select_strategy = "full"
    processor = tiny_processor("llava")
    processor.vision_feature_select_strategy = "full"
    model = tiny_pair("llava", config=config)[1]
    comparison = compare(model, processor, Image.new("RGB", (SIDE, SIDE)), "w8", 0.3, max_new_tokens=1)
    assert comparison.tokens[0] == PATCHES + 1
    for grid, kept in zip(patch_grids(comparison, PATCH), comparison.kept):
        assert grid.flatten().tolist() == kept[1:].tolist()


def test_a_caption_is_text_and_stays_inside_the_picture(tmp_path):
    image = Image.new("RGB", (SIDE, SIDE))
    comparison = compare(tiny_pair("llava")[1], tiny_processor("llava"), image, "w8", 0.3, max_new_tokens=1)
    comparison.question, comparison.answer = r"$\broken costs $5?", "a long answer " * 40
    save_picture(comparison, PATCH, tmp_path / "out.png")
    width, height = Image.open(tmp_path / "out.png").size
    assert width < 1500
    assert height > 500


@pytest.mark.core
def test_compare_on_a_pruner_takes_the_processor_of_its_base(checkpoint, capsys):
    LearnPrunerForConditionalGeneration.from_pretrained("base").train_pruner_only().save_pretrained("pruner")
    assert main(["compare", "pruner", "--image", "image.png", "--question", "w8", "--max-new-tokens", "1"]) == 0
    assert f"{PATCHES} -> " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--image": "cut.png"}, "cut.png"),
        ({"--image": "bits.png"}, "bits.png"),
        ({"--image": "header.ppm"}, "header.ppm"),
        ({"--image": "huge.png"}, "huge.png"),
        ({"--picture": "out.xyz"}, ".png"),
        ({"--max-new-tokens": "0"}, "--max-new-tokens"),
        ({"--ratio": "1/0"}, "--ratio"),
        ({"model": "bare"}, "processor"),
        ({"model": "none"}, "none"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(change, message, checkpoint, capsys, monkeypatch):
    Image.effect_noise((64, 64), 50).save("noise.png")
    data = bytearray((checkpoint / "noise.png").read_bytes())
    (checkpoint / "cut.png").write_bytes(data[:200])
    data[len(data) // 2] ^= 255
    (checkpoint / "bits.png").write_bytes(data)
    (checkpoint / "header.ppm").write_bytes(b"P6 8 x8 255 ")
    Image.new("1", (20_000, 20_000)).save("huge.png")
    LlavaForConditionalGeneration(tiny_config()).save_pretrained("bare")
    monkeypatch.setattr(LearnPrunerForConditionalGeneration, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    options = {"--image": "image.png", "--question": "w8", **change}
    model = options.pop("model", "base")
    line = bad_input(["compare", model, *(part for option in options.items() for part in option)], capsys)
    assert message in line


@pytest.mark.parametrize("tokens", ["0", "-5", "x"])
def test_budget_needs_tokens(tokens, checkpoint, capsys):
    assert "--tokens" in bad_input(["budget", "base", f"--tokens={tokens}"], capsys)


def test_ratio_may_be_a_fraction(checkpoint, capsys):
    main(["budget", "base", "--tokens", "576", "--ratio", "1/9"])
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "0.1111"
