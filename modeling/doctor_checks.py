# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The checks of `learnpruner doctor`: a pruned model against a stock model that hides the dropped tokens.

What a pruned model must equal is computed by *stock* models alone, through the public interface of transformers:
forward hooks on the stock decoder layers hide the keys of dropped tokens. No expected value comes from the code that is
judged.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from .compat_learnpruner import CACHE
from .doctor_models import IMAGE, PLACEHOLDERS, CheckError, TinyCase

# Greedy steps of every answer.
STEPS = 8
# How far float32 logits may be from the masked stock model's, and how far masking must at least move them: a check that
# hides tokens which do not matter would prove nothing. In a lower precision logits may be twice as far from float32's
# as the masked stock model's own are.
TOLERANCE, MOVED = 1e-4, 1e-2


def _with_answer(inputs: dict[str, torch.Tensor], answer: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs of a prompt with `answer`, `(batch, tokens)`, behind it."""
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], answer], dim=1)}
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in inputs:
            whole[name] = F.pad(inputs[name], (0, answer.shape[1]), value=value)
    return whole


def _generate(model: PreTrainedModel, inputs: dict, **arguments):
    """Greedy, and without placeholders, which stock models refuse in a prompt of ids alone."""
    outputs = model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        suppress_tokens=PLACEHOLDERS,
        return_dict_in_generate=True,
        output_logits=True,
        **arguments,
    )
    answer = outputs.sequences[:, inputs["input_ids"].shape[1] :]
    _require(answer.shape[1] == STEPS, f"generate returned {answer.shape[1]} new tokens in place of {STEPS}.")
    return answer, torch.stack(outputs.logits, dim=1), outputs


def _forward(pruned: PreTrainedModel, inputs: dict):
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)
    return pruned(**inputs, query_mask=text)


@contextmanager
def _hiding(stock: PreTrainedModel, attention_mask: torch.Tensor, kept_mask, cut_layers: Sequence[int]):
    """Hides keys from the stock model's layers.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch, sequence)`).
        kept_mask (`Sequence[torch.Tensor]`, each `(batch, sequence)` bool): False where a key is hidden.
        cut_layers (`Sequence[int]`): For each `kept_mask`, the first layer from which on it holds.
    """
    length = attention_mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()

    def hook(mask):
        def replace(layer, arguments, keywords):
            _require("attention_mask" in keywords, f"{type(layer).__name__} is not given its mask as attention_mask.")
            return arguments, {**keywords, "attention_mask": mask}

        return replace

    handles = []
    try:
        for number, layer in enumerate(stock.get_decoder().layers):
            seen = attention_mask.bool()
            for kept, first in zip(kept_mask, cut_layers):
                if number >= first:
                    seen = seen & kept
            visible = causal & seen[:, None, None, :]
            # Not -inf: a row of padding sees nothing.
            mask = torch.zeros(visible.shape, dtype=stock.dtype, device=visible.device)
            mask = mask.masked_fill(~visible, torch.finfo(stock.dtype).min)
            handles.append(layer.register_forward_pre_hook(hook(mask), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _oracle(
    case: TinyCase, kept_mask, answer: torch.Tensor, masked: bool = True, stock: PreTrainedModel | None = None
) -> torch.Tensor:
    """Logits of a stock model, by default the float32 one, at full length and without a cache, over the batch and
    `answer` behind it."""
    stock = case.exact if stock is None else stock
    whole = _with_answer(case.batch, answer)
    kept_mask = [F.pad(kept, (0, answer.shape[1]), value=True) for kept in kept_mask]
    if not masked:
        return stock(**whole, use_cache=False).logits
    cuts = (0, case.pruned.config.pruner_layer)
    with _hiding(stock, whole["attention_mask"], kept_mask, cuts):
        return stock(**whole, use_cache=False).logits


def _tolerance(case: TinyCase, kept_mask, answer: torch.Tensor, expected: torch.Tensor, rows) -> float:
    """How far logits may be from the float32 oracle's, `expected`, of which only `rows` count."""
    own = _oracle(case, kept_mask, answer, stock=case.stock)[rows]
    return max(TOLERANCE, 2 * (own - expected[rows]).abs().max().item())


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckError(message)


def _compare(logits: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = TOLERANCE) -> float:
    difference = (logits - expected).abs().max().item()
    # Written so that NaN fails.
    _require(difference <= tolerance, f"{what} differ by up to {difference:.1e}, more than {tolerance:.0e}.")
    return difference


def _require_moved(moved: float, tolerance: float) -> None:
    _require(
        moved > max(MOVED, tolerance),
        f"Masking moves logits by {moved:.1e}, and up to {tolerance:.0e} may pass: this check proves nothing.",
    )


def _kept(holder, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """`kept_mask` of an output or a cache, if it says that vision tokens and nothing else left at both cuts."""
    # A stock cache, which has none, comes back where the pruned one was lost.
    kept_mask = getattr(holder, "kept_mask", None)
    named = f"{type(holder).__name__} has no kept_mask of two cuts: they were not made, or the cache was lost."
    _require(kept_mask is not None and len(kept_mask) == 2, named)
    valid, vision = inputs["attention_mask"].bool(), inputs["input_ids"] == IMAGE
    before = vision
    for kept in kept_mask:
        _require(torch.equal(kept & ~vision, valid & ~vision), "A cut dropped text, or kept padding.")
        after = kept & vision
        fewer = after.sum(1) < before.sum(1)
        _require(bool(fewer.all() and not (after & ~before).any()), "A cut dropped no vision token of a sample.")
        before = after
    return kept_mask


def _ratio_one(case: TinyCase) -> str:
    same = case.pruned(**case.batch, pruner_ratio=1.0).logits
    _require(torch.equal(same, case.stock(**case.batch).logits), "Logits are not those of the stock class.")
    answer, logits, _ = _generate(case.pruned, case.batch, pruner_ratio=1.0)
    expected, expected_logits, _ = _generate(case.stock, case.batch)
    _require(torch.equal(answer, expected), f"Answers {answer.tolist()} are not the stock's {expected.tolist()}.")
    _require(torch.equal(logits, expected_logits), "Logits in generate are not those of the stock class.")
    return f"logits and {STEPS} greedy tokens are the stock's, bit for bit"


def _masked_prompt(case: TinyCase) -> str:
    outputs = _forward(case.pruned, case.batch)
    kept_mask = _kept(outputs, case.batch)
    nothing = case.batch["input_ids"][:, :0]
    expected = _oracle(case, kept_mask, nothing)
    rows = kept_mask[-1]
    tolerance = _tolerance(case, kept_mask, nothing, expected, rows)
    what = "Logits of the prompt and of the masked stock model"
    difference = _compare(outputs.logits[rows], expected[rows], what, tolerance)
    moved = (_oracle(case, kept_mask, nothing, masked=False) - expected)[rows].abs().max().item()
    _require_moved(moved, tolerance)
    # Gone from the cache, and not only hidden.
    held = [0 if layer.keys is None else layer.keys.shape[-2] for layer in outputs[CACHE].layers]
    first, second = (int(kept.sum(1).max()) for kept in kept_mask)
    cut = case.pruned.config.pruner_layer
    planned = [first] * cut + [second] * (len(case.stock.get_decoder().layers) - cut)
    _require(held == planned, f"The cache holds {held} rows in its layers in place of the {planned} that were kept.")
    return f"difference {difference:.0e}, where masking moves logits by {moved:.1f}; rows in the cache {held}"


def _masked_generate(case: TinyCase) -> str:
    answer, logits, outputs = _generate(case.pruned, case.batch)
    kept_mask = _kept(outputs[CACHE], case.batch)
    first = case.batch["input_ids"].shape[1] - 1
    rows = slice(None), slice(first, -1)
    expected = _oracle(case, kept_mask, answer)
    tolerance = _tolerance(case, kept_mask, answer, expected, rows)
    expected = expected[rows]
    difference = _compare(logits, expected, f"Logits of {STEPS} cached steps and of the masked stock model", tolerance)
    unmasked = _oracle(case, kept_mask, answer, masked=False)[rows]
    moved = (unmasked - expected).abs().amax(dim=(0, 2)).min().item()
    _require_moved(moved, tolerance)
    return f"difference {difference:.0e} in {STEPS} cached steps, where masking moves each by {moved:.1f}"


def _answer(case: TinyCase) -> str:
    """The masked stock model decodes by itself, at full length and without a cache at each step."""
    kept_mask = _kept(_forward(case.pruned, case.batch), case.batch)
    expected = case.batch["input_ids"][:, :0]
    for _ in range(STEPS):
        logits = _oracle(case, kept_mask, expected)[:, -1]
        logits[:, PLACEHOLDERS] = -torch.inf
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    answer, *_ = _generate(case.pruned, case.batch)
    message = f"generate answers {answer.tolist()}, and the masked stock model {expected.tolist()}."
    _require(torch.equal(answer, expected), message)
    return f"{STEPS} greedy tokens are the masked stock model's"


def _batch_and_rows(case: TinyCase) -> str:
    together = _forward(case.pruned, case.batch)
    kept_mask = _kept(together, case.batch)
    answer, logits, _ = _generate(case.pruned, case.batch)
    difference = 0.0
    for number, row in enumerate(case.rows):
        valid = case.batch["attention_mask"][number].bool()
        alone = _forward(case.pruned, row)
        kept_alone = _kept(alone, row)
        for kept, own in zip(kept_mask, kept_alone):
            _require(torch.equal(kept[number, valid], own[0]), f"Sample {number} keeps other tokens alone.")
        rows = kept_alone[-1][0]
        batched = together.logits[number, valid][rows]
        difference = max(difference, _compare(batched, alone.logits[0, rows], f"Logits of sample {number} alone"))
        own_answer, own_logits, _ = _generate(case.pruned, row)
        message = f"Sample {number} is answered {answer[number].tolist()} in a batch, {own_answer[0].tolist()} alone."
        _require(torch.equal(answer[number], own_answer[0]), message)
        what = f"Logits of sample {number} in generate, in a batch and alone,"
        difference = max(difference, _compare(logits[number], own_logits[0], what))
    return f"difference {difference:.0e}; kept tokens and answers are equal"


RATIO_ONE = "ratio 1"
CHECKS: dict[str, Callable[[TinyCase], str]] = {
    RATIO_ONE: _ratio_one,
    "masked prompt": _masked_prompt,
    "masked generate": _masked_generate,
    "masked answer": _answer,
    "batch and rows": _batch_and_rows,
}
# Those that hold in a lower precision, too. Its rounding differs with the shape of a batch, and decides near ties.
ANY_PRECISION = (RATIO_ONE, "masked prompt", "masked generate")
