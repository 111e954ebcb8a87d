"""The speed benchmark on tiny models: what it times, in what order, and what it makes of it."""

import itertools
import statistics
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from learnpruner.compat_learnpruner import CACHE
from learnpruner.hub_cards.records import SPEEDS, read_result

import speed_measure
import speed_point
import speed_presets
from tiny_models import FAMILIES, LAYERS, tiny_config, vision_tower
from tiny_speed import CPU, IMAGES, TEXT, run, tiny, tiny_presets  # noqa: F401


@pytest.fixture(scope="module", params=FAMILIES)
def record(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("speed") / "result.json"
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
    assert record["device_type"] == "cpu"
    assert len(record["code_sha256"]) == 64
    assert {name for name in record["conditions"] if name != "load_average"} == {"OMP_WAIT_POLICY", "OMP_NUM_THREADS"}
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
    ceiling = median(("stock", "prefill"), ("ideal", "prefill"))
    assert record["prefill_ceiling"] == pytest.approx(ceiling, rel=2e-3)
    for name, what in (("", "end_to_end"), ("prefill_", "time_to_first_token"), ("decode_", "decode_token")):
        overhead = median(("ratio one answer", what), ("stock answer", what))
        assert record[f"{name}overhead_at_ratio_one"] == pytest.approx(overhead, rel=2e-3)
    later = median(("stock answer", "decode_token"), ("pruned answer", "decode_token"))
    assert record["decode_speedup"] == pytest.approx(later, rel=2e-3)
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
        keys = sum(layer.keys.shape[2] for layer in outputs[CACHE].layers)
        step = {"input_ids": inputs["input_ids"][:, -1:], CACHE: outputs[CACHE]}
        with FlopCounterMode(display=False) as token:
            model(**step, logits_to_keep=1)
        text = model.config.text_config
        # The formula leaves out the new row's own key.
        assert sum(layer.keys.shape[2] for layer in outputs[CACHE].layers) == keys + LAYERS
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


# Seconds of one round.
ROUND = {
    "stock": {"prefill": 12.0, "token": 0.75},
    "pruned": {"prefill": 5.0},
    "ideal": {"prefill": 4.0},
    "parts": {"vision": 1.0, "embedding": 0.75, "layers": 2.0, "head": 0.75, "token": 0.25},
    "cuts": {"scoring": 0.2, "selection": 0.3},
    "stock answer": {"end_to_end": 20.0, "time_to_first_token": 12.5, "decode_token": 1.5},
    "ratio one answer": {"end_to_end": 21.0, "time_to_first_token": 13.0, "decode_token": 1.8},
    "pruned answer": {"end_to_end": 10.0, "time_to_first_token": 6.0, "decode_token": 1.0},
}


def rounds(*factors):
    """Rounds that took so many times as long."""
    return {
        name: {what: [factor * time for factor in factors] for what, time in times.items()}
        for name, times in ROUND.items()
    }


def test_ceilings():
    """By hand."""
    found = speed_point.figures(rounds(1), new_tokens=5)
    assert found["prefill_speedup"] == 2.4
    assert found["prefill_ceiling"] == 3.0
    assert found["prefill_share_of_ceiling"] == 0.8
    # 20 seconds, less 8 of the prefill and half a second of each of four tokens.
    assert found["end_to_end_ceiling"] == 2.0
    assert found["end_to_end_share_of_ceiling"] == 1.0
    assert found["overhead_at_ratio_one"] == 1.05
    assert found["prefill_overhead_at_ratio_one"] == 1.04
    assert found["decode_overhead_at_ratio_one"] == 1.2
    assert found["decode_speedup"] == 1.5
    assert found["scoring_and_selection_share"] == 0.1
    assert found["seconds"]["stock"]["decoder_prefill"]["median"] == 11.0
    assert found["seconds"]["pruned"]["decoder_prefill"]["median"] == 4.0


def test_one_token_has_no_decoding():
    samples = rounds(1)
    for name in ("stock", "pruned", "ratio one"):
        del samples[f"{name} answer"]["decode_token"]
    found = speed_point.figures(samples, new_tokens=1)
    assert found["end_to_end_ceiling"] == 1.667  # 20 seconds, less 8 of the prefill
    assert not {"decode_speedup", "decode_overhead_at_ratio_one"} & (set(found) | set(found["intervals"]))


def test_a_slow_round_moves_no_ratio():
    """The second round ran at half the speed, all of it."""
    found = speed_point.figures(rounds(1, 2), new_tokens=5)
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
    expected = text(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], use_cache=True)[CACHE]
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
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ideal_prefill_is_the_stock_parts_under_one_clock(family, monkeypatch):
    stock, pruned, inputs = tiny(family)
    measurement = speed_point.Measurement(stock, pruned, inputs, speed_point.Point("tiny", 2, TEXT, 2, "sdpa", 0.4))
    clocks, images, embedded, rows, logits = [], [], [], [], []
    timed = speed_point.timed
    for module in (speed_point, speed_measure):
        monkeypatch.setattr(module, "timed", lambda *args: (clocks.append(1), timed(*args))[1])
    vision_tower(stock).register_forward_hook(lambda *args: images.append(1))
    stock.get_input_embeddings().register_forward_hook(lambda module, args, out: embedded.append(out.shape[1]))
    for layer in stock.model.language_model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    stock.lm_head.register_forward_hook(lambda module, args, out: logits.append(out.shape[1]))
    pruned.model.pruner.register_forward_hook(lambda *args: pytest.fail("scored"))
    assert set(measurement.contestants()["ideal"]()) == {"prefill"}
    assert (clocks, images, embedded, logits) == ([1], [1], [inputs["input_ids"].shape[1]], [1])
    assert rows == [count for layers, count in measurement.spans["pruned"] for _ in range(layers)]


def test_what_is_compared_stands_side_by_side():
    stock, pruned, inputs = tiny("llava")
    measurement = speed_point.Measurement(stock, pruned, inputs, speed_point.Point("tiny", 2, TEXT, 2, "sdpa", 0.4))
    neighbours = list(itertools.pairwise(measurement.contestants()))
    for pair in (
        *(("stock", "pruned"), ("pruned", "ideal")),
        *(("stock answer", "ratio one answer"), ("ratio one answer", "pruned answer")),
    ):
        assert pair in neighbours


def test_the_ideal_prefill_does_not_wait_for_sizes():
    """As in the pruned model, which reads them once: a tensor's the stock model would read for each image."""
    stock, _, inputs = tiny("llava_next")
    parts = speed_measure.StockParts(stock, inputs, [(LAYERS, 9)])
    assert parts.images["image_sizes"] == [list(IMAGES["llava_next"][0])] * 2


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


@torch.no_grad()
def test_first_use_falls_on_nobody(monkeypatch):
    """Each model answers once before the memory of either is looked at."""
    stock, pruned, inputs = tiny("llava")
    seen = []
    for name, model in (("stock", stock), ("pruned", pruned)):
        model.lm_head.register_forward_hook(lambda *args, name=name: seen.append(name))
    peak = speed_point.peak_memory
    monkeypatch.setattr(speed_point, "peak_memory", lambda *args: (seen.append("looks"), peak(*args))[1])
    point = speed_point.Point("tiny", 2, TEXT, 1, "sdpa", 0.4)
    speed_point.Measurement(stock, pruned, inputs, point)._peak_memory()
    assert seen == ["stock", "pruned", "looks", "stock", "looks", "pruned"]


def test_images_that_would_be_padded():
    for family, image in (("llava", (64, 32)), ("llava_next", (96, 96)), ("qwen2_vl", (20, 32))):
        with pytest.raises(ValueError, match=r"padded|sizes"):
            speed_presets.build_inputs(tiny_config(family), image, 1, TEXT, CPU, torch.float32)
