# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The cut of one method before the decoder, with the cuts of another inside."""

from dataclasses import dataclass, field, replace

from torch import nn

from .base import Method, Place
from .learnpruner import LearnedStage, TextStage


@dataclass(unsafe_hash=True)
class Composed(Method):
    """One method's cut before the decoder, then another's inside it, such as LearnPruner's stage 1 with FastV's cut, or
    VisionZip's with LearnPruner's stage 2. `Composed()` is LearnPruner.

    Args:
        first ([`Method`] or `str`): One that cuts before the decoder alone, or its name in `METHODS`.
        second ([`Method`] or `str`): One that cuts inside it alone. Ratio and accounting of the two are not looked at.
        stage_ratio (`float`, *optional*): Tokens that the first cut leaves, in proportion to those that the next does.
            Defaults to the model's `pruner_stage_ratio`.
    """

    first: Method | str = field(default_factory=LearnedStage)
    second: Method | str = field(default_factory=TextStage)
    stage_ratio: float | None = None

    def __post_init__(self):
        super().__post_init__()
        self.first, self.second = _method(self.first), _method(self.second)

    @property
    def revision(self) -> int:
        """Changes with that of either part."""
        return self.first.revision + self.second.revision - 1

    def check(self, model: nn.Module) -> None:
        self.first.check(model)
        self.second.check(model)

    def places(self, model: nn.Module) -> tuple[Place, ...]:
        first, second = self.first.places(model), self.second.places(model)
        if [place.layer for place in first] != [0] or not second or second[0].layer == 0:
            raise ValueError(
                f"Composed takes a method that cuts before the decoder and one that cuts inside: "
                f"{type(self.first).__name__} cuts before the layers {[place.layer for place in first]}, "
                f"{type(self.second).__name__} before {[place.layer for place in second]}."
            )
        stage_ratio = model.config.pruner_stage_ratio if self.stage_ratio is None else self.stage_ratio
        return (replace(first[0], weight=stage_ratio * second[0].weight), *second)


def _method(part: Method | str) -> Method:
    from . import METHODS  # it lists Composed, too

    if isinstance(part, str) and part in METHODS:
        return METHODS[part]()
    if not isinstance(part, Method):
        raise ValueError(f"Composed takes methods or their names, {', '.join(METHODS)}; got {part!r}.")
    return part
