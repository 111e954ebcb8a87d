# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What every pruned family shares below its head: a stock model that reads its prompt, plans the cuts, and runs."""

from contextvars import ContextVar
from functools import partial
from weakref import ref

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput, can_return_tuple, is_torchdynamo_exporting, logging

from .compat_learnpruner import CACHE, TEXT_MODELS, check_transformers, derive_forward, output_with_records
from .configuration_learnpruner import check_pruner_field
from .cuts_learnpruner import Cut, Schedule, check_schedule, learnpruner_schedule, watching
from .guards_learnpruner import refuse_decoder_inputs, refuse_lost_cache, refuse_training
from .keys_learnpruner import check_cache
from .plan_learnpruner import PruningCall, make_plan
from .prompt_learnpruner import MODALITIES, Prompt
from .rows_learnpruner import install_hooks
from .scores_learnpruner import LearnedPruningModule

logger = logging.get_logger(__name__)
# What `with method(model):` sets for the calls of its own thread: pairs of a model and a schedule.
SCHEDULES: ContextVar[tuple[tuple[nn.Module, Schedule], ...]] = ContextVar("learnpruner_schedules", default=())


@torch.compiler.assume_constant_result  # a strict export traces no ContextVar
def open_blocks() -> tuple[tuple[nn.Module, Schedule], ...]:
    return SCHEDULES.get()


def mark_trained(model: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """A pruner that comes with a state dict, a resumed one's or an adapter's, was trained."""
    model.config.pruner_trained |= any(name.startswith(f"{prefix}pruner.") for name in state_dict)


class Gradients:
    """Whether the pruner of a model gets the gradients that are `wanted`. A copy knows nothing of them yet."""

    def __init__(self):
        self.wanted, self.came, self.told = True, False, False
        self.hooks: list[ref] = []  # of calls that have brought none so far

    def __reduce__(self):
        return Gradients, ()

    @torch.compiler.disable
    def expect(self, gates: torch.Tensor, config: PreTrainedConfig) -> None:
        """Marks `config` as trained as soon as `gates` get a gradient. Warns where those of an earlier call never got
        one, nor will: their hooks live as long as the graph that they belong to, or an output that is kept."""

        def arrive(gradient: torch.Tensor) -> None:
            self.came = config.pruner_trained = True
            self.hooks.clear()

        if not (self.came or self.told) and any(hook() is None for hook in self.hooks):
            self.told = True
            logger.warning(
                "The pruner is to be trained, and an earlier training forward gave it no gradient: does the loss come "
                "from the model's outputs? To leave it as it is, call model.model.pruner.requires_grad_(False)."
            )
        gates.register_hook(arrive)
        self.hooks.append(ref(arrive))


class PrunedModelMixin:
    """A stock vision-language model without its head, with a pruner, whose text model runs a schedule of cuts.

    A family has the methods that are without a body here, and names the stock forward's arguments that matter.
    """

    pixel_arguments: tuple[str, ...]  # those that hold images or videos
    grid_arguments: tuple[str, ...]  # those that lay them out, each a row of integers
    feature_arguments: tuple[str, ...] = ()  # those that decide which features they have
    image_layout: str | None = None  # of `grid_arguments` an image processor's, where an image is more than one crop

    @staticmethod
    def encoder_width(config: PreTrainedConfig) -> int:
        """Width of the features that the pruner reads."""

    def vision_kinds(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Placeholders, `(batch, sequence)` int8, as in [`Prompt`]."""

    def check_positions(self, arguments: dict) -> None:
        """Raises `ValueError` where positions are left to the model, and it could not find them."""

    def check_images(self, arguments: dict, prompt: Prompt) -> None:
        """Raises `ValueError` where images and what describes them do not fit, before any work."""

    def count_parts(self, arguments: dict) -> int:
        """How many parts of a call, images or groups of frames, have a budget of their own."""
        pixels = arguments.get("pixel_values")
        return 0 if pixels is None else len(pixels)

    def encode_images(self, arguments: dict, prompt: Prompt) -> dict:
        """The stock forward's arguments with encoded images in place of pixels."""

    def encoder_features(self, arguments: dict) -> dict[str, torch.Tensor]:
        """For each modality, the features before the projector in `mm_encoder_outputs`, a row for each patch."""

    def lay_out(self, modality: str, values: torch.Tensor, arguments: dict, prompt: Prompt) -> list[torch.Tensor]:
        """Values of patches, as `encoder_features` has them, in the prompt's order: `(tokens, d)` of each part that has
        a budget of its own. Rows of NaN are structure, not patches."""

    def grids(self, modality: str, arguments: dict, prompt: Prompt) -> list[list[tuple[int, int]]]:
        """Rows and columns of each part's grids; empty where they are unknown. Where a part has more tokens than that,
        each row of its last grid ends in structure."""

    @staticmethod
    def first_image(inputs: dict, image_processor) -> torch.Tensor:
        """What the tower sees of the first image that a processor returned, `(height, width, 3)`, normalized."""

    @staticmethod
    def token_side(processor) -> int:
        """Pixels of one side of what a vision token stands for."""

    def pruner_features(self, arguments: dict, prompt: Prompt) -> dict[str, list[torch.Tensor]]:
        """What the pruner reads: of each modality the features, laid out."""
        features = self.encoder_features(arguments)
        return {modality: self.lay_out(modality, values, arguments, prompt) for modality, values in features.items()}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        derive_forward(cls, PrunedModelMixin)

    def __init__(self, config):
        super().__init__(config)
        self._add_pruner()

    @classmethod
    def adopt(cls, model: nn.Module) -> "PrunedModelMixin":
        """Makes a stock model one of this class, in place; its configuration has the pruner's fields."""
        model.__class__ = cls
        model._add_pruner()
        return model

    def _add_pruner(self) -> None:
        check_transformers()
        text_type = self.config.text_config.model_type
        if text_type not in TEXT_MODELS:
            raise ValueError(f"Pruning runs over the text models {TEXT_MODELS}; this checkpoint has {text_type!r}.")
        install_hooks(self.language_model)
        self.pruner = LearnedPruningModule(self.encoder_width(self.config), self.config.pruner_hidden_size)
        self.gradients = Gradients()
        # Right behind the vision tower: device_map="auto" fills devices in this order, and would offload the last. Not
        # before it: the first parameter's precision passes for the model's.
        for name in [name for name in list(self._modules)[1:] if name != "pruner"]:
            self._modules[name] = self._modules.pop(name)
        self.register_load_state_dict_pre_hook(mark_trained)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Refused: without its head the model has no way to check that every weight was found."""
        raise NotImplementedError(f"Load the class for conditional generation and take its `.model`, a {cls.__name__}.")

    def pruner_schedule(
        self, ratio: float | None = None, schedule: tuple[Cut, ...] | Schedule | None = None
    ) -> tuple[Cut, ...]:
        """The cuts of a call: those of `schedule`, or LearnPruner's at `ratio`, or those of the block of a method
        around the call, or LearnPruner's at the configuration's ratio. At a ratio of 1 there are none."""
        check_asked(ratio, schedule)
        if schedule is None and ratio is None:
            blocks = open_blocks() if is_torchdynamo_exporting() else SCHEDULES.get()
            schedule = next((each for model, each in reversed(blocks) if model is self), None)
        if schedule is None:
            return learnpruner_schedule(self.config, ratio)
        cuts = schedule if isinstance(schedule, tuple | list) else schedule.cuts(self)
        return check_schedule(cuts, self.config.text_config.num_hidden_layers)

    def marks(self, token_id: int, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Where a special token stands, `(batch, sequence)` bool."""
        if input_ids is not None:
            return input_ids == token_id
        token = torch.full((), token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def read_prompt(self, arguments: dict, start: int = 0) -> Prompt:
        """The one place that reads and checks what the host must know of a prompt, whose first `start` columns a cache
        holds. Raises `ValueError` where the prompt, its images and what describes them do not fit."""
        self.check_positions(arguments)
        kinds = self.vision_kinds(arguments.get("input_ids"), arguments.get("inputs_embeds"))
        mask = arguments.get("attention_mask")
        valid = None if mask is None else mask[:, -kinds.shape[1] :].bool()
        grids = {name: arguments[name] for name in self.grid_arguments if arguments.get(name) is not None}
        prompt = Prompt.read(kinds, valid, grids, arguments.get("mm_token_type_ids"), start)
        self.check_images(arguments, prompt)
        return prompt

    def has_images(self, arguments: dict) -> bool:
        """Whether a call has images or videos, as pixels or encoded."""
        encoded = arguments.get("mm_encoder_outputs") or {}
        pixels = [arguments[name] for name in self.pixel_arguments if arguments.get(name) is not None]
        return any(map(len, pixels)) or any(encoded.get(modality) is not None for modality in MODALITIES)

    @can_return_tuple
    def forward(
        self,
        *,
        pruner_ratio: float | None = None,
        schedule: tuple[Cut, ...] | Schedule | None = None,
        query_mask: torch.Tensor | None = None,
        **stock,
    ) -> ModelOutput:
        """The stock forward, on fewer tokens where there are images and a ratio below 1. Arguments and output are the
        stock model's, with what the class with the head adds."""
        refuse_lost_cache(stock)
        call = stock.pop("pruning", None)  # of the head, which makes the output
        if call is not None:
            return self._run(call, stock)
        cuts = self.pruner_schedule(pruner_ratio, schedule) if self.has_images(stock) else ()
        call = PruningCall(cuts, query_mask)
        outputs = self._run(call, stock)
        check_cache(outputs.get(CACHE), stock.get(CACHE), call)
        return output_with_records(type(outputs))(**outputs, **call.records())

    def trains_pruner(self) -> bool:
        """Whether the pruner is to be trained: then a call gates its vision tokens in place of cutting them."""
        if not self.training:  # at once: each decoded token asks
            return False
        if not (parameters := [*self.pruner.parameters()]):
            raise ValueError("The pruner has no parameters of its own: with FSDP1, pass use_orig_params=True.")
        # PEFT freezes what it switches off, for a policy's reference: it is the same kind of model as the policy.
        if not any(getattr(module, "disable_adapters", False) for module in self.pruner.modules()):
            self.gradients.wanted = any(parameter.requires_grad for parameter in parameters)
        if self.gradients.wanted and parameters[0].is_meta:
            raise ValueError("The pruner is offloaded and cannot be trained: model.model.pruner.requires_grad_(False).")
        plain = all(type(layer) is nn.Linear for layer in (self.pruner.hidden, self.pruner.output))
        if self.gradients.wanted and not plain and not self.config.pruner_trained:
            raise ValueError("Adapters on an untrained pruner do not open again: use modules_to_save=['pruner'].")
        return self.gradients.wanted

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica.trains_pruner = partial(bool, self.trains_pruner())  # DataParallel's replicas have no parameters
        return replica

    def _run(self, call: PruningCall, stock: dict) -> ModelOutput:
        given = any(stock.get(name) is not None for name in self.pixel_arguments)
        trains = call.plan is None and self.trains_pruner()
        if trains and torch.is_grad_enabled():
            # A call that gates nothing gives a gradient too, through every layer, as processes that share the layers
            # (FSDP) expect of each other.
            prompt = stock["input_ids"] if stock.get("inputs_embeds") is None else stock["inputs_embeds"]
            call.zero = self.pruner(torch.zeros(1, self.encoder_width(self.config), device=prompt.device)).sum() * 0
        if not call.schedule or (given and stock.get("mm_encoder_outputs")):  # given both, the stock model says so
            return super().forward(**stock, **({} if call.zero is None else {"pruning": call}), return_dict=True)
        if trains:
            refuse_training(call.schedule, self.config.text_config, stock.get(CACHE))
            call.soft, stock = True, {**stock, "use_cache": False}  # a step on the whole prompt would not be gated
        use_cache = stock.get("use_cache")
        refuse_decoder_inputs(self, stock, self.config.text_config.use_cache if use_cache is None else use_cache)
        if call.plan is not None:
            self.check_positions(stock)
        else:
            prompt, pixels = self.read_prompt(stock), {name: stock.get(name) for name in self.pixel_arguments}
            with watching(call.schedule, -1, lambda: self):
                stock = self.encode_images(stock, prompt)
            stock = {**stock, "mm_encoder_outputs": make_plan(call, self, {**stock, **pixels}, prompt)}
            if call.soft and call.plan.gates is not None and call.plan.gates.requires_grad:
                self.gradients.expect(call.plan.gates, self.config)
            elif call.acts and not call.soft and call.query_mask is None and call.schedule[-1].layer:
                logger.warning_once(
                    "All text of this call decides which vision tokens stay at the second cut. If an answer is in it, "
                    "mark the prompt's rows (query_mask) or give labels, as generate does by itself: an answer would "
                    "choose its own evidence."
                )
        if call.acts or call.zero is not None:
            stock["pruning"] = call
        outputs = super().forward(**stock, return_dict=True)
        if call.acts and not call.taken:
            raise RuntimeError("The text model has no hooks, so nothing was cut: run install_hooks (rows_learnpruner).")
        return outputs


def check_asked(ratio: float | None, schedule: tuple[Cut, ...] | Schedule | None) -> None:
    """Raises `ValueError` where a call asks for what cannot be, whether or not it has images."""
    if ratio is not None:
        check_pruner_field("pruner_ratio", ratio)
        if schedule is not None:
            raise ValueError("Pass pruner_ratio or schedule, not both: a schedule says itself how much it keeps.")
