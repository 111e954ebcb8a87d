# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What every pruned family shares below its head: a stock model that reads its prompt, plans the cuts, and runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput, can_return_tuple, logging

from .compat_learnpruner import CACHE, check_transformers, derive_method, output_with_records
from .configuration_learnpruner import check_pruner_field
from .cuts_learnpruner import Cut, LearnedScore, Schedule, check_schedule, learnpruner_schedule, watching
from .guards_learnpruner import refuse_decoder_inputs, refuse_lost_cache
from .keys_learnpruner import check_cache
from .plan_learnpruner import PruningCall, make_plan
from .prompt_learnpruner import MODALITIES, Prompt
from .rows_learnpruner import install_hooks
from .scores_learnpruner import LearnedPruningModule

logger = logging.get_logger(__name__)

# What `scheduled` blocks set for the calls of their own thread: pairs of a model and a schedule.
SCHEDULES: ContextVar[tuple[tuple[nn.Module, Schedule], ...]] = ContextVar("learnpruner_schedules", default=())


class PrunedModelMixin:
    """A stock vision-language model without its head, with a pruner, whose text model runs a schedule of cuts.

    A family says what its images come in and has the methods below that have no body.

    Attributes:
        pixel_arguments (`tuple[str, ...]`): Names of the stock forward's arguments that hold images.
        grid_arguments (`tuple[str, ...]`): Names of those that lay images out, each a row of integers.
        feature_arguments (`tuple[str, ...]`): Names of others that decide which features an image has.
    """

    pixel_arguments: tuple[str, ...]
    grid_arguments: tuple[str, ...]
    feature_arguments: tuple[str, ...] = ()

    @staticmethod
    def encoder_width(config: PreTrainedConfig) -> int:
        """Width of the features that the pruner reads."""

    def vision_kinds(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Placeholders, `(batch, sequence)` int8, as in [`Prompt`]."""

    def check_images(self, arguments: dict, prompt: Prompt) -> None:
        """Raises `ValueError` where images and what describes them do not fit; before any work."""

    def count_parts(self, arguments: dict) -> int:
        """How many parts of a call, images or groups of frames, have a budget of their own."""
        pixels = arguments.get("pixel_values")
        return 0 if pixels is None else len(pixels)

    def encode_images(self, arguments: dict, prompt: Prompt) -> dict:
        """The stock forward's arguments with encoded images in place of pixels."""

    def pruner_features(self, arguments: dict, prompt: Prompt) -> dict[str, list[torch.Tensor]]:
        """The vision encoder's features before the projector.

        Args:
            arguments: Encoded images (`mm_encoder_outputs`) and the family's `feature_arguments`.

        Returns:
            `dict[str, list[torch.Tensor]]`, each `(tokens, d)`: for each modality, in the order of the prompt, every
            part that has a budget of its own. Rows of NaN are structure, not patches.
        """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        derive_method(cls, PrunedModelMixin, "forward")

    def __init__(self, config):
        super().__init__(config)
        self._add_pruner()

    @classmethod
    def adopt(cls, model: nn.Module) -> "PrunedModelMixin":
        """Makes a stock model, whose configuration has the pruner's fields, one of this class, in place: it keeps its
        weights and gets a new pruner."""
        model.__class__ = cls
        model._add_pruner()
        return model

    def _add_pruner(self) -> None:
        check_transformers()
        install_hooks(self.language_model)
        self.pruner = LearnedPruningModule(self.encoder_width(self.config), self.config.pruner_hidden_size)
        # Right behind the vision tower: device_map="auto" fills devices in this order, and would offload the last. Not
        # before it: the first parameter's precision passes for the model's.
        tower = next(iter(self._modules))
        for name in [name for name in self._modules if name not in (tower, "pruner")]:
            self._modules[name] = self._modules.pop(name)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Refused: without its head the model has no way to check that every weight was found."""
        raise NotImplementedError(
            f"Load the class for conditional generation and take its `.model`, not {cls.__name__} itself."
        )

    def pruner_schedule(
        self, ratio: float | None = None, schedule: tuple[Cut, ...] | Schedule | None = None
    ) -> tuple[Cut, ...]:
        """The cuts of a call: those of `schedule`, or LearnPruner's at `ratio`, or those of the [`scheduled`] block
        around the call, or LearnPruner's at the configuration's ratio. At a ratio of 1 there are none.

        Raises:
            `ValueError`: where both are given, or one is not valid.
        """
        if schedule is None and ratio is None:
            schedule = next((each for model, each in reversed(SCHEDULES.get()) if model is self), None)
        if schedule is None:
            return learnpruner_schedule(self.config, ratio)
        check_asked(ratio, schedule)
        cuts = schedule if isinstance(schedule, tuple | list) else schedule.cuts(self)
        return check_schedule(cuts, self.config.text_config.num_hidden_layers)

    @contextmanager
    def scheduled(self, schedule: Schedule) -> Iterator[None]:
        """The block in which calls of this model that say nothing else run `schedule`; those of other threads do not."""
        token = SCHEDULES.set((*SCHEDULES.get(), (self, schedule)))
        try:
            yield
        finally:
            SCHEDULES.reset(token)

    def marks(self, token_id: int, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Where a special token stands, `(batch, sequence)` bool."""
        if input_ids is not None:
            return input_ids == token_id
        token = torch.full((), token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def read_prompt(self, arguments: dict, start: int = 0) -> Prompt:
        """Reads and checks all that the host must know of a prompt; the one place that does.

        Args:
            arguments (`dict`): The stock forward's.
            start (`int`): The first column of `input_ids` that this call runs; a cache holds those before it.

        Raises:
            `ValueError`: where the prompt, its images and what describes them do not fit.
        """
        kinds = self.vision_kinds(arguments.get("input_ids"), arguments.get("inputs_embeds"))
        mask = arguments.get("attention_mask")
        valid = None if mask is None else mask[:, -kinds.shape[1] :].bool()
        grids = {name: arguments[name] for name in self.grid_arguments if arguments.get(name) is not None}
        prompt = Prompt.read(kinds, valid, grids, arguments.get("mm_token_type_ids"), start)
        self.check_images(arguments, prompt)
        return prompt

    def has_images(self, arguments: dict) -> bool:
        """Whether a call has images or videos, as pixels or encoded."""
        pixels = (arguments.get(name) for name in self.pixel_arguments)
        if any(values is not None and len(values) > 0 for values in pixels):
            return True
        outputs = arguments.get("mm_encoder_outputs") or {}
        return any(outputs.get(modality) is not None for modality in MODALITIES)

    @can_return_tuple
    def forward(
        self,
        *,
        pruner_ratio: float | None = None,
        schedule: tuple[Cut, ...] | Schedule | None = None,
        query_mask: torch.Tensor | None = None,
        **stock,
    ) -> ModelOutput:
        """The stock forward; with images and a ratio below 1, the same on fewer tokens.

        Args:
            pruner_ratio, schedule, query_mask: As in the class with the head.
            stock: The stock model's arguments.

        Returns:
            The stock output, with the fields of [`Recorded`].
        """
        refuse_lost_cache(stock)
        call = stock.pop("pruning", None)  # of the head, which makes the output
        if call is not None:
            return self._run(call, stock)
        check_asked(pruner_ratio, schedule)
        cuts = self.pruner_schedule(pruner_ratio, schedule) if self.has_images(stock) else ()
        call = PruningCall(cuts, query_mask)
        outputs = self._run(call, stock)
        check_cache(outputs.get(CACHE), stock.get(CACHE), call)
        return output_with_records(type(outputs))(**outputs, **call.record.fields())

    def _run(self, call: PruningCall, stock: dict) -> ModelOutput:
        # Given both, the stock model says so.
        given = any(stock.get(name) is not None for name in self.pixel_arguments)
        if call.schedule and not (given and stock.get("mm_encoder_outputs")):
            use_cache = stock.get("use_cache")
            use_cache = self.config.text_config.use_cache if use_cache is None else use_cache
            refuse_decoder_inputs(self, stock, use_cache)
            if call.plan is None:
                stock = self._plan(call, stock)
            if call.acts:
                self._warn_if_untrained(call)
                stock["pruning"] = call
        return super().forward(**stock, return_dict=True)

    def _plan(self, call: PruningCall, stock: dict) -> dict:
        prompt = self.read_prompt(stock)
        pixels = {name: stock.get(name) for name in self.pixel_arguments}
        with watching(call.schedule, -1, lambda: self):
            stock = self.encode_images(stock, prompt)
        return {**stock, "mm_encoder_outputs": make_plan(call, self, {**stock, **pixels}, prompt)}

    def _warn_if_untrained(self, call: PruningCall) -> None:
        learned = any(isinstance(cut.score, LearnedScore) for cut in call.schedule)
        if learned and not self.config.pruner_trained and not call.soft:
            logger.warning_once(
                "The pruner is untrained: its first cut keeps arbitrary vision tokens. Train it "
                "(model.train_pruner_only()) or load a trained checkpoint."
            )


def check_asked(ratio: float | None, schedule: tuple[Cut, ...] | Schedule | None) -> None:
    """Raises `ValueError` where a call asks for what cannot be, whether or not it has images."""
    if ratio is not None:
        check_pruner_field("pruner_ratio", ratio)
        if schedule is not None:
            raise ValueError("Pass pruner_ratio or schedule, not both: a schedule says itself how much it keeps.")
