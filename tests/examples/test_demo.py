"""The main job on real images, by the small trained model: right answers, pruned and unpruned."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from learnpruner.budget_learnpruner import keep_counts

from scenes import sources

DEMO = Path(__file__).parents[2] / "examples" / "easy_vqa" / "demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("easy_vqa_demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("value", "count"), [(None, 6), (0.3, 2)])
def test_demo(demo, value, count, tmp_path, capsys):
    ratio = [] if value is None else ["--ratio", str(value)]
    assert demo.main(["--limit", str(count), *ratio, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    first, second = keep_counts(576, value or 1 / 9, num_layers=8, pruner_layer=3, stage_ratio=3.0)
    assert printed.count(f"576 -> {first} -> {second}") == count + 1
    assert "NOT TRAINED" not in printed
    right, of, stock_right = re.search(r"(\d+) of (\d+) answers right \(unpruned: (\d+)\)", printed).groups()
    answers = re.findall(r"answer +'(\w+)' \(unpruned: '(\w+)'\)\n(?:.*\n)*?true answer +'(\w+)'", printed)
    assert int(of) == len(answers) == count
    assert int(right) == sum(pruned == true for pruned, _, true in answers) == count
    assert int(stock_right) == sum(stock == true for _, stock, true in answers) == count
    for sizes in re.findall(r"KV cache +([\d,]+) bytes \(unpruned: ([\d,]+) bytes", printed):
        pruned, stock = (int(size.replace(",", "")) for size in sizes)
        # 3 layers hold the first count, 5 the second: the tokens gone, times keys and values of 192 float32.
        gone = 3 * (576 - first) + 5 * (576 - second)
        # The two may stop at answers of different lengths: a few rows of 8 layers.
        assert abs(stock - pruned - gone * 2 * 192 * 4) <= 8 * 8 * 2 * 192 * 4
    for number in range(count):
        picture = Image.open(tmp_path / "out" / f"question-{number}.png")
        assert picture.format == "PNG"
        assert min(picture.size) > 400
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 10


def test_a_run_can_be_repeated(demo, tmp_path, capsys):
    answers = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        demo.main(["--limit", "1", "--seed", seed, "--output", str(tmp_path / name)])
        printed = capsys.readouterr().out
        answers.append(re.findall(r"(?:question|answer) .*", printed))
    assert answers[0] == answers[1] != answers[2]


def test_without_pruning(demo, tmp_path, capsys):
    assert demo.main(["--limit", "1", "--ratio", "1.0", "--output", str(tmp_path)]) == 0
    assert "576 vision tokens, 576.0 on average" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["package", "image"])
def test_missing_or_damaged_images(demo, damage, tmp_path, capsys, monkeypatch):
    sources.cache_clear()
    if damage == "package":
        monkeypatch.setitem(sys.modules, "easy_vqa", None)
    else:
        import easy_vqa

        (tmp_path / "broken.png").write_bytes(b"no image")
        paths = dict.fromkeys(easy_vqa.get_test_image_paths(), tmp_path / "broken.png")
        monkeypatch.setattr(easy_vqa, "get_test_image_paths", lambda: paths)
    assert demo.main(["--output", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert "pip install --force-reinstall easy-vqa==1.0" in captured.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--limit", "0"], ["--ratio", "0"], ["--ratio", "1.5"], ["--level", "easy"]])
def test_bad_arguments(demo, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_no_such_model(demo, tmp_path, capsys):
    assert demo.main(["--limit", "1", "--model", str(tmp_path / "none"), "--output", str(tmp_path / "out")]) == 2
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
