# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What every pruned family shares: a model that plans its cuts, and a head that trains, generates and reports them."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput
from transformers.utils import can_return_tuple, logging

from .call_learnpruner import PruningCall
from .cuts_learnpruner import Cut, LearnedScore, Schedule, check_schedule, learnpruner_schedule, watching
from .decoder_learnpruner import PRUNED_TEXT_MODELS
from .guards_learnpruner import (
    OR_NO_PRUNING,
    refuse_decoder_inputs,
    refuse_generation,
    refuse_tensor_parallelism,
)
from .layout_learnpruner import MODALITIES, PromptLayout
from .scorer_learnpruner import LearnedPruningModule, budget_loss

logger = logging.get_logger(__name__)

# In these `generate` carries, beside the query_mask, the plan made from the images it encoded. Tensors with the batch
# first, so that beams expand them.
PLAN = ("vision_kept", "vision_scores", "vision_last", "vision_counts")


@dataclass
class LearnPrunerModelOutputWithPast(BaseModelOutputWithPast):
    """Output of the model without its head.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch, sequence, hidden)`): Zeros in rows of dropped tokens.
        hidden_states, attentions: Physical: what the layers held, shorter after each cut.
        kept_mask (`tuple[torch.Tensor]`, each `(batch, sequence)` bool, or `None`):
            For each cut, True where the token survives it: text True, padding False. `None` where nothing was cut.
        vision_scores (`tuple[torch.Tensor]`, each `(batch, sequence)` float32, or `None`):
            For each cut, the scores that ranked; NaN where a token was not scored. In training, the first cut's.
    """

    image_hidden_states: torch.Tensor | None = None
    # Qwen's, up to transformers 5.22.
    rope_deltas: torch.Tensor | None = None
    kept_mask: tuple[torch.Tensor, ...] | None = None
    vision_scores: tuple[torch.Tensor, ...] | None = None


@dataclass
class LearnPrunerCausalLMOutputWithPast(ModelOutput):
    """Output of the model with its head; fields as in [`LearnPrunerModelOutputWithPast`].

    Args:
        loss (`torch.Tensor` of shape `()`): Cross-entropy, in training plus the budget term.
        logits (`torch.Tensor` of shape `(batch, sequence, vocab)`): Zeros in rows of dropped tokens.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    rope_deltas: torch.Tensor | None = None
    kept_mask: tuple[torch.Tensor, ...] | None = None
    vision_scores: tuple[torch.Tensor, ...] | None = None


class PrunedModelMixin:
    """A stock vision-language model without its head, with a pruner, whose text model runs a schedule of cuts.

    A family says what its images come in and has the methods below that have no body.

    Attributes:
        stock_arguments (`tuple[str, ...]`): Names of the stock forward's arguments, beside token ids and their mask.
        pixel_arguments (`tuple[str, ...]`): Names of those that hold images.
        grid_arguments (`tuple[str, ...]`): Names of those that lay images out, each a row of integers.
        feature_arguments (`tuple[str, ...]`): Names of others that decide which features an image has.
    """

    stock_arguments: tuple[str, ...]
    pixel_arguments: tuple[str, ...]
    grid_arguments: tuple[str, ...]
    feature_arguments: tuple[str, ...] = ()

    @staticmethod
    def encoder_width(config: PreTrainedConfig) -> int:
        """Width of the features that the pruner reads."""

    def vision_kinds(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Placeholders, `(batch, sequence)` int8, as in [`PromptLayout`]."""

    def check_images(self, arguments: dict, layout: PromptLayout) -> None:
        """Raises `ValueError` where images and what describes them do not fit; before any work."""

    def count_parts(self, arguments: dict) -> int:
        """How many parts of a call, images or groups of frames, have a budget of their own."""
        pixels = arguments.get("pixel_values")
        return 0 if pixels is None else len(pixels)

    def encode_images(self, arguments: dict, layout: PromptLayout) -> dict:
        """The stock forward's arguments with encoded images in place of pixels."""

    def pruner_features(self, arguments: dict, layout: PromptLayout) -> dict[str, list[torch.Tensor]]:
        """The vision encoder's features before the projector.

        Args:
            arguments: Encoded images (`mm_encoder_outputs`) and the family's `feature_arguments`.

        Returns:
            `dict[str, list[torch.Tensor]]`, each `(tokens, d)`: for each modality, in the order of the prompt, every
            part that has a budget of its own. Rows of NaN are structure, not patches.
        """

    def __init__(self, config):
        super().__init__(config)
        text_type = config.text_config.model_type
        if text_type not in PRUNED_TEXT_MODELS:
            raise ValueError(
                f"Pruning runs over the text models {sorted(PRUNED_TEXT_MODELS)}; this checkpoint has {text_type!r}."
            )
        # In place of the stock one that the constructor built; from_pretrained builds both on the meta device.
        self.language_model = PRUNED_TEXT_MODELS[text_type]._from_config(config.text_config)
        self.pruner = LearnedPruningModule(self.encoder_width(config), config.pruner_hidden_size)
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
        """The cuts of a call: those of `schedule`, or LearnPruner's at `ratio` or at the configuration's."""
        if schedule is None:
            return learnpruner_schedule(self.config, ratio)
        if ratio is not None:
            raise ValueError("Pass pruner_ratio or schedule, not both: a schedule says itself how much it keeps.")
        cuts = schedule if isinstance(schedule, tuple | list) else schedule.cuts(self)
        return check_schedule(cuts, self.config.text_config.num_hidden_layers)

    def marks(self, token_id: int, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Where a special token stands, `(batch, sequence)` bool."""
        if input_ids is not None:
            return input_ids == token_id
        token = torch.full((), token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def read_layout(self, arguments: dict, kinds: torch.Tensor, valid: torch.Tensor | None) -> PromptLayout:
        """All that the host must know of a prompt."""
        given = {name: arguments[name] for name in self.grid_arguments if arguments.get(name) is not None}
        return PromptLayout.read(kinds, valid, given, arguments.get("mm_token_type_ids"))

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
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pruner_ratio: float | None = None,
        schedule: tuple[Cut, ...] | Schedule | None = None,
        query_mask: torch.Tensor | None = None,
        pruning: PruningCall | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """The stock forward; with images and a ratio below 1, the same on fewer tokens.

        Args:
            pruner_ratio, schedule, query_mask: As in the class with the head.
            pruning ([`PruningCall`], *optional*): The head's, in place of those three; the output is the stock one.
            The other arguments are the stock model's.
        """
        stock = {"input_ids": input_ids, "attention_mask": attention_mask}
        stock |= {name: kwargs.pop(name, None) for name in self.stock_arguments}
        begun = pruning is not None
        pruning = pruning or PruningCall(self.pruner_schedule(pruner_ratio, schedule), query_mask)
        decoder = {name: stock[name] for name in ("attention_mask", "position_ids", "past_key_values")}
        # Given both, the stock model says so.
        both = stock["mm_encoder_outputs"] and any(stock[name] is not None for name in self.pixel_arguments)
        if pruning.schedule and self.has_images(stock) and not both:
            use_cache = self.config.text_config.use_cache if stock["use_cache"] is None else stock["use_cache"]
            refuse_decoder_inputs(self, **decoder, use_cache=use_cache, kwargs=kwargs)
            if pruning.counts is None:
                kinds = self.vision_kinds(stock["input_ids"], stock["inputs_embeds"])
                mask = stock["attention_mask"]
                valid = None if mask is None else mask[:, -kinds.shape[1] :].bool()
                layout = self.read_layout(stock, kinds, valid)
                self.check_images(stock, layout)
                pixels = {name: stock[name] for name in self.pixel_arguments}
                with watching(pruning.schedule, -1, lambda: self):
                    stock = self.encode_images(stock, layout)
                stock = {**stock, "mm_encoder_outputs": pruning.plan(self, {**stock, **pixels}, layout)}
            # In training, a schedule without a learned cut has nothing to gate.
            if pruning.will_cut and not (pruning.soft and pruning.gates is None):
                self._warn_if_untrained(pruning)
                kwargs["pruning"] = pruning

        outputs = super().forward(**stock, return_dict=True, **kwargs)
        if begun:
            return outputs
        return LearnPrunerModelOutputWithPast(
            **outputs, kept_mask=pruning.kept_mask, vision_scores=pruning.decided_scores
        )

    def _warn_if_untrained(self, pruning: PruningCall) -> None:
        learned = any(isinstance(cut.score, LearnedScore) for cut in pruning.schedule)
        if learned and not self.config.pruner_trained and not pruning.soft:
            logger.warning_once(
                "The pruner is untrained: its first cut keeps arbitrary vision tokens. Train it "
                "(model.train_pruner_only()) or load a trained checkpoint."
            )


class PrunedGenerationMixin:
    """A stock class for conditional generation over a [`PrunedModelMixin`].

    A family adds `model_class` and the signature of forward.
    """

    # The pruner keeps its precision in a low-precision model: scores that tie would choose by place.
    _keep_in_fp32_modules_strict = ["pruner"]
    # Qwen2.5-VL's stock class says no, and the Trainer would weigh accumulated batches alike, whatever they hold.
    accepts_loss_kwargs = True

    def __init__(self, config):
        super().__init__(config)
        self.model = self.model_class(config)
        self.post_init()

    def _forward(self, given: dict) -> LearnPrunerCausalLMOutputWithPast:
        """The forward of every family, whose local names are `given`: its arguments."""
        kwargs, labels, query_mask = given["kwargs"], given["labels"], given["query_mask"]
        own = ("input_ids", "attention_mask", "logits_to_keep")
        stock = {name: given[name] for name in (*own, *self.model.stock_arguments) if name in given}
        plan = {name: kwargs.pop(name) for name in PLAN if name in kwargs}
        budget_share = kwargs.pop("budget_share", None)
        soft = self.training and labels is not None
        kept_logits = stock["logits_to_keep"]
        kept_logits = slice(-kept_logits, None) if isinstance(kept_logits, int) else kept_logits
        if query_mask is None and labels is not None:
            # An answer must never choose its own evidence.
            prompt = stock["input_ids"] if stock["input_ids"] is not None else stock["inputs_embeds"]
            supervised = torch.zeros(prompt.shape[:2], dtype=torch.bool, device=labels.device)
            supervised[:, kept_logits] = labels != -100
            query_mask = supervised.cumsum(1) == 0
        pruning = PruningCall(
            self.model.pruner_schedule(given["pruner_ratio"], given["schedule"]),
            None if query_mask is None else query_mask.bool(),
            soft,
        )
        if pruning.schedule and not soft and self.model.has_images(stock):
            refuse_tensor_parallelism(self)
        if soft and not self.model.has_images(stock):
            stock = self._with_gradient(stock)
        if plan:
            pruning.resume(self.model.vision_kinds(stock["input_ids"], stock["inputs_embeds"]) > 0, plan)
        outputs = super().forward(**stock, **kwargs, pruning=pruning, return_dict=True)

        loss = None
        if labels is not None:
            if pruning.decisions:
                predicts = pruning.decisions[-1][0][:, kept_logits]
                labels = labels.masked_fill(~F.pad(predicts[:, :-1], (1, 0), value=True), -100)
                if kwargs.get("shift_labels") is not None:
                    kwargs["shift_labels"] = kwargs["shift_labels"].masked_fill(~predicts, -100)
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=outputs.logits, labels=labels, vocab_size=vocab_size, **kwargs)
            if soft:
                loss = loss + self._pruner_loss(pruning, labels, kwargs.get("num_items_in_batch"), budget_share)
        return LearnPrunerCausalLMOutputWithPast(
            **outputs, loss=loss, kept_mask=pruning.kept_mask, vision_scores=pruning.decided_scores
        )

    def _with_gradient(self, stock: dict) -> dict:
        """Text alone, of which the pruner has no part: nothing that depends on it is added to the embeddings, so that
        a batch of text has a gradient too, and goes back through every layer, as processes that share the layers
        (FSDP) expect of each other."""
        embeds = stock["inputs_embeds"]
        if embeds is None:
            embeds = self.get_input_embeddings()(stock["input_ids"])
        return {**stock, "input_ids": None, "inputs_embeds": embeds + self._nothing().to(embeds)}

    def _nothing(self) -> torch.Tensor:
        """Zero, which depends on all of the pruner that is trained."""
        return sum((parameter.sum() * 0 for parameter in self._trained()), torch.zeros(()))

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.pruner.parameters() if parameter.requires_grad]

    def _pruner_loss(
        self, pruning: PruningCall, labels: torch.Tensor, num_items_in_batch, budget_share
    ) -> torch.Tensor:
        if pruning.gates is None:
            # A schedule without a learned cut: the loss must have a gradient all the same.
            return self._nothing().to(labels.device)
        loss = budget_loss(pruning.probabilities, pruning.shares)
        if num_items_in_batch is not None:
            # The Trainer sums the losses of accumulated batches, each over the items of all: weigh this one likewise,
            # by its share of the step's images where the caller knows it, else of the labels.
            by_labels = (labels[:, 1:] != -100).sum() / num_items_in_batch
            loss = loss * (by_labels if budget_share is None else budget_share)
        if self._trained() and loss.requires_grad:
            # A forward pass alone trains nothing: only a backward pass gets here.
            loss.register_hook(lambda gradient: setattr(self.config, "pruner_trained", True))
        return loss

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs, model_input_name, generation_config: GenerationConfig
    ):
        # `generate` encodes the images here, before it expands the inputs for beams and before the first forward.
        layout = model_kwargs.pop("prompt_layout", None)  # read before, where positions depend on it
        arguments = (inputs_tensor, model_kwargs, model_input_name, generation_config)
        schedule = self.model.pruner_schedule(model_kwargs.get("pruner_ratio"), model_kwargs.get("schedule"))
        # As an assistant the stock model is given no images.
        if not schedule or not self.model.has_images(model_kwargs) or generation_config.is_assistant:
            return super()._maybe_prepare_encoder_kwargs_for_generation(*arguments)

        attention_mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
        refuse_tensor_parallelism(self)
        refuse_generation(generation_config, attention_mask)
        refuse_decoder_inputs(self.model, attention_mask, None, cache, generation_config.use_cache, {})
        embeds = inputs_tensor if model_input_name == "inputs_embeds" else None
        kinds = self.model.vision_kinds(inputs_tensor if embeds is None else None, embeds)
        sequence = kinds.shape[1]
        # A continued conversation may be given whole; what the cache holds is not part of this call.
        mask_length = attention_mask.shape[1] if attention_mask is not None else generation_config._mask_length
        start = cache.get_seq_length() if cache is not None and (embeds is not None or mask_length == sequence) else 0
        if layout is None or cache is not None:
            valid = None if attention_mask is None else attention_mask[:, -sequence:][:, start:].bool()
            layout = self.model.read_layout(model_kwargs, kinds[:, start:], valid)
            self.model.check_images(model_kwargs, layout)
        images = {name: model_kwargs.get(name) for name in (*self.model.feature_arguments, *self.model.pixel_arguments)}
        images["input_ids"] = inputs_tensor[:, start:] if embeds is None else None
        images["inputs_embeds"] = None if embeds is None else embeds[:, start:]
        with watching(schedule, -1, lambda: self.model):
            model_kwargs = super()._maybe_prepare_encoder_kwargs_for_generation(*arguments)
        images["mm_encoder_outputs"] = model_kwargs["mm_encoder_outputs"]

        # Fixed from the prompt: what is generated never ranks the evidence.
        query_mask = model_kwargs.get("query_mask")
        query_mask = torch.ones_like(kinds, dtype=torch.bool) if query_mask is None else query_mask.bool()
        pruning = PruningCall(schedule, query_mask[:, start:])
        model_kwargs["mm_encoder_outputs"] = pruning.plan(self.model, images, layout)
        if not pruning.will_cut:
            model_kwargs.pop("schedule", None)
            return {**model_kwargs, "pruner_ratio": 1.0}
        return {**model_kwargs, "query_mask": query_mask, **pruning.to_arguments(start)}

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, **kwargs):
        plan = {name: kwargs.pop(name) for name in ("query_mask", *PLAN) if kwargs.get(name) is not None}
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if not inputs.get("mm_encoder_outputs"):
            return inputs
        # The plan is in the columns of the whole prompt; a continued conversation runs only the last of them.
        from_embeds = inputs.get("inputs_embeds") is not None
        used = (inputs["inputs_embeds"] if from_embeds else inputs["input_ids"]).shape[1]
        start = (inputs_embeds if from_embeds else input_ids).shape[1] - used
        for name, value in plan.items():
            value = value if name in ("vision_last", "vision_counts") else value[:, start:]
            inputs[name] = value if name == "vision_counts" else value.to(self.device)
        return inputs

    def _get_candidate_generator(self, *args, model_kwargs, **kwargs):
        # An assistant has its own model, and its own pruner if any.
        ours = ("pruner_ratio", "schedule", "query_mask", *PLAN)
        model_kwargs = {name: value for name, value in model_kwargs.items() if name not in ours}
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)

    def generate_batch(self, inputs, *args, **kwargs):
        images = any(self.model.vision_kinds(torch.as_tensor(ids), None).any() for ids in inputs)
        if self.model.pruner_schedule() and images:
            raise ValueError(f"Pruning does not support continuous batching: use generate. {OR_NO_PRUNING}")
        return super().generate_batch(inputs, *args, **kwargs)
