"""`learnpruner doctor`: it passes where pruning is right, and fails where the cache, a layer or a cut is not."""

import socket
from functools import wraps

import huggingface_hub
import pytest
import torch
import transformers

from learnpruner import LearnPrunerLlavaForConditionalGeneration, __version__, doctor_models
from learnpruner.compat_learnpruner import CACHE
from learnpruner.doctor import CHECKS, Check, Report, doctor
from learnpruner.families import FAMILIES

pytestmark = pytest.mark.core
NAMES = [family.base_model_type for family in FAMILIES]


def failed(report):
    return {check.name: check.detail for check in report.checks if not check.passed}


@pytest.fixture
def break_pruned(monkeypatch):
    """Has a function change each pruned model that the doctor builds."""
    build_pair = doctor_models.build_pair

    def use(change):
        def broken(*arguments):
            stock, pruned = build_pair(*arguments)
            change(pruned)
            return stock, pruned

        monkeypatch.setattr(doctor_models, "build_pair", broken)

    return use


def test_all_families_pass(monkeypatch, tmp_path, capsys):
    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    transformers.utils.logging.enable_progress_bar()
    state = torch.get_rng_state()
    report = doctor()
    assert report.passed, str(report)
    assert [(check.family, check.name) for check in report.checks] == [(f, c) for f in NAMES for c in CHECKS]
    assert sum(check.seconds for check in report.checks) < 60
    assert not list(tmp_path.iterdir())
    assert torch.equal(torch.get_rng_state(), state)
    assert "/24 [" in capsys.readouterr().err

    assert report.versions["learnpruner"] == __version__
    lines = str(report).splitlines()
    for version in (__version__, transformers.__version__, torch.__version__, huggingface_hub.__version__):
        assert any(line.endswith(f" {version}") for line in lines)
    assert {name.lower() for name in report.versions} >= {"python", "platform"}
    assert lines[-1].startswith("PASS: all 20 checks passed")
    assert max(map(len, lines)) <= 120


def test_some_families():
    report = doctor(["qwen2_vl"])
    assert report.passed
    assert {check.family for check in report.checks} == {"qwen2_vl"}
    for unknown in (["llava", "bert"], []):
        with pytest.raises(ValueError, match="choose from"):
            doctor(unknown)


def lose_cache_on_the_way_in(model):
    forward = model.model.language_model.forward

    @wraps(forward)
    def lossy(*arguments, **keywords):
        keywords.pop(CACHE, None)
        return forward(*arguments, **keywords)

    model.model.language_model.forward = lossy


def lose_cache_on_the_way_out(model):
    """The prompt's is another, empty one."""
    forward = model.model.language_model.forward

    @wraps(forward)
    def lossy(*arguments, **keywords):
        outputs = forward(*arguments, **keywords)
        outputs[CACHE] = transformers.DynamicCache()
        return outputs

    model.model.language_model.forward = lossy


@pytest.mark.parametrize(
    ("family", "lose"),
    [
        ("llava", lose_cache_on_the_way_in),
        ("llava_next", lose_cache_on_the_way_out),
        ("qwen2_vl", lose_cache_on_the_way_out),
        ("qwen2_5_vl", lose_cache_on_the_way_in),
    ],
)
def test_a_dropped_cache_fails(family, lose, break_pruned):
    break_pruned(lose)
    report = doctor([family])
    assert not report.passed
    assert {"masked generate", "masked answer"} <= set(failed(report))


def exchange_layers(model):
    layers = model.model.language_model.layers
    second, third = layers[1].state_dict(), layers[2].state_dict()
    second, third = ({name: value.clone() for name, value in part.items()} for part in (second, third))
    layers[1].load_state_dict(third)
    layers[2].load_state_dict(second)


def replace_layer(model):
    layers = model.model.language_model.layers
    layers[3] = type(layers[3])(model.config.text_config, 3).eval()


@pytest.mark.parametrize(("family", "swap"), [*zip(NAMES, [exchange_layers, replace_layer] * len(NAMES))])
def test_a_swapped_layer_fails(family, swap, break_pruned):
    break_pruned(swap)
    report = doctor([family])
    assert {"ratio 1", "masked prompt", "masked generate", "masked answer"} <= set(failed(report))


def test_a_cut_that_is_not_made_fails(break_pruned):
    break_pruned(lambda model: setattr(model.config, "pruner_ratio", 1.0))
    report = doctor(["llava"])
    assert set(failed(report)) == set(CHECKS) - {"ratio 1"}
    assert "has no kept_mask of two cuts" in failed(report)["masked prompt"]


def test_other_tokens_than_were_dropped_fail(break_pruned):
    """An output that names kept tokens which the decoder never saw."""

    def misreport(model):
        forward = model.forward

        @wraps(forward)
        def other(*arguments, **keywords):
            outputs = forward(*arguments, **keywords)
            if outputs.kept_mask is not None:
                last = outputs.kept_mask[-1]
                vision = arguments[0] if arguments else keywords["input_ids"]
                columns = (vision[0] == doctor_models.IMAGE).nonzero().flatten()
                first = outputs.kept_mask[0][0, columns]
                kept, gone = columns[last[0, columns]][0], columns[first & ~last[0, columns]][0]
                last[0, kept], last[0, gone] = False, True
            return outputs

        model.forward = other

    break_pruned(misreport)
    assert "Logits of the prompt" in failed(doctor(["llava"]))["masked prompt"]


def test_padding_that_is_seen_fails(break_pruned):
    def forget_mask(model):
        forward = model.model.forward

        @wraps(forward)
        def blind(*arguments, **keywords):
            keywords["attention_mask"] = None
            return forward(*arguments, **keywords)

        model.model.forward = blind

    break_pruned(forget_mask)
    assert {"ratio 1", "masked prompt", "batch and rows"} <= set(failed(doctor(["qwen2_vl"])))


def test_an_exception_is_a_failure(monkeypatch):
    @wraps(LearnPrunerLlavaForConditionalGeneration.forward)
    def crash(*_, **__):
        raise TypeError("__init__() got an unexpected\n  keyword argument 'cash'")

    monkeypatch.setattr(LearnPrunerLlavaForConditionalGeneration, "forward", crash)
    report = doctor(["llava", "qwen2_vl"])
    assert not report.passed
    assert [check.passed for check in report.checks] == [False] * 5 + [True] * 5
    detail = report.checks[0].detail
    assert detail.startswith("TypeError: __init__() got an unexpected keyword argument 'cash' (")
    assert f"modeling/test_doctor.py:{crash.__code__.co_firstlineno + 2}, in crash)" in detail
    text = str(report)
    assert text.count("'cash'") == 1
    assert "FAIL: 5 of 10 checks failed" in text
    assert "use the stock model class" in text


def test_a_model_that_cannot_be_built_is_a_failure(monkeypatch):
    monkeypatch.setitem(doctor_models.BUILDERS, "llava", lambda: 1 / 0)
    monkeypatch.delitem(doctor_models.BUILDERS, "qwen2_vl")
    report = doctor(["llava", "qwen2_vl"])
    assert [(check.name, check.passed) for check in report.checks] == [("models are built", False)] * 2
    assert "ZeroDivisionError" in report.checks[0].detail
    assert "no tiny model for the family 'qwen2_vl'" in report.checks[1].detail


@pytest.mark.parametrize(
    ("release", "ratio_one", "advice"),
    [
        ("5.25.0", True, ["pip install 'transformers>=5.20,<5.25'", "run with pruner_ratio=1.0"]),
        ("5.25.0", False, ["pip install 'transformers>=5.20,<5.25'", "use the stock model class"]),
        ("5.24.1", True, ["try an older transformers", "run with pruner_ratio=1.0"]),
    ],
)
def test_what_to_do(release, ratio_one, advice):
    checks = [
        Check("llava", "ratio 1", ratio_one, "", 0.1),
        Check("llava", "masked prompt", False, "They differ.", 0.1),
    ]
    lines = str(Report(checks, {"transformers": release}, ">=5.20,<5.25")).splitlines()
    verdict = next(number for number, line in enumerate(lines) if line.startswith("FAIL: "))
    todo = lines[verdict + 1 :]
    assert todo[0] == "What to do:"
    for line, expected in zip(todo[1:], [*advice, "Report it"], strict=True):
        assert expected in line


def test_a_release_that_was_not_tested_may_pass():
    report = Report([Check("llava", "ratio 1", True, "", 0.1)], {"transformers": "6.0.0.dev0"}, ">=5.20,<5.25")
    assert str(report).endswith("transformers 6.0.0.dev0 is outside the tested range >=5.20,<5.25.")
    assert not Report([], {"transformers": "5.24.0"}, "").passed
