"""How often the host waits for a device, against the stock model."""

import pytest
import torch

from learnpruner.prompt_learnpruner import send

from host_waits import Waits
from tiny_models import NO_PLACEHOLDERS, build_inputs, samples_of, tiny_pair, with_videos

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.index_put_((x > 0,), torch.ones(2)),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: torch.as_tensor([1, 2], device=x.device),
        lambda x: x.new_tensor([1, 2]),
    ],
)
def test_the_count_of_waits_sees(call):
    log = []
    with Waits(log):
        call(torch.tensor([1.0, 0.0, 3.0]))
    assert log


@pytest.mark.parametrize(("device", "asynchronous"), [("cuda", True), ("cpu", False)])
def test_numbers_are_sent_from_pinned_memory_without_blocking(device, asynchronous, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: calls.append((*args, kwargs)) or self)
    assert send([1, 2], torch.device(device)).tolist() == [1, 2]
    assert calls == (["pinned"] if asynchronous else []) + [
        (torch.device(device), {"non_blocking": True} if asynchronous else {})
    ]


def test_the_count_of_waits_passes_what_does_not_wait():
    log, x = [], torch.tensor([1.0, 0.0, 3.0])
    with Waits(log):
        x.masked_fill(x > 0, 2).masked_scatter(x > 0, x).gather(0, x.argsort())[x.long() % 2]
        send([1, 2], x.device)
        torch.tensor([], device=x.device)
    assert not log


@pytest.mark.parametrize(("family", "batch"), with_videos(("one", "padded", "mixed")))
def test_the_host_waits_no_more_than_stock_and_never_inside_the_layers(family, batch):
    stock, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of(batch, family))
    counts = {}
    for model in (stock, pruned):
        log = []
        text = model.model.language_model
        text.layers[0].register_forward_pre_hook(lambda *args, log=log: log.append("first layer"))
        text.norm.register_forward_pre_hook(lambda *args, log=log: log.append("norm"))
        with Waits(log):
            model(**inputs)
        inside = log[log.index("first layer") + 1 : log.index("norm")]
        assert not inside
        counts[model] = len(log) - 2
    assert counts[pruned] <= counts[stock]


@pytest.mark.parametrize(("family", "batch"), with_videos(("one", "mixed")))
def test_what_generate_waits_for_beyond_stock(family, batch):
    """The prompt's layout; a step behind the prompt waits for nothing more."""
    stock, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of(batch, family))
    more = []
    for steps in (1, 4):
        counts = {}
        for model in (stock, pruned):
            log = []
            with Waits(log):
                model.generate(**inputs, max_new_tokens=steps, do_sample=False, **NO_PLACEHOLDERS)
            counts[model] = len(log)
        more.append(counts[pruned] - counts[stock])
    # LLaVA-NeXT's pruner packs row numbers on the host, which looks here as if it were the device.
    assert more[0] <= (2 if family == "llava_next" else 1)
    assert more[1] <= more[0]
