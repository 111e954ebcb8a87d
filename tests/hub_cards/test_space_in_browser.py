"""The Space as it is uploaded, driven in headless Chromium: a picture in, the slider moved, other patches shown."""

import os
import re

import numpy as np
import pytest
from PIL import Image

from space_scripts import SPACE, script


@pytest.fixture(scope="module")
def screenshot():
    return script("screenshot")


@pytest.fixture(scope="module")
def address(screenshot, tmp_path_factory):
    """The assembled Space, running from its own folder alone."""
    if screenshot.find_chromium() is None:
        message = "no Chromium on this machine: apt-get install chromium"
        pytest.fail(message) if os.environ.get("REQUIRE_CHROMIUM") else pytest.skip(message)
    folder = tmp_path_factory.mktemp("hub") / "space"
    script("assemble").main(["--output", str(folder)])
    with screenshot.serve(folder / "app.py") as address:
        yield address


@pytest.fixture
def page(screenshot, address, request):
    """The app with its first answer. On leaving: nothing came from elsewhere, and no script failed."""
    requests, problems = [], []
    with screenshot.browse(getattr(request, "param", screenshot.DESKTOP)) as page:
        page.on("request", lambda sent: requests.append(sent.url))
        page.on("pageerror", lambda error: problems.append(error))
        screenshot.visit(page, address)
        yield page
    assert not [url for url in requests if not url.startswith((address, "data:", "blob:"))]
    assert not problems


# The bright patches, of 64 pixels each, in the pictures that the page shows of a white upload.
BRIGHT = """() => [...document.querySelectorAll('.lp figure img')].map(image => {
    const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
    const context = canvas.getContext('2d');
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    return pixels.filter((value, index) => index % 4 === 0 && value > 128).length / 64;
})"""


def counts(page):
    return [int(text) for text in page.locator(".lp .count").all_inner_texts()]


def answered(page, question, wait_for):
    """Waits for the answer to a question and for something on the page."""
    page.wait_for_function(
        "([question, text]) => { const shown = document.querySelector('.lp').innerText;"
        " return shown.includes(question) && shown.includes(text); }",
        arg=[question, wait_for],
    )


def test_a_picture_a_question_and_the_slider(page, tmp_path):
    Image.new("RGB", (192, 192), "white").save(tmp_path / "white.png")
    page.get_by_label("Remove Image").click()
    page.locator("input[type=file]").set_input_files(tmp_path / "white.png")
    page.wait_for_selector("img[src*='white.png']")
    page.locator("textarea").fill("is there a circle?")
    page.get_by_role("button", name="Ask").click()
    answered(page, "is there a circle?", "11%")
    before = counts(page)
    assert page.evaluate(BRIGHT) == before
    assert before[0] == 576

    page.locator("input[type=range]").fill("40")
    answered(page, "is there a circle?", "40%")
    after = counts(page)
    assert page.evaluate(BRIGHT) == after
    assert after[0] == 576
    assert after[1] > before[1]
    assert after[2] > before[2]

    page.locator("input[type=range]").fill("100")
    answered(page, "is there a circle?", "Nothing was dropped")
    assert counts(page) == [576]


def test_an_example_is_asked_at_a_click(page):
    page.locator(".gallery-item").nth(2).click()
    answered(page, "what is the yellow shape?", "11%")
    assert page.locator(".lp .card b").all_inner_texts() == ["triangle", "triangle"]


def test_bad_input_is_a_message(page, tmp_path):
    def message(text):
        page.get_by_text(re.compile(text)).first.wait_for()
        assert "Traceback" not in page.locator("body").inner_text()

    page.locator("textarea").fill("")
    page.get_by_role("button", name="Ask").click()
    message("Write a question")
    page.locator("textarea").fill("what is the unicorn?")
    page.get_by_role("button", name="Ask").click()
    message("never taught these words: unicorn")
    page.get_by_label("Remove Image").click()
    page.get_by_role("button", name="Ask").click()
    message("Choose a picture")
    (tmp_path / "broken.png").write_bytes((SPACE / "examples" / "0.png").read_bytes()[:300])
    page.locator("input[type=file]").set_input_files(tmp_path / "broken.png")
    page.wait_for_selector("img[src*='broken.png']", state="attached")
    page.get_by_role("button", name="Ask").click()
    message("This file is damaged")


@pytest.mark.parametrize("page", [(390, 844)], indirect=True)
def test_a_phone_shows_it_without_scrolling_sideways(page):
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for box in (image.bounding_box() for image in page.locator(".lp figure img").all()):
        assert box["width"] > 150


def test_the_screenshot_in_the_docs_is_of_this_page(address, screenshot, tmp_path):
    screenshot.take(address, tmp_path / "shot.png")
    taken, kept = Image.open(tmp_path / "shot.png"), Image.open(SPACE / "screenshot.png")
    assert taken.width == kept.width
    # Other fonts, other line breaks.
    assert taken.height == pytest.approx(kept.height, rel=0.1)
    taken, kept, upside_down = (
        np.asarray(picture.convert("L").resize((64, 64)), float)
        for picture in (taken, kept, kept.transpose(Image.Transpose.FLIP_TOP_BOTTOM))
    )
    # Another page would be as far from it as this page is from itself upside down.
    assert np.abs(taken - kept).mean() < np.abs(taken - upside_down).mean() / 3
