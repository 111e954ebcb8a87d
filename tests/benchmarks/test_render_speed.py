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
    "prefill_overhead_at_ratio_one": 1.003,
    "decode_overhead_at_ratio_one": 0.998,
    "decode_speedup": 1.4,
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
        "parts": {"vision": figure(1.2), "layers": figure(0.5)},
    },
    "kv_bytes": {"stock": 125_800_000, "pruned": 18_800_000},
    "peak_memory_bytes": {"stock": 196_000_000, "pruned": 45_000_000},
    "flops": {
        "vision": 54 * 10**9,
        "pruner": 5 * 10**8,
        "stock": {"prefill": 48 * 10**10, "decode_token": 74 * 10**7},
        "pruned": {"prefill": 11 * 10**10, "decode_token": 68 * 10**7},
    },
    "ratio": 1 / 18,
    "tokens": {"image": 576, "after_cuts": [55, 18], "cut_layers": [0, 9], "mean": 31.875},
    "device": "Some CPU",
    "device_type": "cpu",
    "conditions": {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": None, "load_average": 0.31},
    "code_sha256": "c" * 64,
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
    assert row[10:13] == ["6400 -> 2100", "210 -> 150", "1.40 (1.26-1.68)"]
    assert row[13:15] == ["2.25 (2.02-2.70)", "2.50 (2.25-3.00)"]
    assert row[15:] == ["1.002 (0.902-1.202)", "1.003, 0.998", "0.0071"]
    assert [row[:2] for row in others] == [
        [name, "not measured"] for name in render_speed.PRESETS if name != "cpu-small"
    ]


def test_cost_table():
    _, _, row, *others = cells(render_speed.cost_table([RECORD]))
    assert row[6:] == ["1200", "5100 -> 800", "125.8 -> 18.8", "196 -> 45", "0.48 -> 0.11", "0.7 -> 0.7"]
    assert all(row[1] == "not measured" for row in others)
    unknown = {**RECORD, "peak_memory_bytes": {"stock": None, "pruned": None}}
    assert cells(render_speed.cost_table([unknown]))[2][9] == "not measured"


def test_an_answer_of_one_token():
    short = copy.deepcopy(RECORD)
    for name in ("decode_speedup", "decode_overhead_at_ratio_one"):
        del short[name], short["intervals"][name]
    for name in ("stock", "pruned"):
        del short["seconds"][f"{name} answer"]["decode_token"]
    row = cells(render_speed.speed_table([short]))[2]
    assert row[10:13] == ["6400 -> 2100", "", ""]
    assert row[16] == "1.003"


def test_conditions():
    """One line for results of the same conditions, with the loads of all of them."""
    busy = {**RECORD, "conditions": {**RECORD["conditions"], "load_average": 1.25}}
    other = {**RECORD, "versions": {**RECORD["versions"], "torch": "2.14.0"}}
    lines = render_speed.speed_table([RECORD, busy, other]).rpartition("\n\n")[2].splitlines()
    assert [line.rpartition("; ")[2] for line in lines] == [
        "load average before each point 0.31 to 1.25.",
        "load average before each point 0.31 to 0.31.",
    ]
    assert "torch 2.13.0" in lines[0]
    assert "torch 2.14.0" in lines[1]


def measured(record, name, median, low, high, confidence=0.9609):
    interval = {"median": median, "low": low, "high": high, "confidence": confidence}
    return {**record, name: median, "intervals": {**record["intervals"], name: interval}}


def bars(*results):
    return {tuple(row[:2]): row[2:] for row in cells(render_speed.bar_table(list(results)))[2:]}


SMALL = "cpu-small, 32 of 576 tokens, batch 4, float32, sdpa"
CEILING, OVERHEAD = (SMALL, "prefill_share_of_ceiling >= 0.9"), (SMALL, "overhead_at_ratio_one <= 1.01")
NEXT = ("llava-next-7b, 160 of 2928 tokens, batch 8 or more, bfloat16", "prefill_speedup >= 6")
NOT_MEASURED = ["not measured", ""]


@pytest.mark.parametrize(
    ("bar", "values", "verdict"),
    [
        (CEILING, (0.93, 0.91, 0.95), "met"),
        (CEILING, (0.9, 0.9, 0.95), "met"),
        (CEILING, (0.93, 0.89, 0.95), "met by the median"),
        (CEILING, (0.89, 0.88, 0.95), "missed"),
        (OVERHEAD, (1.0, 0.9, 1.01), "met"),
        (OVERHEAD, (1.0, 0.9, 1.02), "met by the median"),
        (OVERHEAD, (1.02, 0.9, 1.03), "missed"),
    ],
)
def test_verdicts(bar, values, verdict):
    median, low, high = values
    result = measured(RECORD, bar[1].split()[0], *values)
    assert bars(result)[bar] == [f"{median:.4f} ({low:.4f}-{high:.4f})", verdict]


def test_the_worst_result_counts():
    worse = measured(
        measured(RECORD, "prefill_share_of_ceiling", 0.89, 0.8, 0.9), "overhead_at_ratio_one", 1.2, 1.1, 1.3
    )
    for results in ((RECORD, worse), (worse, RECORD)):
        found = bars(*results)
        assert [found[bar][0].split()[0] for bar in (CEILING, OVERHEAD)] == ["0.8900", "1.2000"]
        assert [found[bar][1] for bar in (CEILING, OVERHEAD)] == ["missed", "missed"]


def with_settings(record, **settings):
    return {**record, "settings": {**record["settings"], **settings}}


def on_gpu():
    gpu = with_settings(RECORD, preset="llava-next-7b", batch_size=8, new_tokens=2, dtype="bfloat16")
    gpu |= {"device": "NVIDIA H100 80GB HBM3", "device_type": "cuda"}
    gpu["tokens"] = {**RECORD["tokens"], "image": 2928, "mean": 160.2}
    return measured(gpu, "prefill_speedup", 6.5, 6.1, 6.9)


def test_bars_of_gpus_name_their_settings():
    assert bars(on_gpu())[NEXT] == ["6.5000 (6.1000-6.9000), batch 8, sdpa", "met"]
    flash = with_settings(on_gpu(), backend="flash_attention_2", batch_size=16)
    assert bars(flash)[NEXT] == ["6.5000 (6.1000-6.9000), batch 16, flash_attention_2", "met"]
    assert bars({**on_gpu(), "device": "NVIDIA H200"})[NEXT][1] == "met"


@pytest.mark.parametrize(
    "change",
    [
        {"preset": "llava-1.5-13b"},
        {"text_tokens": 32},
        {"dtype": "float16"},
        {"batch_size": 4},
        {"new_tokens": 8},
    ],
)
def test_other_settings_are_no_measurement_of_a_gpu_s_bar(change):
    assert bars(with_settings(on_gpu(), **change))[NEXT] == NOT_MEASURED


@pytest.mark.parametrize(
    "change",
    [{"backend": "eager"}, {"text_tokens": 32}, {"dtype": "bfloat16"}, {"batch_size": 8}, {"new_tokens": 9}],
)
def test_other_settings_are_no_measurement_of_a_cpu_s_bar(change):
    assert bars(RECORD)[CEILING] != NOT_MEASURED
    assert bars(with_settings(RECORD, **change))[CEILING] == NOT_MEASURED


def test_other_devices_budgets_and_fewer_rounds_are_no_measurement():
    gpu = on_gpu()
    for other in (
        {**gpu, "device": "NVIDIA A100"},
        {**gpu, "device_type": "cpu"},
        {**gpu, "tokens": {**gpu["tokens"], "mean": 128}},
        measured(gpu, "prefill_speedup", 6.5, 6.1, 6.9, confidence=0.9375),
    ):
        assert bars(other)[NEXT] == NOT_MEASURED
    assert bars({**RECORD, "device_type": "cuda"})[CEILING] == NOT_MEASURED


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


def test_bars_that_need_no_gpu_are_met():
    rows = bars(*render_speed.read_folder(HERE / "results" / "speed"))
    verdicts = [verdict for (place, _), (_, verdict) in rows.items() if place.startswith("cpu-small")]
    assert len(verdicts) == 3
    assert all(verdict in ("met", "met by the median") for verdict in verdicts)


def test_two_results_of_one_point(tmp_path, capsys):
    (tmp_path / "cpu").mkdir()
    for name in ("a", "cpu/b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(RECORD))
    assert render_speed.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "a.json" in error
    assert "b.json" in error


def test_what_a_line_is_drawn_through():
    """Results that differ by ratio and answer alone."""
    line = [variant(mean, seconds) for mean, seconds in ((50, 2.0), (100, 2.5), (300, 4.5))]
    ((_, points, stock),) = render_speed.sweeps([*line, with_settings(variant(200, 3.5), new_tokens=1)])
    assert points == [(50, 2000), (100, 2500), (200, 3500), (300, 4500)]
    assert stock == [6300] * 4
    for other in (
        *(with_settings(line[2], **change) for change in ({"dtype": "bfloat16"}, {"threads": 1}, {"text_tokens": 32})),
        {**line[2], "device": "Another CPU"},
        {**line[2], "code_sha256": "of other code"},
        {**line[2], "versions": {**line[2]["versions"], "torch": "2.14.0"}},
    ):
        assert render_speed.sweeps([*line[:2], other]) == []
    both = [*line, *({**result, "device": "Another CPU"} for result in line)]
    assert len(render_speed.sweeps(both)) == 2


def test_a_line_without_slope():
    flat = [variant(mean, 2.0) for mean in (50, 100, 300)]
    ((*_, explained, _),) = cells(render_speed.growth_table(flat))[2:]
    assert explained == ""


@pytest.mark.parametrize(
    "place",
    [
        ("intervals", "prefill_overhead_at_ratio_one"),
        ("intervals", "prefill_speedup", "low"),
        ("seconds", "parts", "vision"),
        ("seconds", "pruned", "decoder_prefill", "median"),
        ("seconds", "stock answer", "time_to_first_token"),
        ("settings", "dtype"),
        ("settings", "rounds"),
        ("tokens", "mean"),
        ("kv_bytes", "pruned"),
        ("peak_memory_bytes", "stock"),
        ("flops", "stock", "decode_token"),
        ("versions", "torch"),
        ("conditions", "load_average"),
        ("device_type",),
        ("code_sha256",),
    ],
    ids="-".join,
)
def test_records_that_lack_what_is_shown(place, tmp_path, capsys):
    other = inner = copy.deepcopy(RECORD)
    for name in place[:-1]:
        inner = inner[name]
    del inner[place[-1]]
    (tmp_path / "result.json").write_text(json.dumps(other))
    assert render_speed.main([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "result.json" in line
    assert place[-1] in line
