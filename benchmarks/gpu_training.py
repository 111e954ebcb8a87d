"""Training steps of benchmarks/gpu_proof.py: of tiny models of each family, and of a model of 7B parameters."""

import copy
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, PreTrainedModel

from learnpruner.doctor_models import BUILDERS, SIDE, TinyCase

from gpu_log import BFLOAT16, FLOAT32, Log, cases, fail, name_of
from speed_measure import peak_memory, summarise, timed
from speed_presets import PRESETS, Preset, build_inputs, build_pair, check_fits, stock_model

# How the gradient of float32 may differ, relative to its length, where the same is computed in another way.
TOLERANCE = 1e-4
# Tokens of an answer in the batches of tiny models.
ANSWER = 4
CHECKPOINTING = {"no checkpointing": None, "reentrant checkpointing": True, "non-reentrant checkpointing": False}
# sdpa's kernels; where one cannot run, the plain one does.
KERNELS = {
    "cuda": (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION),
    "cpu": (SDPBackend.FLASH_ATTENTION,),
}
# Of a step of 7B: rounds that count, text tokens of the prompt, and those of them that are the answer.
ROUNDS, TEXT, TAUGHT = 6, 324, 60


def training_cases(log: Log, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, TinyCase]]:
    """As [`cases`], with smaller weights: gates far from 0 and 1, and answers that are not absurdly wrong, so that
    rounding in bfloat16 is a hundredth of the gradient, and not most of it."""
    for family, case in cases(log, device, dtype):
        with torch.no_grad():
            for name, weight in case.pruned.named_parameters():
                if weight.dim() > 1:
                    weight.mul_(0.1 if ".pruner." in name else 0.5)
        yield family, case


def set_checkpointing(model: PreTrainedModel, reentrant: bool | None) -> None:
    """`None` leaves the model as it is made, without."""
    if reentrant is not None:
        name = "activation_checkpointing_enable"  # up to transformers 5.22 the other
        getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": reentrant})


def gradient(case: TinyCase, reentrant: bool | None, dtype: torch.dtype | None = None) -> tuple[float, torch.Tensor]:
    """Loss, and the pruner's gradient as one float32 vector, of a training step by the public interface, on a copy."""
    model = copy.deepcopy(case.pruned)
    if dtype is not None:
        model.to(dtype)
    model.train_pruner_only()
    model.train()
    set_checkpointing(model, reentrant)
    labels = case.batch["input_ids"].clone()
    labels[:, :-ANSWER] = -100
    loss = model(**case.batch, labels=labels).loss
    loss.backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    if without := [name for name, grad in trained.items() if grad is None]:
        fail(f"No gradient reached {without}.")
    whole = torch.cat([grad.float().flatten() for grad in trained.values()])
    if not (torch.isfinite(loss) and torch.isfinite(whole).all() and whole.any()):
        fail(f"The loss is {loss.item()}, and the gradient's length {whole.norm().item()}.")
    optimizer = torch.optim.AdamW([model.get_parameter(name) for name in trained])
    optimizer.step()
    if not all(torch.isfinite(model.get_parameter(name)).all() for name in trained):
        fail("The optimizer's step left weights that are no numbers.")
    return loss.item(), whole


def training(device: torch.device, log: Log, dtype: torch.dtype) -> None:
    """A step without checkpointing, and with that of both kinds: as near to float32's gradient as without."""
    for family, case in training_cases(log, device, dtype):
        plain = {}

        def run(reentrant, case=case, plain=plain):
            loss, found = gradient(case, reentrant)
            if reentrant is None:
                exact = found if dtype == FLOAT32 else gradient(case, None, FLOAT32)[1]
                plain.update(exact=exact, own=(found - exact).norm() / exact.norm())
                return f"loss {loss:.3f}, gradient {found.norm():.1e}, {plain['own']:.0e} from float32's"
            if not plain:
                fail("The step without checkpointing failed: there is no gradient to compare with.")
            return compare_gradients(found, plain["exact"], plain["own"])

        for title, reentrant in CHECKPOINTING.items():
            log.check(
                family, f"training, {title}, {name_of(dtype)}", lambda reentrant=reentrant, run=run: run(reentrant)
            )


def compare_gradients(found: torch.Tensor, exact: torch.Tensor, own: torch.Tensor) -> str:
    """Raises [`CheckError`] where a gradient is further from the exact one than rounding, `own`, explains."""
    difference, limit = ((found - exact).norm() / exact.norm()).item(), max(TOLERANCE, 2 * own.item())
    if not difference <= limit:
        fail(f"The gradient is {difference:.1e} from float32's, more than {limit:.0e}.")
    return f"gradient {difference:.0e} from float32's, of {limit:.0e} that may be"


def kernels(device: torch.device, log: Log) -> None:
    """A bfloat16 step with each kernel of sdpa first in order; with the plain one alone, its own rounding."""
    for family, case in training_cases(log, device, BFLOAT16):

        def run(kernel, case=case):
            exact = gradient(case, None, FLOAT32)[1]
            with sdpa_kernel(SDPBackend.MATH):
                own = (gradient(case, None)[1] - exact).norm() / exact.norm()
            with sdpa_kernel([kernel, SDPBackend.MATH], set_priority=True):
                return compare_gradients(gradient(case, None)[1], exact, own)

        for kernel in KERNELS[device.type]:
            log.check(
                family, f"training, {kernel.name.lower()} of sdpa, bfloat16", lambda kernel=kernel, run=run: run(kernel)
            )


def tiny_preset() -> Preset:
    config = AutoConfig.for_model("llava", **BUILDERS["llava"]().config)
    return Preset(lambda: config, (SIDE, SIDE))


def step(device: torch.device, log: Log) -> None:
    """Seconds and memory of a training step of a 7B-shaped model: forward, backward and optimizer, of the pruner."""
    name = "llava-1.5-7b" if device.type == "cuda" else "tiny"
    preset = PRESETS[name] if device.type == "cuda" else tiny_preset()
    with torch.device("meta"):
        check_fits(stock_model(preset.config(), BFLOAT16), device)
    _, model = build_pair(preset.config(), device, BFLOAT16)
    model.train_pruner_only()
    model.train()
    for batch, (title, reentrant) in zip((1, 4, 4), CHECKPOINTING.items()):

        def run(batch=batch, title=title, reentrant=reentrant):
            set_checkpointing(model, reentrant)
            measured = measure_step(model, preset, batch)
            log.found.setdefault("steps", {})[title] = {
                "preset": name,
                "batch_size": batch,
                "checkpointing": title,
                **measured,
            }
            return f"{measured['seconds']['median']:.3f} s"

        log.check("llava", f"a step of {name}, batch {batch}, {title}", run)


def measure_step(model: PreTrainedModel, preset: Preset, batch: int) -> dict:
    device = model.device
    inputs = build_inputs(preset.config(), preset.image, batch, TEXT, device, BFLOAT16)
    labels = inputs["input_ids"].clone()
    labels[:, :-TAUGHT] = -100
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)

    def one() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        return loss

    one()
    peak = peak_memory(one, device)
    seconds, losses = zip(*(timed(one, device) for _ in range(ROUNDS)))
    if not all(torch.isfinite(loss) for loss in losses):
        fail(f"The loss is {[loss.item() for loss in losses]}.")
    return {
        "ratio": model.config.pruner_ratio,
        "image_tokens": int((inputs["input_ids"][0] == model.config.image_token_id).sum()),
        "text_tokens": TEXT,
        "answer_tokens": TAUGHT,
        "dtype": name_of(BFLOAT16),
        "rounds": ROUNDS,
        "seconds": {name: float(f"{value:.4g}") for name, value in summarise(list(seconds)).items()},
        "weights_bytes": sum(weight.nbytes for weight in model.parameters()),
        "peak_memory_bytes": peak,
    }
