# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""`learnpruner doctor`: whether pruning is right on the installed versions, by tiny random models of each family.

What a pruned model must equal is computed by *stock* models alone, through the public interface of transformers:
forward hooks on the stock decoder layers hide the keys of dropped tokens. No expected value comes from the code that is
judged.
"""

import platform
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import huggingface_hub
import torch
import transformers
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from .compat_learnpruner import CACHE
from .configuration_learnpruner import __version__
from .doctor_models import IMAGE, PLACEHOLDERS, CheckError, TinyCase, build_case
from .families import FAMILIES, model_class

# Greedy steps of every answer.
STEPS = 8
# How far float32 logits may be from the masked stock model's, and how far masking must at least move them: a check that
# hides tokens which do not matter would prove nothing.
TOLERANCE, MOVED = 1e-4, 1e-2
# Of a report's lines; names of files are not broken.
WIDTH, WHOLE = 120, {"break_long_words": False, "break_on_hyphens": False}


@dataclass
class Check:
    """The result of one check.

    Attributes:
        family (`str`): `model_type` of the stock family.
        name (`str`): What was checked.
        passed (`bool`).
        detail (`str`): What was measured, or what is wrong, in one line.
        seconds (`float`): Wall clock.
    """

    family: str
    name: str
    passed: bool
    detail: str
    seconds: float


@dataclass
class Report:
    """What [`doctor`] found; `str(report)` is a table with a verdict.

    Attributes:
        checks (`list[Check]`).
        versions (`dict[str, str]`): Of learnpruner, transformers, torch, huggingface_hub, Python and the platform.
        tested (`str`): The range of transformers that this learnpruner was released for, such as `>=5.20,<6`.
    """

    checks: list[Check]
    versions: dict[str, str]
    tested: str

    @property
    def passed(self) -> bool:
        """Whether checks ran, and all passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def __str__(self) -> str:
        rows = [("family", "check", "result", "seconds")]
        rows += [
            (check.family, check.name, "pass" if check.passed else "FAIL", f"{check.seconds:.1f}")
            for check in self.checks
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        head, *starts = (f"{a:{widths[0]}}  {b:{widths[1]}}  {c:{widths[2]}}  {d:>7}  " for a, b, c, d in rows)
        lines = [f"{name:16}{value}" for name, value in self.versions.items()]
        lines += ["", f"{head}detail"]
        seen = {}
        for start, check in zip(starts, self.checks):
            # One cause may fail many checks: it is written out once.
            first = seen.setdefault(check.detail, f"{check.family}, {check.name}")
            repeated = not check.passed and first != f"{check.family}, {check.name}"
            detail = f"as in {first}" if repeated else check.detail
            indent = " " * len(start)
            wrapped = textwrap.wrap(detail, WIDTH, initial_indent=start, subsequent_indent=indent, **WHOLE)
            lines += wrapped or [start.rstrip()]
        return "\n".join([*lines, "", *self._verdict()])

    def _verdict(self) -> list[str]:
        release = self.versions["transformers"]
        within = SpecifierSet(self.tested).contains(release, prereleases=True)
        seconds = sum(check.seconds for check in self.checks)
        if self.passed:
            note = "" if within else f" transformers {release} is outside the tested range {self.tested}."
            return [f"PASS: all {len(self.checks)} checks passed in {seconds:.0f} s.{note}"]
        failed = sum(not check.passed for check in self.checks)
        if within:
            pin = (
                f"transformers {release} is within the range that this learnpruner requires. Install both in a fresh "
                f"environment, or try an older transformers, and run `learnpruner doctor` again."
            )
        else:
            pin = f"Install a transformers that was tested: pip install 'transformers{self.tested}'"
        unpruned = {check.family for check in self.checks if check.name == RATIO_ONE and check.passed}
        if unpruned == {check.family for check in self.checks}:
            off = "Until then, run with pruner_ratio=1.0, which switches pruning off and passed its checks here."
        else:
            off = "Until then, use the stock model class: with pruner_ratio=1.0 not every family passes here, either."
        return [
            f"FAIL: {failed} of {len(self.checks)} checks failed in {seconds:.0f} s. Do not trust pruned answers of "
            "these versions.",
            "What to do:",
            f"- {pin}",
            f"- {off}",
            "- Report it to the developers of learnpruner, with this whole output.",
        ]


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
    causal = torch.ones(length, length, dtype=torch.bool).tril()

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
            mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
            handles.append(layer.register_forward_pre_hook(hook(mask), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _oracle(case: TinyCase, kept_mask, answer: torch.Tensor, masked: bool = True) -> torch.Tensor:
    """Logits of the stock model at full length and without a cache, over the batch and `answer` behind it."""
    whole = _with_answer(case.batch, answer)
    kept_mask = [F.pad(kept, (0, answer.shape[1]), value=True) for kept in kept_mask]
    if not masked:
        return case.stock(**whole, use_cache=False).logits
    cuts = (0, case.pruned.config.pruner_layer)
    with _hiding(case.stock, whole["attention_mask"], kept_mask, cuts):
        return case.stock(**whole, use_cache=False).logits


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckError(message)


def _compare(logits: torch.Tensor, expected: torch.Tensor, what: str) -> float:
    difference = (logits - expected).abs().max().item()
    # Written so that NaN fails.
    _require(difference <= TOLERANCE, f"{what} differ by up to {difference:.1e}, more than {TOLERANCE:.0e}.")
    return difference


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
    difference = _compare(outputs.logits[rows], expected[rows], "Logits of the prompt and of the masked stock model")
    moved = (_oracle(case, kept_mask, nothing, masked=False) - expected)[rows].abs().max().item()
    _require(moved > MOVED, f"Masking moved no logit by more than {moved:.1e}: this check proves nothing.")
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
    expected = _oracle(case, kept_mask, answer)[:, first:-1]
    difference = _compare(logits, expected, f"Logits of {STEPS} cached steps and of the masked stock model")
    unmasked = _oracle(case, kept_mask, answer, masked=False)[:, first:-1]
    moved = (unmasked - expected).abs().amax(dim=(0, 2)).min().item()
    _require(moved > MOVED, f"Masking moved a step's logits by {moved:.1e} only: this check proves nothing.")
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


def _run(family: str, name: str, check: Callable):
    """Runs a check, and says how it went; an exception is its failure."""
    start, result = time.perf_counter(), None
    try:
        result = check()
        passed, detail = True, result if isinstance(result, str) else ""
    except CheckError as error:
        passed, detail = False, str(error)
    except Exception as error:  # of any kind: on versions that do not fit, anything may be raised
        place = traceback.extract_tb(error.__traceback__)[-1]
        # The file within its package, not where this user has it.
        where = Path(*Path(place.filename).parts[-3:]).as_posix()
        message = " ".join(str(error).split())
        passed, detail = False, f"{type(error).__name__}: {message} ({where}:{place.lineno}, in {place.name})"
    return Check(family, name, passed, detail, time.perf_counter() - start), result


def _tested() -> str:
    """As this package requires it: `>=5.20,<6`; empty where it was not installed, but put on the path."""
    try:
        requirements = metadata.requires("learnpruner") or ()
    except metadata.PackageNotFoundError:
        return ""
    specifiers = (each.specifier for each in map(Requirement, requirements) if each.name == "transformers")
    return ",".join(sorted(map(str, next(specifiers, ())), reverse=True))


def doctor(families: Sequence[str] | None = None) -> Report:
    """Checks the installed versions: takes seconds on a CPU, downloads nothing and writes no file.

    For each family, a tiny model of random weights must equal the stock model at a ratio of 1; pruned, it must equal
    the stock model from which the dropped tokens are hidden, in the prompt and in each step of `generate`; and a padded
    batch must equal its samples alone. Progress is shown on stderr.

    Args:
        families (`Sequence[str]`, *optional*): Stock `model_type`s, such as `"llava"`. Defaults to all.

    Returns:
        [`Report`]: Whatever is wrong with the installed versions is a failed check in it.

    Raises:
        `ValueError`: where a family is unknown, or none is given.
    """
    known = {config_class.base_model_type: config_class for config_class in FAMILIES}
    families = list(known) if families is None else list(families)
    if not families or not set(families) <= set(known):
        raise ValueError(f"There are no families {families}: choose from {list(known)}.")
    versions = {
        "learnpruner": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "huggingface_hub": huggingface_hub.__version__,
        "Python": platform.python_version(),
        "platform": platform.platform(),
    }
    checks = []
    # The caller's random numbers go on as if nothing had happened.
    with (
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        logging.tqdm(total=len(families) * (len(CHECKS) + 1), desc="doctor", leave=False) as progress,
    ):
        for name in families:
            progress.set_postfix_str(name)
            built, case = _run(
                name, "models are built", lambda config_class=known[name]: build_case(model_class(config_class))
            )
            progress.update()
            if not built.passed:
                checks.append(built)
            for title, check in CHECKS.items() if built.passed else ():
                checks.append(_run(name, title, lambda check=check, case=case: check(case))[0])
                progress.update()
    return Report(checks, versions, _tested())
