"""One part of the proof on a GPU, in a process of its own; benchmarks/gpu.py runs them all.

    python benchmarks/gpu_proof.py equality --device cuda --output FILE.json

Tiny random models of each family are checked as by `learnpruner doctor`, on the device. The file is written after each
check, so that what was found before a crash or the end of the time is kept.
"""

import logging
import platform
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

import learnpruner
from learnpruner.doctor_checks import ANY_PRECISION, CHECKS, RATIO_ONE
from learnpruner.doctor_models import PLACEHOLDERS, TinyCase
from learnpruner.hub_cards.records import code_digest
from learnpruner_commands.arguments import Parser

from gpu_log import BFLOAT16, FLOAT32, Log, NotThereError, cases, fail, name_of
from gpu_training import kernels, step, training
from speed import device as device_argument
from speed_sweep import code_files, device_name, save

FLASH_KERNEL = "the flash kernel of sdpa"
# By precision: flash attention takes no float32.
BACKENDS = {BFLOAT16: (FLASH_KERNEL, "flash_attention_2"), FLOAT32: ("eager", "flex_attention")}
# On the prompt, and in each step of an answer.
MASKED = ("masked prompt", "masked generate")


def about(device: torch.device) -> dict:
    """What all that is found depends on. Raises `ValueError` where the device is not there."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"torch {torch.__version__} finds no GPU. DEVICE=cpu runs everything through with tiny shapes; that proves "
            "the scripts, and is no record."
        )
    files = sorted([*code_files(), *Path(__file__).parent.glob("gpu*.py")], key=lambda file: file.name)
    versions = {
        "learnpruner": learnpruner.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        versions["cuda"] = torch.version.cuda
    return {
        "device": device_name(device),
        "device_type": device.type,
        "versions": versions,
        "code_sha256": code_digest(files),
    }


@torch.no_grad()
def equality(device: torch.device, log: Log) -> None:
    """Ratio 1 against the stock model, the masked oracle, and in float32 a batch against its rows."""
    for dtype in (FLOAT32, BFLOAT16):
        for family, case in cases(log, device, dtype):
            for title in CHECKS if dtype == FLOAT32 else ANY_PRECISION:
                log.check(family, f"{title}, {name_of(dtype)}", lambda title=title, case=case: CHECKS[title](case))


@contextmanager
def counted(device: torch.device) -> Iterator[list[str]]:
    """A list that grows by the place of each wait for the device, as CUDA's sync debug mode sees them."""
    waits = []

    def show(message, category, filename, lineno, file=None, line=None):
        if "called a synchronizing CUDA operation" in str(message):
            waits.append(f"{Path(filename).name}:{lineno}")

    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = show
            yield waits
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits_of(model: PreTrainedModel, call: Callable[[PreTrainedModel], object]) -> tuple[list[str], list[str]]:
    """Places where a call waits, and those of them inside the decoder's layers; the first run does not count."""
    text, marks = model.get_decoder(), []
    with counted(model.device):
        call(model)
    with counted(model.device) as waits:
        hooks = [
            text.layers[0].register_forward_pre_hook(lambda *_: marks.append(len(waits))),
            text.norm.register_forward_pre_hook(lambda *_: marks.append(len(waits))),
        ]
        try:
            call(model)
        finally:
            for hook in hooks:
                hook.remove()
        found = list(waits)
    inside = [place for start, end in zip(marks[::2], marks[1::2]) for place in found[start:end]]
    return found, inside


def compare_waits(case: TinyCase, call: Callable[[PreTrainedModel], object], more: int) -> str:
    """Raises [`CheckError`] where the pruned model waits inside its layers, or by more than `more` beyond stock."""
    (stock, _), (pruned, inside) = (waits_of(model, call) for model in (case.stock, case.pruned))
    said = f"stock waits {len(stock)} times, the pruned model {len(pruned)} times"
    places = ", ".join(f"{place} ({count})" for place, count in Counter(pruned).items())
    if inside:
        fail(f"{said}, {len(inside)} of them inside the decoder's layers: {', '.join(sorted(set(inside)))}.")
    if len(pruned) > len(stock) + more:
        fail(f"{said}, where {more} more are planned: {places}.")
    return f"{said}: {places}" if places else said


@torch.no_grad()
def waits(device: torch.device, log: Log) -> None:
    """Waits of the host: in a forward as many as stock's, in `generate` one more, and none inside the layers."""
    calls = {"forward": (0, lambda model, inputs: model(**inputs))}
    for steps in (1, 4):
        arguments = {"max_new_tokens": steps, "do_sample": False, "suppress_tokens": PLACEHOLDERS}
        calls[f"generate, max_new_tokens={steps}"] = (
            1,
            lambda model, inputs, a=arguments: model.generate(**inputs, **a),
        )

    def run(case, call, more):
        if device.type != "cuda":
            raise NotThereError("Waits are counted by CUDA's sync debug mode, on a GPU.")
        return compare_waits(case, lambda model: call(model, case.batch), more)

    for family, case in cases(log, device, BFLOAT16):
        for name, (more, call) in calls.items():
            log.check(family, f"host waits, {name}", lambda case=case, call=call, more=more: run(case, call, more))


@torch.no_grad()
def backends(device: torch.device, log: Log) -> None:
    """Ratio 1 and the masked oracle with other attention in the language model, flash and flex where they are there."""
    for dtype, names in BACKENDS.items():
        for family, case in cases(log, device, dtype):
            for name in names:
                label = f"ratio 1 and masked, {name}, {name_of(dtype)}"
                log.check(family, label, lambda case=case, name=name: with_backend(case, name))


def same_prompt(case: TinyCase) -> str:
    if not torch.equal(case.pruned(**case.batch, pruner_ratio=1.0).logits, case.stock(**case.batch).logits):
        fail("Logits are not those of the stock class.")
    return "logits are the stock's, bit for bit"


def with_backend(case: TinyCase, name: str) -> str:
    """Both models on a backend at a ratio of 1; then the pruned one alone, since what hides tokens is for sdpa."""
    if name == FLASH_KERNEL:
        # It takes no mask, which only padding needs.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
            return "; ".join(CHECKS[title](replace(case, batch=case.rows[0])) for title in ANY_PRECISION)
    if name == "flex_attention" and case.stock.device.type == "cpu":
        raise NotThereError("It is compiled, which needs Python's headers on a CPU: checked on a GPU.")
    try:
        for model in (case.stock, case.pruned):
            model.set_attn_implementation({"text_config": name, "vision_config": "sdpa"})
    except (ImportError, OSError, ValueError) as error:  # not installed, or not for this model; nothing is fetched
        raise NotThereError(str(error)) from error
    try:
        # Flex is compiled anew for each length: a prompt has three, and each step of an answer three more.
        compiled = name == "flex_attention"
        found = same_prompt(case) if compiled else CHECKS[RATIO_ONE](case)
        case.stock.set_attn_implementation("sdpa")
        return "; ".join([found, *(CHECKS[title](case) for title in MASKED[: 1 if compiled else None])])
    finally:
        for model in (case.stock, case.pruned):
            model.set_attn_implementation("sdpa")


PARTS: dict[str, Callable[[torch.device, Log], None]] = {
    "equality": equality,
    "waits": waits,
    "training-float32": lambda device, log: training(device, log, FLOAT32),
    "training-bfloat16": lambda device, log: training(device, log, BFLOAT16),
    "step": step,
    "backends": backends,
    "kernels": kernels,
}
ABOUT = "about"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=(ABOUT, *PARTS))
    parser.add_argument("--device", type=device_argument, required=True, help="cpu, cuda or cuda:N")
    parser.add_argument("--output", type=Path, required=True, help="a .json file")
    arguments = parser.parse_args(argv)
    logging.getLogger("learnpruner").setLevel(logging.ERROR)
    # Convolutions in float32, as its checks are exact; CUDA's default is less.
    torch.backends.cudnn.allow_tf32 = False
    try:
        if arguments.part == ABOUT:
            save(about(arguments.device), arguments.output)
            return 0
        log = Log(arguments.output)
        PARTS[arguments.part](arguments.device, log)
    except (OSError, ValueError) as error:
        print(f"gpu_proof: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    failed = [name for name, check in log.found["checks"].items() if check["result"] == "fails"]
    if failed:
        print(
            f"gpu_proof: {len(failed)} of {len(log.found['checks'])} checks fail: {'; '.join(failed)}", file=sys.stderr
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
