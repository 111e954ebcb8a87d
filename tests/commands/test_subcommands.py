"""The `learnpruner` command: its tables, its picture, and one clear line for bad input."""

import pytest
from PIL import Image

from learnpruner.budget_learnpruner import keep_counts
from learnpruner_commands import main

from tiny_models import FAMILIES, LAYERS, LLAVA, PATCHES, image_tokens, tiny_config, tiny_pair, tiny_processor


@pytest.fixture
def family():
    return "llava"


@pytest.fixture
def checkpoint(family, tmp_path):
    folder = tmp_path / "checkpoint"
    stock, _ = tiny_pair(family)
    stock.save_pretrained(folder)
    tiny_processor(family).save_pretrained(folder)
    Image.new("RGB", (50, 40), "teal").save(tmp_path / "image.png")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_budget(family, tmp_path, capsys):
    tiny_config(family).save_pretrained(tmp_path)
    assert main(["budget", str(tmp_path), "--ratio", "0.25", "0.5", "1", "--tokens", "100"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    for line, ratio in zip(lines, (0.25, 0.5, 1.0)):
        first, second = keep_counts(100, ratio, num_layers=LAYERS, pruner_layer=2, stage_ratio=3.0)
        assert line.split() == [f"{ratio:.4f}", str(first), str(second), f"{(2 * first + 2 * second) / 4:.1f}"]


def test_budget_counts_the_crop_by_default(tmp_path, capsys):
    tiny_config().save_pretrained(tmp_path)
    main(["budget", str(tmp_path)])
    assert f"{PATCHES} vision tokens, {LAYERS} decoder layers" in capsys.readouterr().out


@pytest.mark.parametrize("ratio", ["0.3", "1.0"])
@pytest.mark.parametrize("family", LLAVA)
def test_compare(family, ratio, checkpoint, tmp_path, capsys):
    command = ["compare", str(checkpoint), "--image", str(tmp_path / "image.png"), "--question", "w8 w9 w10"]
    assert main([*command, "--ratio", ratio, "--max-new-tokens", "3", "--picture", str(tmp_path / "out.png")]) == 0
    printed = capsys.readouterr().out
    tokens = image_tokens(family, 40, 50)
    first, second = keep_counts(tokens, 0.3, num_layers=LAYERS, pruner_layer=2, stage_ratio=3.0)
    assert (f"{tokens} -> {first} -> {second}" in printed) == (ratio == "0.3")
    assert f"vision tokens    {tokens}" in printed
    assert Image.open(tmp_path / "out.png").format == "PNG"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--image": "none.png"}, "no such image"),
        ({"--image": "text.png"}, "not an image"),
        ({"--picture": "none/out.png"}, "no such folder"),
        ({"model": "none"}, "none"),
    ],
)
def test_bad_input_is_one_line(change, message, checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.png").write_text("no image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("learnpruner.compare.compare", lambda *args: pytest.fail("the model ran"))
    options = {"--image": "image.png", "--question": "w8", "--picture": "out.png", **change}
    model = options.pop("model", "checkpoint")
    assert main(["compare", model, *(part for option in options.items() for part in option)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[0].startswith("learnpruner: ")
    assert message in error[0]
    assert not any("Traceback" in line for line in error)


@pytest.mark.parametrize("ratio", ["0", "1.5", "x", "nan"])
def test_bad_ratio(ratio, checkpoint, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["budget", str(checkpoint), "--ratio", ratio])
    assert stop.value.code == 2
    assert "--ratio" in capsys.readouterr().err
