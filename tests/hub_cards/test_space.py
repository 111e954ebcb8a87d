"""The Space without a browser: what its functions show and refuse, and that its folder is whole."""

import base64
import html
import io
import json
import re
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from PIL import Image

from learnpruner.compare import load, load_image

from space_scripts import SPACE, script
from tiny_models import PATCHES, SIDE, tiny_pair, tiny_processor

ROOT = Path(__file__).parents[2]
SMALL = ("cut", "text", "absent", "white.png")
SHIPPED = ROOT / "examples" / "easy_vqa" / "learnpruner-tiny-llava"


@pytest.fixture(scope="module")
def app():
    return script("app")


@pytest.fixture(scope="module")
def tiny():
    return tiny_pair("llava")[1], tiny_processor("llava")


@pytest.fixture
def white(tmp_path):
    """An upload, as Gradio hands it over."""
    Image.new("RGB", (SIDE, SIDE), "white").save(tmp_path / "white.png")
    return {"path": str(tmp_path / "white.png")}


def pictures(shown):
    """The pictures of an answer, each `(height, width)`, in grey from 0 to 255."""
    found = []
    for data in re.findall(r"data:image/png;base64,([\w+/=]+)", shown):
        picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("L")
        found.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.size[::-1]))
    return found


@pytest.mark.parametrize("percent", [11, 30, 60, 100])
def test_an_answer_shows_every_stage(app, tiny, white, percent):
    shown = app.ask(*tiny, white, "w8", percent)
    counts = [int(count) for count in re.findall(r'<b class="count">(\d+)</b>', shown)]
    bright = [(picture > 200).float().mean().item() * PATCHES for picture in pictures(shown)]
    assert bright == counts
    assert counts[0] == PATCHES
    assert counts == sorted(counts, reverse=True)
    assert len(counts) == (1 if percent == 100 else 3)
    for label in ("Time", "Cache", "Vision tokens"):
        assert label in shown
    assert ("fewer" in shown) == ("smaller" in shown) == (percent < 100)
    # Where nothing is dropped, a difference in time is chance.
    assert percent < 100 or not re.search("faster|slower", shown)


def test_question_and_answers_are_text(app, tiny, white, monkeypatch):
    real = app.compare

    def compare(*arguments):
        comparison = real(*arguments)
        comparison.answer, comparison.stock_answer = "<img src=x onerror=alert(1)>", "a & b"
        return comparison

    monkeypatch.setattr(app, "compare", compare)
    with pytest.warns(UserWarning, match="never taught"):
        shown = app.ask(*tiny, white, "<script>w8</script>", 30)
    assert "<script" not in shown
    assert "<img src=x" not in shown
    assert html.escape("<script>w8</script>") in shown
    assert "a &amp; b" in shown
    assert "The answers differ" in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"upload": value}, "Choose a picture") for value in (None, {}, {"path": None}, {"path": 3}, [], 3)),
        *(({"upload": value}, "million pixels") for value in ("large", "larger")),
        *(({"question": value}, "as text") for value in (3, ["w8"], {"a": "b"})),
        *(({"question": value}, "half a character") for value in ("w8 \ud83d", "\udc00")),
        ({"upload": "cut"}, "damaged"),
        ({"upload": "text"}, "damaged"),
        ({"question": None}, "question"),
        ({"question": " \n"}, "question"),
        ({"question": "w8 " * 500}, "characters"),
        ({"question": "<image> w8"}, "<image>"),
        ({"upload": "absent"}, "damaged"),
        ({"percent": 0}, "1 to 100"),
        ({"percent": 101}, "1 to 100"),
        ({"percent": -5}, "1 to 100"),
        ({"percent": None}, "1 to 100"),
        ({"percent": float("nan")}, "1 to 100"),
        ({"percent": "many"}, "1 to 100"),
    ],
)
def test_bad_input_is_a_message_before_any_work(app, tiny, white, change, message, tmp_path, monkeypatch):
    import gradio

    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    (tmp_path / "text").write_text("no picture")
    # Their headers say so; Pillow itself refuses the second.
    for name, side in (("large", 7_100), ("larger", 14_000)):
        Image.new("1", (side, side)).save(tmp_path / name, "PNG")
    monkeypatch.setattr(app, "load_image", lambda path: load_image(path) if path.name in SMALL else pytest.fail("read"))
    given = {"upload": white, "question": "w8", "percent": 30, **change}
    if isinstance(given["upload"], str):
        given["upload"] = {"path": str(tmp_path / given["upload"])}
    monkeypatch.setattr(app, "compare", lambda *arguments: pytest.fail("asked"))
    with pytest.raises(gradio.Error) as error:
        app.ask(*tiny, **given)
    assert message in html.unescape(error.value.message)
    assert "Traceback" not in error.value.message
    assert str(tmp_path) not in error.value.message


def test_a_failing_model_is_a_message(app, tiny, white, monkeypatch):
    import gradio

    def compare(*arguments):
        raise RuntimeError("out of memory <here>")

    monkeypatch.setattr(app, "compare", compare)
    with pytest.raises(gradio.Error, match="out of memory &lt;here&gt;"):
        app.ask(*tiny, white, "w8", 30)


def test_what_is_not_drawn_is_said(app, tiny, white):
    """LLaVA-NeXT also reads enlarged crops, which the pictures leave out."""
    assert "not drawn" not in app.ask(*tiny, white, "w8", 30)
    assert "not drawn" in app.ask(tiny_pair("llava_next")[1], tiny_processor("llava_next"), white, "w8", 30)


@pytest.mark.parametrize(
    ("mode", "size", "name"), [("RGBA", (9, 70), "a.png"), ("L", (1, 1), "a.jpg"), ("P", (200, 3), "a.gif")]
)
def test_pictures_of_all_kinds(app, tiny, mode, size, name, tmp_path):
    Image.new(mode, size).save(tmp_path / name)
    assert len(pictures(app.ask(*tiny, {"path": str(tmp_path / name)}, "w8", 30))) == 3


def test_words_that_the_model_does_not_know_are_named(app):
    model, processor = load(str(SHIPPED))
    picture = {"path": str(SPACE / "examples" / "0.png")}
    with pytest.warns(UserWarning, match="aardvark, zebra"):
        app.ask(model, processor, picture, "is the aardvark a zebra?", 11)


def texts(blocks):
    return " ".join(str(block.value) for block in blocks.blocks.values() if hasattr(block, "value"))


@pytest.mark.parametrize("trained", [False, True])
def test_an_untrained_pruner_is_named_on_the_page(app, trained):
    model, processor = tiny_pair("llava", pruner_trained=trained)[1], tiny_processor("llava")
    assert ("training-free" in texts(app.build(model, processor))) == (not trained)


def test_the_small_model_says_what_it_knows(app, tiny):
    assert "colored shapes" in texts(app.build(*tiny, app.SHIPPED_NOTE))
    assert "colored shapes" not in texts(app.build(*tiny))


def test_another_checkpoint_is_a_setting(app, monkeypatch):
    monkeypatch.delenv("LEARNPRUNER_MODEL", raising=False)
    assert Path(app.shipped_model()).samefile(SHIPPED)
    monkeypatch.setenv("LEARNPRUNER_MODEL", "/no/such/checkpoint")
    with pytest.raises(SystemExit, match="/no/such/checkpoint"):
        app.main()


def test_examples_come_from_their_command(tmp_path):
    """The committed pictures and questions are what the command writes."""
    script("make_examples").main(["--output", str(tmp_path)])
    committed = SPACE / "examples"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in committed.iterdir())
    assert (tmp_path / "examples.json").read_text() == (committed / "examples.json").read_text()
    for row in json.loads((committed / "examples.json").read_text()):
        assert Image.open(tmp_path / row["image"]).tobytes() == Image.open(committed / row["image"]).tobytes()


def test_the_folder_is_a_space():
    card = SpaceCard.load(SPACE / "README.md").data
    assert card.sdk == "gradio"
    assert (SPACE / card.app_file).is_file()
    needs = [Requirement(line) for line in requires("learnpruner")]
    (gradio,) = (need for need in needs if need.name == "gradio")
    assert card.sdk_version in gradio.specifier
    for text in (SPACE / "README.md", ROOT / "README.md"):
        (named,) = re.findall(r"!\[[^\]]*\]\(([\w/]*screenshot\.png)\)", text.read_text())
        assert (text.parent / named).samefile(SPACE / "screenshot.png")
    assert Image.open(SPACE / "screenshot.png").width > 1000


def test_an_assembled_folder_holds_all_that_it_runs(tmp_path, capsys):
    folder = tmp_path / "space"
    assert script("assemble").main(["--output", str(folder)]) == 0
    assert f"{folder}" in capsys.readouterr().out
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"app.py", "README.md", "requirements.txt", "examples/examples.json"} <= names
    assert {"learnpruner/compare.py", "learnpruner/auto.py", "learnpruner/__init__.py"} <= names
    assert {"learnpruner-tiny-llava/model.safetensors", "tiny-llava/model.safetensors"} <= names
    assert not [name for name in names if "__pycache__" in name or name in ("assemble.py", "screenshot.py")]
    assert script("assemble").main(["--output", str(folder)]) == 2
    assert str(folder) in capsys.readouterr().err
