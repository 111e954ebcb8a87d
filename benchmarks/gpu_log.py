"""What the parts of benchmarks/gpu_proof.py share: the file that they write, and the tiny models that they check."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from learnpruner.doctor import run_check
from learnpruner.doctor_models import CheckError, TinyCase, build_case
from learnpruner.families import FAMILIES, model_class

from speed_sweep import save

NAMES = {config_class.base_model_type: config_class for config_class in FAMILIES}
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


class NotThereError(Exception):
    """What a check needs is not on this machine, or in this model."""


class Log:
    """What a part found, in a file.

    Args:
        file (`Path`): Written anew after each check.
    """

    def __init__(self, file: Path):
        self.file, self.found = file, {"checks": {}}

    def check(self, family: str, name: str, call: Callable[[], str | None]) -> None:
        """Notes whether a call returns (its result is the detail) or raises."""
        absent = []

        def guarded():
            try:
                return call()
            except NotThereError as error:
                absent.append(str(error))

        check, _ = run_check(family, name, guarded)
        result = "not there" if absent else "holds" if check.passed else "fails"
        detail = absent[0] if absent else check.detail
        self.found["checks"][f"{family}: {name}"] = {
            "family": family,
            "name": name,
            "result": result,
            "detail": " ".join(detail.split()) or result,
            "seconds": round(check.seconds, 2),
        }
        self.write()
        print(f"{family:12}{name:60}{result:11}{detail}", flush=True)

    def write(self) -> None:
        save(self.found, self.file)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases(log: Log, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, TinyCase]]:
    """Name of each family, and its tiny models; a model that cannot be built is a check that fails."""
    for name, config_class in NAMES.items():
        built, case = run_check(
            name, "", lambda config_class=config_class: build_case(model_class(config_class), device, dtype)
        )
        if built.passed:
            yield name, case
        else:
            log.check(name, f"models are built, {name_of(dtype)}", lambda built=built: fail(built.detail))


def fail(message: str) -> None:
    raise CheckError(message)
