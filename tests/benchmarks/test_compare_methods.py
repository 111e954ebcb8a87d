"""The comparison of methods: what is asked, what it costs, what the table says, and what was found."""

import json

import pytest
import torch

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.cuts_learnpruner import LearnedScore, TrainingFreeScore
from learnpruner.hub_cards.records import relative_accuracy
from learnpruner.methods import METHODS
from learnpruner.plan_learnpruner import UNTRAINED_DIVERSITY

import asked
import compare_methods
import method_costs
from asked import BEFORE, BUDGETS, INSIDE, SCENES, STANDARD, Run, unpruned
from compare_methods import COST
from paired import paired_interval


@pytest.fixture(scope="module")
def model():
    return LearnPrunerForConditionalGeneration.from_pretrained(compare_methods.EASY_VQA / "learnpruner-tiny-llava")


@pytest.fixture(scope="module")
def runs(model):
    return compare_methods.runs_of(model)


def test_every_method_is_asked_at_every_budget(runs):
    rows = {(run.label.removesuffix(", cap"), run.scenes, run.tokens) for run in runs}
    names = set(METHODS) - {"stage_1", "stage_2", "composed"}  # of the ablations
    names |= {"learnpruner, untrained", *(f"{name}, then stage 2" for name in compare_methods.WITH_STAGE_2)}
    for name in names:
        assert {(name, at, tokens) for at, budgets in SCENES.items() for tokens in budgets} <= rows
    assert {64, 32, 16, 8} <= set(BUDGETS) == set(SCENES[STANDARD])
    seeds = {run.label: run.seeds for run in runs}
    assert seeds["random"] == seeds["learnpruner"] == (0, 1, 2)
    assert seeds["divprune"] == seeds["learnpruner, untrained"] == (0,)
    files = [run.file(seed) for run in runs for seed in run.seeds]
    assert len(files) == len(set(files))


def test_caps_are_asked_where_a_mean_is_out_of_reach(runs, model):
    """FastV's first layer of eight sees all: 72 of 576 on average before it keeps one."""
    caps = {(run.method, run.tokens): run.cap for run in runs if run.method != "learnpruner"}
    assert [caps["fastv", tokens] for tokens in BUDGETS] == [None, None, 64, 32, 16, 8]
    assert all(caps[name, tokens] is None for name in (*BEFORE, "composed") for tokens in BUDGETS)
    for run in runs:
        method = METHODS[run.method]
        if run.method in INSIDE:
            reached = method(run.tokens / 576, accounting="mean" if run.cap is None else "cap").cuts(model.model)
            assert 1 <= reached[-1].keep(576) < 576


def test_papers_schedules(runs):
    (run,) = (run for run in runs if run.label == "transprune, its paper's schedule")
    # Of 8 layers, two see all, one 0.875, one 0.625, and four 0.125.
    assert run.tokens == round((2 * 576 + 504 + 360 + 4 * 72) / 8)
    assert [run.tokens for run in runs if "calibrated" in run.label] == [230, 115, 58]


def test_cost_is_what_the_cache_holds(model):
    runs = [Run("learnpruner", "learnpruner", 32, asked.DEFAULT), Run("fastv, cap", "fastv", 64, cap=64)]
    # As deep as LearnPruner, and each a row of its own.
    runs += [Run("untrained", "learnpruner", 32), Run("", "composed", 32, fields={"first": "divprune"})]
    costs = method_costs.measure_cost(runs, compare_methods.EASY_VQA / "learnpruner-tiny-llava", 2, 1)
    text = model.config.text_config
    row = 2 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * 4
    learned, fastv, untrained, composed = costs["costs"]
    # 576 vision tokens and the longest question of the batch, padded.
    (length,) = {cost["kv_bytes_unpruned"] / row / 8 for cost in costs["costs"]}
    question = length - 576
    assert question == int(question)
    assert 5 < question < 40
    # Two prompts of different lengths: rows that padding frees are not held after a cut.
    both = 3 * [55] + 5 * [18]
    for cost, layers in ((learned, both), (untrained, both), (composed, both), (fastv, (1 * [576] + 7 * [64]))):
        assert cost["kv_bytes"] == pytest.approx(row * sum(kept + question for kept in layers), rel=1e-6)
        assert 0 < cost["selection_ms"] < cost["prefill_ms"]
    found = [(c["method"], c["tokens"], c["accounting"], c.get("variant", "")) for c in costs["costs"]]
    assert found == [run.costs_as for run in runs]
    assert len(set(found)) == 4


def test_the_cost_of_an_untrained_pruner_is_that_of_what_chooses_for_it(model):
    method = METHODS["learnpruner"](1 / 18)
    trained, free = (method_costs.cuts_of(method, model, untrained) for untrained in (False, True))
    assert isinstance(trained[0].score, LearnedScore)
    assert type(free[0].score) is TrainingFreeScore
    assert free[0].score.diversity == UNTRAINED_DIVERSITY
    assert free[1].score == trained[1].score


def fake(method, tokens, accuracies, seed=0, **changes):
    by_kind = {kind: {"accuracy": value, "n": 10} for kind, value in zip(("color", "count"), accuracies)}
    result = {"method": method, "name": method, "ratio": tokens / 576, "seed": seed, "level": "standard", "n": 20}
    result |= {"accuracy": sum(accuracies) / 2, "by_kind": by_kind, "base_sha256": "a", "pruner_sha256": None}
    result |= {"data": "d", "versions": {"transformers": "5.23.0"}, "pixels_sha256": "e"}
    given = ["red" if number % 7 < seed else "two" for number in range(20)]
    result["answers"] = {"scene": [n // 4 for n in range(20)], "expected": ["two"] * 20, "given": given}
    return result | {"tokens": {"image": 576, "after_cuts": [tokens], "mean": tokens}} | changes


def test_the_table(monkeypatch, tmp_path):
    monkeypatch.setattr(asked, "RESULTS", tmp_path)
    (tmp_path / "methods").mkdir()
    runs = [Run("random", "random", 64, seeds=(0, 1, 2)), Run("divprune", "divprune", 64)]
    runs += [Run("fastv, cap", "fastv", 64, cap=64), Run("hawk", "hawk", 58)]
    runs.append(Run("learnpruner", "learnpruner", 64, asked.DEFAULT, seeds=(0, 1, 2)))
    random = [fake("random", 64, values, seed) for seed, values in enumerate(((0.5, 0.4), (0.6, 0.5)))]
    ours = [fake("learnpruner", 64, (0.8, 0.8), seed, pruner_sha256=str(seed)) for seed in range(2)]
    divprune = fake("divprune", 64, (0.9, 0.8))
    del divprune["answers"]
    written = [(runs[0], random), (runs[1], [divprune]), (runs[3], [fake("hawk", 58, (0.1, 0.1))]), (runs[4], ours)]
    for run, results in (*written, (unpruned(STANDARD), [fake("none", 576, (1.0, 0.8))])):
        for seed, result in enumerate(results):
            path = run.file(seed)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(result))
    costs = {"batch_size": 8, "repeats": 7, "threads": 1, "device": "cpu", "dtype": "float32"}
    costs["costs"] = [
        {"method": "divprune", "tokens": 64, "accounting": "mean", "prefill_ms": 12.34, "prefill_speedup": 2.5}
        | {"selection_ms": 0.5, "kv_bytes": 81920}
    ]
    page = compare_methods.table(runs, costs)
    lines = [line for line in page.splitlines() if line.startswith("| standard")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    # The best first; RelAcc is a mean of ratios over the kinds. This record has no answers.
    assert rows[0][:7] == ["standard", "64", "divprune", "64", "64", "64", "1"]
    assert rows[0][7:] == ["85.0", "not measured", "95.0", "90.0", "80.0", "12.3", "2.5", "0.5", "82"]
    assert rows[1][2:9] == ["learnpruner", "64", "64", "64", "2", "80.0 (80.0-80.0)", "reference"]
    assert rows[2][:7] == ["standard", "64", "random", "64", "64", "64", "2"]
    found = paired_interval(random, ours)
    assert rows[2][8] == "0.0 (0.0 to 0.0)"
    assert found == (0, 0, 0)
    assert rows[2][9:12] == ["55.6 (50.0-61.3)", "55.0 (50.0-60.0)", "45.0 (40.0-50.0)"]
    assert rows[2][12:] == ["not measured"] * 4
    # LearnPruner is asked at no such budget.
    assert rows[3][2:9] == ["hawk", "58", "58", "58", "1", "10.0", ""]
    assert len(rows) == 4
    assert "on standard scenes at 64: random (seed 2); fastv, cap; learnpruner (seed 2)." in page
    assert "batch 8, 1 CPU thread(s), float32, median of 7" in page


@pytest.mark.parametrize(
    ("name", "parts"),
    # Score, selection, merge; beside [CLS]'s watching. Score and selection of three cuts; six layers of two parts.
    [("visionzip", 3 + 2), ("transprune", 3 * 2 + 3 * 2), ("random", 2)],
)
def test_timing_sees_every_part(name, parts, model):
    cuts = METHODS[name](0.5).cuts(model.model)
    with method_costs.timed_selection(cuts, torch.device("cpu")) as (timed, seconds):
        pixels = torch.randn(1, 3, 192, 192)
        ids = torch.tensor([[1, *[model.config.image_token_id] * 576, 2]])
        with torch.no_grad():
            own = model(input_ids=ids, pixel_values=pixels, schedule=timed).logits
            other = model(input_ids=ids, pixel_values=pixels, schedule=METHODS[name](0.5)).logits
    assert len(seconds) == parts
    assert torch.equal(own, other)


def test_what_was_found():
    """Every run that is there is of one model and the same questions, at its budget, with a cost. The page shows it,
    and names what has not been measured."""
    costs = json.loads(COST.read_text())
    model = LearnPrunerForConditionalGeneration.from_pretrained(compare_methods.EASY_VQA / "learnpruner-tiny-llava")
    runs = compare_methods.runs_of(model)
    known = {(c["method"], c["tokens"], c["accounting"], c.get("variant", "")) for c in costs["costs"]}
    relative = {}
    for run in runs:
        (whole,) = unpruned(run.scenes).records()
        for result in run.records():
            assert run.costs_as in known
            relative[run.label, run.tokens, run.scenes] = relative_accuracy(result, whole)
            if run.cap is None:
                share = 0.8 if run.method == "downsample" else 1
                assert share * run.tokens - 0.6 <= result["tokens"]["mean"] <= run.tokens + 0.6
            else:
                assert result["tokens"]["after_cuts"][-1] == run.cap
    page = (compare_methods.EASY_VQA.parents[1] / "methods" / "RESULTS.md").read_text()
    assert compare_methods.table(runs, costs) in page
    # What the page says of it.
    for tokens in (64, 32):
        at = {name: value for (name, of, scenes), value in relative.items() if (of, scenes) == (tokens, STANDARD)}
        best = max(value for name, value in at.items() if "cap" not in name)  # caps have more tokens on average
        assert at["learnpruner"] > best - 0.005
        assert at["divprune"] > best - 0.005
        for name in ("fastv, cap", "hawk"):
            assert at[name] < at["random"] + 0.1
        assert at["uniform"] > at["random"] > at["pool"]
