"""`learnpruner diagnose`: its figures against slow and literal ones, the command on small data, and what it refuses."""

import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoConfig, CLIPImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from learnpruner.compare import load_processor, shown_pixels
from learnpruner.methods import METHODS, diagnose_command
from learnpruner.methods.diagnose_command import boxes_in_view, write_prompt
from learnpruner.methods.diagnostics import PLACES, attention_figures, mean_figures, position_figures, summary
from learnpruner.methods.observations import observe, why_no_cls
from learnpruner_commands import main

from oracles import second_cut
from tiny_models import (
    FAMILIES,
    LAYERS,
    LLAVA,
    PATCH,
    PATCHES,
    PINPOINTS,
    SIDE,
    build_inputs,
    samples_of,
    tiny_pair,
    tiny_processor,
    vision_tower,
)

ROOT = Path(__file__).parents[2]
QWEN_CHECKPOINT = ROOT / "examples" / "easy_vqa" / "learnpruner-tiny-qwen2-vl"


def middles(family, height, width):
    """x and y of each token of an image, by hand; `None` for a newline."""
    side = SIDE // PATCH

    def grid(rows, columns, *end):
        return [
            place
            for y in range(rows)
            for place in (*(((x + 0.5) / columns, (y + 0.5) / rows) for x in range(columns)), *end)
        ]

    if family == "llava":
        return grid(side, side)
    if family != "llava_next":
        return grid(height // PATCH, width // PATCH)
    rows, columns = get_anyres_image_grid_shape((height, width), PINPOINTS, SIDE)
    _, rows, columns = unpad_image(torch.zeros(1, rows * side, columns * side), (height, width)).shape
    return grid(side, side) + grid(rows, columns, None)


def share_in_boxes(places, boxes):
    """Of patches, by hand: the middle in a box, or nearest to a box's middle. All in shares of the picture."""
    places = [place for place in places if place is not None]
    front = set()
    for left, top, right, bottom in boxes:
        distances = [math.dist(place, ((left + right) / 2, (top + bottom) / 2)) for place in places]
        for number, (x, y) in enumerate(places):
            if (left <= x < right and top <= y < bottom) or distances[number] == min(distances):
                front.add(number)
    return len(front) / len(places)


@pytest.mark.parametrize("family", FAMILIES)
def test_observations_are_the_stock_models_attention_and_the_cuts_survivors(family):
    stock, pruned = tiny_pair(family, attention="eager")
    samples = samples_of("padded", family)
    inputs = build_inputs(family, samples)
    methods = {"learnpruner": METHODS["learnpruner"](ratio=0.4), "fastv": METHODS["fastv"](ratio=0.7)}
    hooks = [len(layer._forward_pre_hooks) for layer in pruned.model.language_model.layers]
    seen = observe(pruned, inputs, methods)
    assert [len(layer._forward_pre_hooks) for layer in pruned.model.language_model.layers] == hooks
    attentions = stock(**inputs, output_attentions=True).attentions
    for row, (sample, image) in enumerate(zip(samples, seen)):
        places = middles(family, *sample[1])
        vision = (inputs["input_ids"][row] == pruned.config.image_token_id).nonzero().flatten().tolist()
        real = inputs["attention_mask"][row].nonzero().flatten().tolist()
        patches = [number for number, place in enumerate(places) if place is not None]
        columns = [vision[number] for number in patches]
        text = [index for index in real if index > vision[-1]]
        torch.testing.assert_close(image.places, torch.tensor([places[number] for number in patches]))
        for layer in range(LAYERS):
            _, scores = second_cut(attentions[layer][row], columns, text, 1)
            expected = torch.tensor([scores[column] for column in columns])
            torch.testing.assert_close(image.text[layer], expected, rtol=1e-4, atol=1e-6)
        for name, method in methods.items():
            masks = pruned(**inputs, schedule=method).kept_mask
            assert torch.equal(image.kept[name], torch.stack([mask[row, columns] for mask in masks]))
        assert (image.cls is None) == (family not in LLAVA)


def test_cls_attention_is_the_towers_own():
    stock, pruned = tiny_pair("llava", attention="eager")
    inputs = build_inputs("llava", samples_of("padded", "llava"))
    seen = observe(pruned, inputs, {})
    attentions = vision_tower(stock)(inputs["pixel_values"], output_attentions=True).attentions
    for row, image in enumerate(seen):
        of_heads = attentions[stock.config.vision_feature_layer][row]
        expected = [sum(head[0, 1 + patch].item() for head in of_heads) / len(of_heads) for patch in range(PATCHES)]
        assert image.cls.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_observations_need_no_mask_where_nothing_is_padded(family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("one", family))
    methods = {"learnpruner": METHODS["learnpruner"](ratio=0.4)}
    (expected,) = observe(pruned, inputs, methods)
    del inputs["attention_mask"]
    (seen,) = observe(pruned, inputs, methods)
    assert torch.equal(seen.text, expected.text)
    assert torch.equal(seen.kept["learnpruner"], expected.kept["learnpruner"])


def test_the_last_text_row_alone_where_the_model_says_so():
    stock, pruned = tiny_pair("llava", attention="eager", pruner_query="last")
    inputs = build_inputs("llava", samples_of("one", "llava"))
    (seen,) = observe(pruned, inputs, {})
    attention = stock(**inputs, output_attentions=True).attentions[2][0]
    vision = inputs["input_ids"][0] == pruned.config.image_token_id
    torch.testing.assert_close(seen.text[2], attention[:, -1, vision].mean(0), rtol=1e-4, atol=1e-6)


def test_nothing_is_left_on_a_model_that_fails(monkeypatch):
    _, pruned = tiny_pair("llava")
    inputs = build_inputs("llava", samples_of("one", "llava"))
    layers = pruned.model.language_model.layers
    before = [list(layer._forward_pre_hooks) for layer in layers]
    monkeypatch.setattr(layers[1], "forward", None)
    with pytest.raises(TypeError):
        observe(pruned, inputs, {})
    assert [list(layer._forward_pre_hooks) for layer in layers] == before


@pytest.mark.parametrize(
    ("batch", "message"),
    [("two_images", "one image"), ("image_last", "No text comes after an image")],
)
def test_samples_that_cannot_be_observed(batch, message):
    _, pruned = tiny_pair("llava")
    with pytest.raises(ValueError, match=message):
        observe(pruned, build_inputs("llava", samples_of(batch, "llava")), {})


def literal_attention(paid, front, count, sink):
    """The figures of one image's attention, in plain loops."""
    n, total = len(paid), sum(paid)
    shares = [value / total for value in paid]
    sinks = [i for i in range(n) if paid[i] > sink * total / n]
    best = sorted(range(n), key=lambda i: (-paid[i], i))[:count]
    pairs = [(paid[i], paid[j]) for i in range(n) if front[i] for j in range(n) if not front[j]]
    return {
        "patches": total,
        "entropy": -sum(part * math.log(part) for part in shares if part > 0) / math.log(n),
        "sinks": len(sinks) / n,
        "sink_attention": sum(shares[i] for i in sinks),
        "sink_foreground": sum(front[i] for i in sinks) / len(sinks) if sinks else None,
        "foreground_attention": sum(shares[i] for i in range(n) if front[i]),
        "recall": sum(front[i] for i in best) / sum(front),
        "auc": sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs) if pairs else None,
    }


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sink", [1.5, 5.0])
def test_attention_figures(seed, sink):
    rng = random.Random(seed)
    # Eighths: many ties, and sums without rounding.
    paid = [rng.choice((0, 1, 2, 3, 40)) / 8 for _ in range(30)]
    front = [rng.random() < 0.3 for _ in range(30)]
    if seed == 5:
        front = [True] * 30
    found = attention_figures(torch.tensor(paid), torch.tensor(front), 7, sink)
    assert found == pytest.approx(literal_attention(paid, front, 7, sink))
    without = attention_figures(torch.tensor(paid), None, 7, sink)
    unknown = {"sink_foreground", "foreground_attention", "recall", "auc"}
    assert without == {name: None if name in unknown else value for name, value in found.items()}


def test_attention_figures_at_their_ends():
    front = torch.tensor([True, False, False, False])
    even = attention_figures(torch.full((4,), 0.2), front, 1, 1.5)
    assert (even["entropy"], even["auc"], even["sinks"], even["sink_foreground"]) == pytest.approx((1, 0.5, 0, None))
    single = attention_figures(torch.tensor([0.6, 0, 0, 0]), front, 1, 1.5)
    assert (single["entropy"], single["auc"], single["sink_attention"], single["recall"]) == (0, 1, 1, 1)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl"])
def test_position_figures(family):
    places = [place for place in middles(family, *samples_of("padded", family)[1][1]) if place is not None]
    rng = random.Random(0)
    marks = [rng.random() < 0.4 for _ in places]
    found = position_figures(torch.tensor(marks), torch.tensor(places))
    chosen = [(number, place) for number, (place, mark) in enumerate(zip(places, marks)) if mark]
    halves = {"left": 0.0, "right": 0.0, "top": 0.0, "bottom": 0.0}
    for _, (x, y) in chosen:
        for value, before, after in ((x, "left", "right"), (y, "top", "bottom")):
            halves[before] += 1.0 if value < 0.5 else 0.5 if value == 0.5 else 0.0
            halves[after] += 1.0 if value > 0.5 else 0.5 if value == 0.5 else 0.0
    for name, value in halves.items():
        assert found[name] == pytest.approx(value / len(chosen)), name
    assert found["share"] == pytest.approx(len(chosen) / len(places))
    raster = sum(number / (len(places) - 1) for number, _ in chosen) / len(chosen)
    assert found["raster"] == pytest.approx(raster)
    for row in range(PLACES):
        for column in range(PLACES):
            here = [
                mark
                for (x, y), mark in zip(places, marks)
                if column <= x * PLACES < column + 1 and row <= y * PLACES < row + 1
            ]
            assert found["places"][row][column] == (sum(here) / len(here) if here else None)


def test_no_patch_kept_is_nowhere():
    found = position_figures(torch.zeros(4, dtype=torch.bool), torch.rand(4, 2))
    assert found["share"] == 0
    assert [found[name] for name in ("left", "right", "top", "bottom", "raster")] == [None] * 5


def test_means_leave_out_what_is_not_known():
    figures = [{"a": 1.0, "b": [None, 2.0]}, {"a": None, "b": [None, 4.0]}, {"a": 2.0, "b": None}]
    assert mean_figures(figures) == {"a": 1.5, "b": [None, 3.0]}


def test_the_recorded_figures_are_todays():
    """The page shows what was recorded, which was measured with the counts that today's formula gives."""
    recorded = json.loads((ROOT / "methods" / "diagnostics.json").read_text())
    assert summary(recorded) in (ROOT / "methods" / "DIAGNOSTICS.md").read_text()
    config = AutoConfig.from_pretrained(ROOT / "examples" / "easy_vqa" / recorded["model"])
    depth, tokens = config.text_config.num_hidden_layers, config.image_seq_length
    for name, cuts in recorded["methods"].items():
        method = METHODS[name](recorded["ratio"], accounting=recorded["accounting"])
        counts = method.keep_counts(method.places(SimpleNamespace(config=config)), depth, tokens)
        assert [cut["share"] for cut in cuts] == pytest.approx([count / tokens for count in counts], abs=1e-6), name


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (40, 100)])
@pytest.mark.parametrize("crop", [True, False])
def test_boxes_are_followed_into_the_crop(size, crop):
    processor = tiny_processor("llava")
    if crop:
        processor.image_processor = CLIPImageProcessorPil(
            size={"shortest_edge": 48}, crop_size={"height": 32, "width": 32}
        )
    left, top, right, bottom = box = [size[0] // 2 - 10, size[1] // 2 - 4, size[0] // 2 + 10, size[1] // 2 + 12]
    drawn = Image.new("RGB", size)
    ImageDraw.Draw(drawn).rectangle((left, top, right - 1, bottom - 1), fill="white")
    pixels = shown_pixels(processor, processor.image_processor(images=drawn, return_tensors="pt"))[..., 0] > 0.5
    (found,) = boxes_in_view(processor, size, [box])
    rows, columns = pixels.any(1).nonzero().flatten(), pixels.any(0).nonzero().flatten()
    expected = [columns[0] / 32, rows[0] / 32, (columns[-1] + 1) / 32, (rows[-1] + 1) / 32]
    assert found == pytest.approx([float(edge) for edge in expected], abs=1 / 32)


def test_boxes_outside_the_crop_are_left_out():
    processor = tiny_processor("llava")
    processor.image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    assert boxes_in_view(processor, (96, 32), [[0, 0, 30, 32], [32, 0, 64, 32]]) == [[0, 0, 1, 1]]


def test_the_prompt_ends_where_the_first_answer_begins():
    processor = tiny_processor("llava")
    turns = [("human", "<image>\nw8 w9"), ("gpt", "w10"), ("human", "w11"), ("gpt", "w12")]
    row = {"image": "0.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    assert write_prompt(processor, row) == "<image> w8 w9"
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{% for p in m['content'] %}{{ p.get('text', '<image>') }} {% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert write_prompt(processor, row) == "user:<image> w8 w9 assistant:"


@pytest.fixture
def family():
    return "llava"


@pytest.fixture
def folder(family, tmp_path):
    """A checkpoint, and data: two samples of one image with boxes, one without, a text, and one of two images."""
    stock, _ = tiny_pair(family)
    stock.save_pretrained(tmp_path / "model")
    tiny_processor(family).save_pretrained(tmp_path / "model")
    for number, color in enumerate(("teal", "red", "navy")):
        Image.new("RGB", (64, 32), color).save(tmp_path / f"{number}.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "0.png").read_bytes()[:50])
    shown = {"question": "w8 w9 w10", "answer": "w11"}
    rows = [
        {"image": "0.png", "boxes": [[0, 0, 32, 16]], **shown},
        {"image": [], "boxes": None, **shown},
        {"image": ["0.png", "1.png"], "boxes": None, **shown},
        {"image": "1.png", "boxes": [[40, 8, 48, 24], [0, 0, 8, 8]], **shown},
        {"image": "2.png", "boxes": None, "question": "w8", "answer": "w9"},
        {"image": "damaged.png", "boxes": None, **shown},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def run(folder, **options):
    options = {"model": folder / "model", "data": folder / "data.jsonl", "output": folder / "out", **options}
    command = ["diagnose"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return main(command)


@pytest.mark.parametrize("family", LLAVA)
def test_the_command(family, folder, capsys):
    names = ["learnpruner", "fastv", "random", "oracle_boxes"]
    assert run(folder, method=names[:3], ratio=0.7, batch_size=2) == 0
    diagnosis = json.loads((folder / "out" / "diagnostics.json").read_text())
    assert capsys.readouterr().out.strip() == summary(diagnosis)
    assert (diagnosis["images"], diagnosis["images_with_boxes"], diagnosis["images_left_out"]) == (3, 2, 1)
    assert list(diagnosis["methods"]) == names[:3]
    assert [cut["layer"] for cut in diagnosis["methods"]["learnpruner"]] == [0, 2]
    assert len(diagnosis["layers"]) == LAYERS
    assert diagnosis["cls"]["patches"] > 0
    boxes = [[(0, 0, 0.5, 0.5)], [(0.625, 0.25, 0.75, 0.75), (0, 0, 0.125, 0.25)]]
    shares = [share_in_boxes(middles(family, 32, 64), own) for own in boxes]
    assert diagnosis["foreground"]["share"] == pytest.approx(sum(shares) / 2, abs=1e-6)
    picture = Image.open(folder / "out" / "diagnostics.png")
    assert picture.format == "PNG"
    assert all(600 <= edge <= 2000 for edge in picture.size)
    assert {path.name for path in (folder / "out").iterdir()} == {"diagnostics.json", "diagnostics.png"}
    # Batches make no difference.
    assert run(folder, method=names[:3], ratio=0.7, batch_size=1, output=folder / "single") == 0
    single = json.loads((folder / "single" / "diagnostics.json").read_text())
    for layer, other in zip(diagnosis["layers"], single["layers"]):
        assert layer == pytest.approx(other, abs=1e-5)
    assert single["methods"] == diagnosis["methods"]
    # The first two have boxes.
    assert run(folder, method=names, ratio=0.7, limit=2) == 0
    diagnosis = json.loads((folder / "out" / "diagnostics.json").read_text())
    (oracle,) = diagnosis["methods"]["oracle_boxes"]
    assert oracle["recall"] == 1


def test_defaults_and_data_without_boxes(folder):
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    for row in rows:
        del row["boxes"]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(folder) == 0
    diagnosis = json.loads((folder / "out" / "diagnostics.json").read_text())
    assert list(diagnosis["methods"]) == ["learnpruner", "cls_attention"]
    assert diagnosis["foreground"] is None
    cuts = [cut for cuts in diagnosis["methods"].values() for cut in cuts]
    assert [cut["recall"] for cut in cuts] == [None] * 3
    for name in ("recall", "auc", "sink_foreground", "foreground_attention"):
        assert [layer[name] for layer in (*diagnosis["layers"], diagnosis["cls"])] == [None] * (LAYERS + 1)
    assert Image.open(folder / "out" / "diagnostics.png").format == "PNG"


def test_a_model_without_cls(folder):
    assert run(folder, model=QWEN_CHECKPOINT, limit=1, ratio=0.2) != 0  # its processor brings code
    options = {"model": QWEN_CHECKPOINT, "data": folder / "data.jsonl", "output": folder / "out"}
    command = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert main(["diagnose", *command, "--limit", "2", "--ratio", "0.2", "--trust-remote-code"]) == 0
    diagnosis = json.loads((folder / "out" / "diagnostics.json").read_text())
    assert list(diagnosis["methods"]) == ["learnpruner"]
    assert diagnosis["cls"] is None
    assert "CLS" in diagnosis["no_cls"]
    assert diagnosis["foreground"]["share"] > 0
    assert why_no_cls(tiny_pair("llava")[1].model) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "fastvv"}, "'fastvv' is no method. Known are: cls_attention"),
        ({"method": "oracle_boxes"}, "oracle_boxes looks at boxes, and sample 4 has none"),
        ({"method": "fastv", "ratio": 0.1}, "out of reach"),
        ({"ratio": 1}, "At a ratio of 1 nothing is cut"),
        ({"data": "none.jsonl"}, "none.jsonl"),
        ({"data": "empty.jsonl"}, "holds no list of samples"),
        ({"data": "text.jsonl"}, "No sample has one image"),
        ({"data": "boxes.jsonl"}, "a box is left, top, right and bottom"),
        ({"output": "0.png"}, "0.png is a file"),
        ({"model": QWEN_CHECKPOINT, "method": "cls_attention"}, "has none: take"),
    ],
)
def test_bad_input_is_one_line_before_any_work(change, message, folder, capsys, monkeypatch):
    (folder / "empty.jsonl").write_text("")
    (folder / "text.jsonl").write_text(json.dumps({"question": "w8", "answer": "w9"}))
    (folder / "boxes.jsonl").write_text(
        json.dumps({"image": "0.png", "question": "w8", "answer": "w9", "boxes": [[1, 2, 3]]})
    )
    monkeypatch.setattr(diagnose_command, "observe", lambda *arguments: pytest.fail("the model ran"))
    if change.get("model") == QWEN_CHECKPOINT:
        processor = load_processor(str(QWEN_CHECKPOINT), trust_remote_code=True)
        monkeypatch.setattr("learnpruner.compare.load_processor", lambda *arguments: processor)
    paths = {name: folder / change[name] for name in ("data", "output") if name in change}
    assert run(folder, **{**change, **paths}) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("learnpruner: ")
    assert message in error


def test_matplotlib_is_asked_for_first(folder, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(diagnose_command, "load_samples", lambda *arguments: pytest.fail("data was read"))
    assert run(folder) == 2
    assert "pip install 'learnpruner[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0.5", "x", "inf", "nan"])
def test_bad_sink(text, folder, capsys):
    with pytest.raises(SystemExit) as stop:
        run(folder, sink=text)
    assert stop.value.code == 2
    assert "--sink" in capsys.readouterr().err


def test_a_run_that_fails_leaves_the_last_one_whole(folder, monkeypatch):
    assert run(folder, limit=1) == 0
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}

    def stop(diagnosis, path):
        path.write_bytes(b"half")
        raise RuntimeError("stop")

    monkeypatch.setattr(diagnose_command, "save_diagnostics", stop)
    assert run(folder, limit=2) == 2
    assert {name: (folder / "out" / name).read_bytes() for name in before} == before


def test_the_page_quotes_the_recorded_figures():
    diagnosis = json.loads((ROOT / "methods" / "diagnostics.json").read_text())
    page, tables = (ROOT / "methods" / "DIAGNOSTICS.md").read_text(), summary(diagnosis)
    assert tables in page
    _, read = page.split("What can be read from it")
    quoted = re.findall(r"\d+\.\d", read)
    assert quoted
    assert set(quoted) <= set(re.findall(r"\d+\.\d", tables))
    assert f"{diagnosis['images']} images" in read
    assert (ROOT / "methods" / "diagnostics.png").stat().st_size < 150_000
