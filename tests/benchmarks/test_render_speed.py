"""The tables of the speed benchmark hold what was recorded, and say what was not."""

import copy
import json
from pathlib import Path

import pytest

import render_speed

HERE = Path(__file__).parents[2] / "benchmarks"
PAGE = "\n".join(f"<!-- {mark} -->\nold\n<!-- /{mark} -->" for mark in ("bars", "speed", "costs", "growth"))


def figure(median):
    return {"median": median, "low": 0.9 * median, "high": 1.2 * median, "confidence": 0.9609}


RATIOS = {
    "prefill_speedup": 3.15,
    "prefill_ceiling": 3.4,
    "prefill_share_of_ceiling": 0.927,
    "end_to_end_speedup": 2.25,
    "end_to_end_ceiling": 2.5,
    "end_to_end_share_of_ceiling": 0.9,
    "overhead_at_ratio_one": 1.002,
    "scoring_and_selection_share": 0.0071,
}
RECORD = {
    **RATIOS,
    "intervals": {name: figure(value) for name, value in RATIOS.items()},
    "seconds": {
        "stock": {"prefill": figure(6.3), "token": figure(0.2), "decoder_prefill": figure(5.1)},
        "pruned": {"prefill": figure(2.0), "decoder_prefill": figure(0.8)},
        "stock answer": {"time_to_first_token": figure(6.4), "decode_token": figure(0.21), "end_to_end": figure(8.0)},
        "pruned answer": {"time_to_first_token": figure(2.1), "decode_token": figure(0.15), "end_to_end": figure(3.0)},
        "parts": {"vision": figure(1.2)},
    },
    "kv_bytes": {"stock": 125_800_000, "pruned": 18_800_000},
    "peak_memory_bytes": {"stock": 196_000_000, "pruned": 45_000_000},
    "flops": {
        "vision": 54e9,
        "pruner": 5e8,
        "stock": {"prefill": 4.8e11, "decode_token": 7.4e8},
        "pruned": {"prefill": 1.1e11, "decode_token": 6.8e8},
    },
    "ratio": 1 / 18,
    "tokens": {"image": 576, "after_cuts": [55, 18], "cut_layers": [0, 9], "mean": 31.875},
    "device": "Some CPU",
    "settings": {
        "preset": "cpu-small",
        "batch_size": 4,
        "text_tokens": 64,
        "new_tokens": 8,
        "backend": "sdpa",
        "dtype": "float32",
        "rounds": 9,
    },
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "base_sha256": "b" * 64,
    "pruner_sha256": "p" * 64,
}


def variant(mean, seconds):
    other = copy.deepcopy(RECORD)
    other["tokens"]["mean"], other["ratio"] = mean, mean / 576
    other["seconds"]["pruned"]["prefill"] = figure(seconds)
    return other


@pytest.fixture
def folder(tmp_path):
    """Prefills on the line 1.5 s + 10 ms a token."""
    (tmp_path / "results" / "cpu").mkdir(parents=True)
    for name, record in {"b": RECORD, "c": variant(100, 2.5), "a": variant(300, 4.5), "d": variant(50, 2.0)}.items():
        (tmp_path / "results" / "cpu" / f"{name}.json").write_text(json.dumps(record))
    return tmp_path / "results"


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]


def test_speed_table():
    head, _, row, *others = cells(render_speed.speed_table([RECORD]))
    assert len(head) == len(row)
    assert row[:6] == ["cpu-small", "4", "64", "8", "sdpa", "32 of 576"]
    assert row[6:10] == ["6300 -> 2000", "3.15 (2.83-3.78)", "3.40", "0.927 (0.834-1.112)"]
    assert row[10:14] == ["6400 -> 2100", "210 -> 150", "2.25 (2.02-2.70)", "2.50"]
    assert row[14:] == ["1.002 (0.902-1.202)", "0.0071"]
    assert [row[:2] for row in others] == [
        [name, "not measured"] for name in render_speed.PRESETS if name != "cpu-small"
    ]


def test_cost_table():
    _, _, row, *others = cells(render_speed.cost_table([RECORD]))
    assert row[6:] == ["1200", "5100 -> 800", "125.8 -> 18.8", "196 -> 45", "0.48 -> 0.11", "0.7 -> 0.7"]
    assert all(row[1] == "not measured" for row in others)
    unknown = {**RECORD, "peak_memory_bytes": {"stock": None, "pruned": None}}
    assert cells(render_speed.cost_table([unknown]))[2][9] == "not measured"


def test_bars():
    def found(*results):
        return {tuple(row[:2]): row[2:] for row in cells(render_speed.bar_table(list(results)))[2:]}

    reached = "cpu-small, 32 of 576 tokens, batch 4"
    ceiling, overhead = (reached, "prefill_share_of_ceiling >= 0.9"), (reached, "overhead_at_ratio_one <= 1.01")
    next_prefill = ("llava-next-7b, 160 of 2928 tokens, batch 8 or more", "prefill_speedup >= 6")
    assert found(RECORD)[ceiling] == ["0.9270 (0.8343-1.1124)", "met"]
    assert found(RECORD)[overhead] == ["1.0020 (0.9018-1.2024)", "met"]
    assert found(RECORD)[next_prefill] == ["not measured", ""]
    # The worst counts.
    worse = found(RECORD, {**RECORD, "prefill_share_of_ceiling": 0.89, "overhead_at_ratio_one": 1.02})
    assert [worse[bar][0].split()[0] for bar in (ceiling, overhead)] == ["0.8900", "1.0200"]
    assert [worse[bar][1] for bar in (ceiling, overhead)] == ["missed", "missed"]
    # Other settings, or another machine, are another measurement.
    gpu = copy.deepcopy(RECORD)
    gpu["settings"] |= {"preset": "llava-next-7b", "batch_size": 8, "new_tokens": 2}
    gpu |= {"prefill_speedup": 6.5, "device": "NVIDIA H100 80GB HBM3"}
    gpu["tokens"] |= {"image": 2928, "mean": 160.2}
    assert found(gpu)[next_prefill] == ["6.5000 (2.8350-3.7800)", "met"]
    assert found({**gpu, "device": "NVIDIA A100"})[next_prefill] == ["not measured", ""]
    for name, value in {"batch_size": 4, "new_tokens": 8}.items():
        other = {**gpu, "settings": {**gpu["settings"], name: value}}
        assert found(other)[next_prefill] == ["not measured", ""]
    fewer = {**gpu, "tokens": {**gpu["tokens"], "mean": 128}}
    assert found(fewer)[next_prefill] == ["not measured", ""]


def test_line(folder, tmp_path):
    page, plot = tmp_path / "PAGE.md", tmp_path / "plot.png"
    page.write_text(PAGE)
    # Without the record that is off the line.
    (folder / "cpu" / "b.json").unlink()
    assert render_speed.main([str(folder), "--into", str(page), "--plot", str(plot)]) == 0
    text = page.read_text()
    assert "| 2000 at 50, 2500 at 100, 4500 at 300 | 1500 + 10.00 x tokens | 1.0000 |" in text
    assert "old" not in text
    assert plot.stat().st_size > 1000


def test_nothing_is_measured(tmp_path, capsys):
    (tmp_path / "none").mkdir()
    assert render_speed.main([str(tmp_path / "none")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("not measured") == 2 * len(render_speed.PRESETS) + len(render_speed.BARS) + 1
    assert render_speed.main([str(tmp_path / "none"), "--plot", str(tmp_path / "plot.png")]) == 2


@pytest.mark.parametrize("content", ["", "[]", '{"prefill_speedup": 2}'])
def test_files_that_are_no_results(content, tmp_path, capsys):
    (tmp_path / "result.json").write_text(content)
    assert render_speed.main([str(tmp_path)]) == 2
    assert "result.json" in capsys.readouterr().err
    assert render_speed.main([str(tmp_path / "nowhere")]) == 2


def test_results_of_unknown_presets(tmp_path, capsys):
    other = {**RECORD, "settings": {**RECORD["settings"], "preset": "llava-70b"}}
    (tmp_path / "result.json").write_text(json.dumps(other))
    assert render_speed.main([str(tmp_path)]) == 2
    assert "llava-70b" in capsys.readouterr().err


def test_the_page_holds_what_was_recorded(tmp_path):
    """Rendered again from the results in the tree, benchmarks/SPEED.md is the same."""
    page = tmp_path / "SPEED.md"
    page.write_text((HERE / "SPEED.md").read_text())
    assert render_speed.main([str(HERE / "results" / "speed"), "--into", str(page)]) == 0
    assert page.read_text() == (HERE / "SPEED.md").read_text()


def test_no_bar_that_was_measured_is_missed():
    results = render_speed.read_folder(HERE / "results" / "speed")
    assert "missed" not in render_speed.bar_table(results)
