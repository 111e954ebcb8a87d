"""The speed benchmark on tiny models: what it times, in what order, what it makes of it, and what it refuses."""

import statistics
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from learnpruner.hub_cards.records import SPEEDS, read_result

import speed
import speed_formulas
import speed_measure
import speed_point
import speed_presets
import speed_sweep
from tiny_models import FAMILIES, LAYERS, tiny_config, vision_tower

# Height and width that each family takes without padding; their tokens, from the published layouts.
IMAGES = {
    "llava": ((32, 32), 16),
    "llava_next": ((64, 32), 16 + 8 * 5),
    "qwen2_vl": ((48, 32), 6 * 4),
    "qwen2_5_vl": ((40, 56), 5 * 7),
}
TEXT = 7
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _tiny_presets(monkeypatch):
    for family, (image, _) in IMAGES.items():
        preset = speed_presets.Preset(lambda family=family: tiny_config(family), image)
        monkeypatch.setitem(speed_presets.PRESETS, family, preset)


def tiny(family, batch=2):
    config = tiny_config(family)
    pair = speed_presets.build_pair(config, CPU, torch.float32)
    return *pair, speed_presets.build_inputs(config, IMAGES[family][0], batch, TEXT, CPU, torch.float32)


def run(*arguments, preset="llava"):
    return speed.main(["--preset", preset, "--text", str(TEXT), "--threads", "1", *arguments])


@pytest.fixture(scope="module", params=FAMILIES)
def record(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("speed") / "result.json"
    with pytest.MonkeyPatch.context() as patch:
        preset = speed_presets.Preset(lambda: tiny_config(request.param), IMAGES[request.param][0])
        patch.setitem(speed_presets.PRESETS, request.param, preset)
        arguments = ["--batch", "2", "--ratio", "0.4", "--new-tokens", "3", "--rounds", "3", "--output", str(path)]
        assert run(*arguments, preset=request.param) == 0
    return read_result(path, speed=True)


def test_record(record):
    settings = record["settings"]
    assert settings == {
        "preset": settings["preset"],
        "batch_size": 2,
        "text_tokens": TEXT,
        "new_tokens": 3,
        "backend": "sdpa",
        "dtype": "float32",
        "threads": 1,
        "rounds": 3,
        "warmup": 1,
        "seed": 0,
    }
    assert record["ratio"] == 0.4
    assert record["tokens"]["image"] == IMAGES[settings["preset"]][1]
    assert all(isinstance(record[name], float) and record[name] > 0 for name in SPEEDS)
    assert all(len(record[name]) == 64 for name in ("base_sha256", "pruner_sha256"))
    assert record["versions"]["torch"] == torch.__version__
    for times in record["samples"].values():
        assert all(len(values) == 3 and min(values) > 0 for values in times.values())


def test_the_headline_figures_are_those_of_the_samples(record):
    samples = record["samples"]

    def median(one, other):
        pairs = zip(*(samples[name][what] for name, what in (one, other)))
        return statistics.median(a / b for a, b in pairs)

    prefill = median(("stock", "prefill"), ("pruned", "prefill"))
    assert record["prefill_speedup"] == pytest.approx(prefill, rel=2e-3)
    whole = median(("stock answer", "end_to_end"), ("pruned answer", "end_to_end"))
    assert record["end_to_end_speedup"] == pytest.approx(whole, rel=2e-3)
    overhead = median(("ratio one answer", "end_to_end"), ("stock answer", "end_to_end"))
    assert record["overhead_at_ratio_one"] == pytest.approx(overhead, rel=2e-3)
    for name, interval in record["intervals"].items():
        assert interval["low"] <= record[name] <= interval["high"]
        assert interval["confidence"] == 0.75  # three samples: 1 - 2 / 2**3


def test_cache_bytes_are_those_of_the_rows_that_are_kept(record):
    _, pruned, inputs = tiny(record["settings"]["preset"])
    first, second = (int(kept.sum()) for kept in pruned(**inputs, pruner_ratio=0.4).kept_mask)
    text = pruned.config.text_config
    row = 2 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * 4
    k = pruned.config.pruner_layer
    assert record["kv_bytes"] == {
        "stock": inputs["input_ids"].numel() * LAYERS * row,
        "pruned": (first * k + second * (LAYERS - k)) * row,
    }


@torch.no_grad()
@pytest.mark.parametrize("ratio", [1.0, 0.9, 0.4, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_those_that_torch_counts(family, ratio):
    stock, pruned, inputs = tiny(family)
    point = speed_point.Point("tiny", 2, TEXT, 2, "eager", ratio)
    for model in (stock, pruned):
        model.set_attn_implementation("eager")
    costs = speed_point.Measurement(stock, pruned, inputs, point).costs()["flops"]
    counted = {}
    for name, model, arguments in (("stock", stock, {}), ("pruned", pruned, {"pruner_ratio": ratio})):
        with FlopCounterMode(display=False) as counter:
            outputs = model(**inputs, **arguments, logits_to_keep=1)
        keys = sum(layer.keys.shape[2] for layer in outputs.past_key_values.layers)
        step = {"input_ids": inputs["input_ids"][:, -1:], "past_key_values": outputs.past_key_values}
        with FlopCounterMode(display=False) as token:
            model(**step, logits_to_keep=1)
        text = model.config.text_config
        # The formula leaves out the new row's own key.
        assert sum(layer.keys.shape[2] for layer in outputs.past_key_values.layers) == keys + LAYERS
        own = LAYERS * 4 * text.hidden_size * 2
        counted[name] = {"prefill": counter.get_total_flops(), "decode_token": token.get_total_flops() - own}
    assert counted == {name: costs[name] for name in counted}


def test_the_published_shapes():
    """Parameters of the checkpoints on the Hub; not one of them is downloaded."""
    published = {
        "llava-1.5-7b": 7_063_427_072,
        "qwen2.5-vl-7b-4k": 8_292_166_656,
        # The same, and one learned newline.
        "llava-next-7b": 7_063_427_072 + 4096,
    }
    for name, parameters in published.items():
        with torch.device("meta"):
            model = speed_presets.stock_model(speed_presets.PRESETS[name].config(), torch.bfloat16)
        assert sum(weight.numel() for weight in model.parameters()) == parameters
    tokens = {}
    for name, preset in speed_presets.PRESETS.items():
        config = preset.config()
        tokens[name] = speed_presets.IMAGES[config.model_type](config, preset.image)[2]
    assert tokens["llava-1.5-7b"] == tokens["llava-1.5-13b"] == tokens["cpu-small"] == 576
    assert tokens["llava-next-7b"] == 2880 + 48
    assert [tokens[f"qwen2.5-vl-7b-{size}"] for size in ("1k", "4k", "16k")] == [1024, 4096, 16384]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_one_set_of_weights(family):
    stock, pruned, inputs = tiny(family)
    own = dict(pruned.named_parameters())
    assert all(own[name].data_ptr() == weight.data_ptr() for name, weight in stock.named_parameters())
    assert {name.split(".")[1] for name in set(own) - {name for name, _ in stock.named_parameters()}} == {"pruner"}
    assert not any(value.is_meta for value in (*own.values(), *pruned.buffers()))
    assert torch.equal(stock(**inputs).logits, pruned(**inputs, pruner_ratio=1.0).logits)
    assert pruned(**inputs, pruner_ratio=0.4).kept_mask is not None


def test_contestants_take_turns():
    calls = []

    def contestant(name):
        def call():
            calls.append(name)
            return {"time": float(len(calls))}

        return call

    samples = speed_measure.interleave({name: contestant(name) for name in "AB"}, rounds=3, warmup=2, label="")
    assert calls == ["A", "B", "B", "A"] * 2 + ["A", "B"]
    assert samples == {"A": {"time": [5.0, 8.0, 9.0]}, "B": {"time": [6.0, 7.0, 10.0]}}


@pytest.mark.parametrize(
    ("count", "place", "confidence"),
    # Of the sign test's tables.
    [(2, 1, 0.5), (5, 1, 0.9375), (6, 1, 0.9688), (8, 1, 0.9922), (9, 2, 0.9609), (12, 3, 0.9614), (20, 6, 0.9586)],
)
def test_interval_of_the_median(count, place, confidence):
    samples = torch.randperm(count, generator=torch.Generator().manual_seed(count)).tolist()
    assert speed_measure.summarise(samples) == {
        "median": (count - 1) / 2,
        "low": place - 1,
        "high": count - place,
        "confidence": confidence,
    }


def test_ceilings():
    """By hand: stock parts of 1 + 0.5 + 2 + 0.5 = 4 seconds, of a stock prefill of 12 and a pruned one of 5."""
    samples = {
        "stock": {"prefill": [12.0], "token": [0.75]},
        "pruned": {"prefill": [5.0]},
        "stock answer": {"end_to_end": [20.0]},
        "pruned answer": {"end_to_end": [10.0]},
        "ratio one answer": {"end_to_end": [21.0]},
        "parts": {"vision": [1.0], "embedding": [0.5], "layers": [2.0], "head": [0.5], "token": [0.25]},
        "cuts": {"scoring": [0.2], "selection": [0.3]},
    }
    found = speed_point.figures(samples, new_tokens=5)
    assert found["prefill_speedup"] == 2.4
    assert found["prefill_ceiling"] == 3.0
    assert found["prefill_share_of_ceiling"] == 0.8
    # 20 seconds, less 8 of the prefill and half a second of each of four tokens.
    assert found["end_to_end_ceiling"] == 2.0
    assert found["end_to_end_share_of_ceiling"] == 1.0
    assert found["overhead_at_ratio_one"] == 1.05
    assert found["scoring_and_selection_share"] == 0.1
    assert found["seconds"]["stock"]["decoder_prefill"]["median"] == 11.0
    assert found["seconds"]["pruned"]["decoder_prefill"]["median"] == 4.0


def test_a_slow_round_moves_no_ratio():
    """The second round ran at half the speed, all of it."""
    one = {
        "stock": {"prefill": 12.0, "token": 0.75},
        "pruned": {"prefill": 5.0},
        "stock answer": {"end_to_end": 20.0},
        "pruned answer": {"end_to_end": 10.0},
        "ratio one answer": {"end_to_end": 21.0},
        "parts": {"vision": 1.0, "embedding": 0.5, "layers": 2.0, "head": 0.5, "token": 0.25},
        "cuts": {"scoring": 0.2, "selection": 0.3},
    }
    samples = {name: {what: [time, 2 * time] for what, time in times.items()} for name, times in one.items()}
    found = speed_point.figures(samples, new_tokens=5)
    for name, interval in found["intervals"].items():
        assert interval["low"] == interval["high"] == found[name]


@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_parts_are_the_stock_forward(family, backend):
    """On as many rows as the prompt has, and on its own embeddings, the layers fill the very cache of the stock model;
    on fewer rows each layer sees as many as it is given."""
    stock, _, inputs = tiny(family)
    stock.set_attn_implementation(backend)
    rows = inputs["input_ids"].shape[1]
    embeds = stock.get_input_embeddings()(inputs["input_ids"])
    text = stock.model.language_model
    expected = text(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], use_cache=True).past_key_values
    parts = speed_measure.StockParts(stock, inputs, [(LAYERS, rows)])
    ((layers, _, mask, rotary),) = parts.runs
    parts.runs = [(layers, embeds, mask, rotary)]
    cache = parts.run_layers()
    for one, other in zip(cache.layers, expected.layers):
        torch.testing.assert_close(one.keys, other.keys)
        torch.testing.assert_close(one.values, other.values)

    parts = speed_measure.StockParts(stock, inputs, [(1, 12), (LAYERS - 1, 9)])
    seen = []
    for layer in text.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    patches = []
    vision_tower(stock).register_forward_hook(lambda *args: patches.append(1))
    times = parts.times()
    assert seen == [12] + [9] * (LAYERS - 1) + [1] * LAYERS
    assert patches == [1]
    assert set(times) == {"vision", "embedding", "layers", "head", "token"}


@torch.no_grad()
def test_what_is_timed_of_an_answer():
    stock, _, inputs = tiny("llava")
    seen = []
    stock.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    times = speed_measure.generation_times(stock, inputs, 4)
    assert seen == [inputs["input_ids"].shape[1], 1, 1, 1]
    whole = times["time_to_first_token"] + 3 * times["decode_token"]
    assert times["end_to_end"] == pytest.approx(whole, abs=1e-3)
    assert set(speed_measure.generation_times(stock, inputs, 1)) == {"time_to_first_token", "end_to_end"}


@torch.no_grad()
def test_scores_and_selections_are_timed_in_place():
    stock, pruned, inputs = tiny("llava")
    measurement = speed_point.Measurement(stock, pruned, inputs, speed_point.Point("tiny", 2, TEXT, 2, "sdpa", 0.4))
    run = []
    pruned.model.pruner.register_forward_hook(lambda *args: run.append("scored"))
    times = measurement._cut_times()
    assert run == ["scored"]
    assert set(times) == {"scoring", "selection"}
    assert min(times.values()) > 0
    slow = pruned.model.pruner.forward
    pruned.model.pruner.forward = lambda features: (speed_measure.time.sleep(0.05), slow(features))[1]
    slowed = measurement._cut_times()
    assert slowed["scoring"] > 0.05
    assert slowed["selection"] < 0.05


@pytest.mark.skipif(sys.platform != "linux", reason="the process's peak is read from /proc")
def test_peak_memory():
    size = 200_000_000
    peak = speed_measure.peak_memory(lambda: torch.ones(size // 4), CPU)
    assert peak == pytest.approx(size, rel=0.05)
    # What was freed before does not count.
    assert speed_measure.peak_memory(lambda: None, CPU) < size / 20


def test_a_sweep_goes_on_where_it_was(tmp_path, capsys):
    arguments = ["--batch", "1,2", "--ratio", "0.4,1", "--new-tokens", "1", "--rounds", "1"]
    arguments += ["--output", str(tmp_path / "sweep")]
    assert run(*arguments) == 0
    files = sorted((tmp_path / "sweep").iterdir())
    assert [file.name for file in files] == [
        f"llava-batch{batch}-text{TEXT}-new1-ratio{ratio}-sdpa.json" for batch in (1, 2) for ratio in ("0.4", "1")
    ]
    for file in files:
        found = read_result(file, speed=True)
        assert f"batch{found['settings']['batch_size']}-" in file.name
        assert f"ratio{found['ratio']:g}-" in file.name
    before = {file: file.stat().st_mtime_ns for file in files}
    files[1].unlink()
    assert run(*arguments) == 0
    assert [file for file in files if file.stat().st_mtime_ns != before[file]] == [files[1]]
    # A file of another measurement is not passed off as this one.
    assert run(*arguments, "--rounds", "2") == 2
    assert "rounds" in capsys.readouterr().err


def test_a_point_that_is_too_large_leaves_the_others(tmp_path, monkeypatch, capsys):
    measure = speed.measure

    def with_little_memory(stock, pruned, inputs, point, *rest):
        if point.batch_size == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(stock, pruned, inputs, point, *rest)

    monkeypatch.setattr(speed, "measure", with_little_memory)
    assert run("--batch", "1,2,3", "--new-tokens", "1", "--rounds", "1", "--output", str(tmp_path)) == 2
    assert [file.name.split("-")[1] for file in sorted(tmp_path.iterdir())] == ["batch1", "batch3"]
    assert "batch2" in capsys.readouterr().err


def test_a_cache_that_is_not_the_formula_s(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed_formulas, "kv_bytes", lambda *args: 1)
    assert run("--output", str(tmp_path / "result.json")) == 2
    assert "bytes" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ratio", "0"), "ratio"),
        (("--ratio", "0.5,1.5"), "ratio"),
        (("--batch", "0"), "whole number"),
        (("--text", "four"), "whole number"),
        (("--new-tokens", "1,-1"), "whole number"),
        (("--rounds", "0"), "whole number"),
        (("--preset", "llava-1.5-70b"), "llava-1.5-7b"),
        (("--backend", "fast"), "sdpa, eager"),
        (("--backend", "flash_attention_2"), "lash"),
        (("--device", "cuda"), "GPU"),
        (("--device", "abacus"), "device"),
        (("--dtype", "int8"), "float32"),
        (("--batch", "1,2"), "folder"),
    ],
)
def test_refusals_come_before_any_work(arguments, message, tmp_path, monkeypatch, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(speed_sweep, "build_pair", lambda *args: pytest.fail("built a model"))
    try:
        status = run("--output", str(tmp_path / "result.json"), *arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed_presets.psutil, "virtual_memory", lambda: type("Free", (), {"available": 10**9}))
    monkeypatch.setattr(speed_sweep, "build_pair", lambda *args: pytest.fail("built a model"))
    assert run("--output", str(tmp_path / "result.json"), preset="llava-1.5-7b") == 2
    assert "28.3 GB" in capsys.readouterr().err


def test_images_that_would_be_padded():
    for family, image in (("llava", (64, 32)), ("llava_next", (96, 96)), ("qwen2_vl", (20, 32))):
        with pytest.raises(ValueError, match=r"padded|sizes"):
            speed_presets.build_inputs(tiny_config(family), image, 1, TEXT, CPU, torch.float32)


def test_output_must_not_be_a_folder(tmp_path, capsys):
    (tmp_path / "result.json").mkdir()
    assert run("--output", str(tmp_path / "result.json")) == 2
    assert "folder" in capsys.readouterr().err
