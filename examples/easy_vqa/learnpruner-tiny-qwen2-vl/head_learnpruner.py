# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What the heads of all families share: labels, the loss in training, `generate`, and the record of the cuts."""

from dataclasses import replace
from functools import wraps

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput, can_return_tuple

from .compat_learnpruner import (
    CACHE,
    CACHE_NAMES,
    derive_forward,
    fields_beside_predictions,
    installed_names,
    output_with_records,
)
from .cuts_learnpruner import Cut, Schedule, watching
from .guards_learnpruner import OR_NO_PRUNING, refuse_decoder_inputs, refuse_generation, refuse_tensor_parallelism
from .keys_learnpruner import check_cache
from .model_learnpruner import check_asked
from .plan_learnpruner import PruningCall, make_plan

# What `generate` carries among the model's arguments: the prompt, as soon as it is read, and the plan made of it.
PROMPT, PLAN = "pruner_prompt", "pruner_plan"


class PrunedGenerationMixin:
    """A stock class for conditional generation over a [`PrunedModelMixin`]; a family adds `model_class`."""

    # The pruner keeps its precision in a low-precision model: scores that tie would choose by place.
    _keep_in_fp32_modules_strict = ["pruner"]
    # Qwen2.5-VL's stock class says no, and the Trainer would weigh accumulated batches alike, whatever they hold.
    accepts_loss_kwargs = True

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        derive_forward(cls, PrunedGenerationMixin)
        if "model_class" in vars(cls):
            cls.config_class.keys_to_ignore_at_inference = fields_beside_predictions(cls)

    def __init__(self, config):
        super().__init__(config)
        self.model = self.model_class.adopt(self.model)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        *,
        labels: torch.LongTensor | None = None,
        pruner_ratio: float | None = None,
        schedule: tuple[Cut, ...] | Schedule | None = None,
        query_mask: torch.Tensor | None = None,
        **stock,
    ) -> ModelOutput:
        """The stock forward on fewer vision tokens; at a ratio of 1, or without images, the stock forward itself.

        Args:
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): As stock; ignored at a dropped row.
                While the pruner is trained no row drops: gates weigh vision tokens, and sum to the budget.
            pruner_ratio (`float`, *optional*): In place of the configuration's, for this call.
            schedule (`tuple[Cut, ...]` or [`Schedule`], *optional*): Cuts in place of LearnPruner's two, for this call.
            query_mask (`torch.Tensor` of shape `(batch, sequence)`, bool, *optional*): Text rows that rank at the
                second cut: all, or those before the first label. Where there are none, the first cut's scores decide.
            stock: The arguments of the stock class, by name or position.

        Returns the output of the stock class, with the fields of [`Recorded`]. Raises `ValueError` where images and
        placeholders do not match, or where a cut cannot be made (`guards_learnpruner.py` lists the cases).
        """
        check_asked(pruner_ratio, schedule)
        plan, given, ids = stock.pop(PLAN, None), stock.get(CACHE), stock.get("input_ids")
        prompt = stock.get("inputs_embeds") if ids is None else ids
        logits_to_keep = stock.get("logits_to_keep", 0)
        logits_to_keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        call = PruningCall(query_mask=query_mask)
        if labels is not None and query_mask is None:
            # An answer must never choose its own evidence.
            supervised = torch.zeros(prompt.shape[:2], dtype=torch.bool, device=labels.device)
            supervised[:, logits_to_keep] = labels != -100
            call.query_mask = supervised.cumsum(1) == 0
        if plan is not None:
            call.schedule, call.plan = plan.schedule, plan.resume(*prompt.shape[:2], prompt.device)
        elif self.model.has_images(stock):
            call.schedule = self.model.pruner_schedule(pruner_ratio, schedule)
            if call.schedule and not self.model.trains_pruner():
                refuse_tensor_parallelism(self)
        outputs = super().forward(**stock, pruning=call, return_dict=True)
        check_cache(outputs.get(CACHE), given, call)
        loss = None if labels is None else self._loss(call, outputs.logits, labels, logits_to_keep, stock)
        return output_with_records(type(outputs))(**{**outputs, "loss": loss}, **call.records())

    def _loss(self, call: PruningCall, logits, labels, logits_to_keep, stock: dict) -> torch.Tensor:
        others = {name: value for name, value in stock.items() if name not in self.stock_arguments}
        if call.decisions:
            predicts = call.decisions[-1][0][:, logits_to_keep]
            labels = labels.masked_fill(~F.pad(predicts[:, :-1], (1, 0), value=True), -100)
            if others.get("shift_labels") is not None:
                others["shift_labels"] = others["shift_labels"].masked_fill(~predicts, -100)
        return self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **others)

    @wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        return super().generate(*args, **installed_names(kwargs))

    def read_generate_prompt(self, inputs_tensor: torch.Tensor, model_kwargs: dict, mask_length: int) -> tuple | None:
        """The cuts of a `generate`, its [`Prompt`], and how many of its columns a cache holds; `None`: the stock steps
        are enough. `model_kwargs` carry it from the step that asks first to the others."""
        if PROMPT not in model_kwargs:
            ratio, schedule = model_kwargs.get("pruner_ratio"), model_kwargs.get("schedule")
            check_asked(ratio, schedule)
            cuts = self.model.pruner_schedule(ratio, schedule) if self.model.has_images(model_kwargs) else ()
            model_kwargs[PROMPT] = None
            if cuts:
                cache = model_kwargs.get(CACHE)
                arguments = {**model_kwargs, **prompt_arguments(inputs_tensor, model_kwargs), CACHE: None}
                # A continued conversation may be given whole; what the cache holds is not part of this call.
                whole = arguments["inputs_embeds"] is not None or mask_length == inputs_tensor.shape[1]
                start = cache.get_seq_length() if cache is not None and whole else 0
                model_kwargs[PROMPT] = cuts, self.model.read_prompt(arguments, start), start
        return model_kwargs[PROMPT]

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs, model_input_name, generation_config: GenerationConfig
    ):
        # `generate` encodes the images here, before it expands the inputs for beams and before the first forward.
        attention_mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get(CACHE)
        mask_length = generation_config._mask_length if attention_mask is None else attention_mask.shape[1]
        images_are_given = not generation_config.is_assistant
        read = self.read_generate_prompt(inputs_tensor, model_kwargs, mask_length) if images_are_given else None
        model_kwargs = {name: value for name, value in model_kwargs.items() if name != PROMPT}
        arguments = (inputs_tensor, model_kwargs, model_input_name, generation_config)
        if read is None:
            return super()._maybe_prepare_encoder_kwargs_for_generation(*arguments)
        cuts, prompt, start = read
        refuse_tensor_parallelism(self)
        refuse_generation(generation_config, attention_mask)
        refuse_decoder_inputs(self.model, {"attention_mask": attention_mask, CACHE: cache}, generation_config.use_cache)
        query_mask = model_kwargs.pop("query_mask", None)  # of the prompt: what is generated never ranks the evidence
        query_mask = torch.ones_like(prompt.kinds, dtype=torch.bool) if query_mask is None else query_mask[:, start:]
        call = PruningCall(cuts, query_mask)
        images = {name: model_kwargs.get(name) for name in (*self.model.feature_arguments, *self.model.pixel_arguments)}
        with watching(cuts, -1, lambda: self.model):
            model_kwargs = super()._maybe_prepare_encoder_kwargs_for_generation(*arguments)
        for name, value in prompt_arguments(inputs_tensor, model_kwargs).items():
            images[name] = None if value is None else value[:, start:]
        images["mm_encoder_outputs"] = model_kwargs["mm_encoder_outputs"]
        model_kwargs["mm_encoder_outputs"] = make_plan(call, self.model, images, prompt)
        return {**model_kwargs, PLAN: call.plan}

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args, **kwargs):
        plan = kwargs.pop(PLAN, None)
        kwargs.pop("query_mask", None)  # the plan has it
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if CACHE in inputs:  # under the name that PEFT 0.21 looks for, which else puts virtual tokens in at each step
            inputs[CACHE_NAMES[-1]] = inputs.pop(CACHE)
        if plan is None or not inputs.get("mm_encoder_outputs"):
            return inputs
        rows = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        return {**inputs, PLAN: replace(plan, answer_length=rows.shape[1] - plan.vision.shape[1])}

    def _get_candidate_generator(self, *args, model_kwargs, **kwargs):
        ours = ("pruner_ratio", "schedule", "query_mask", PLAN)  # an assistant has its own pruner, if any
        model_kwargs = {name: value for name, value in model_kwargs.items() if name not in ours}
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)

    def generate_batch(self, inputs, *args, **kwargs):
        prompts = inputs if self.model.pruner_schedule() else ()
        if any(self.model.vision_kinds(torch.as_tensor(ids), None).any() for ids in prompts):
            raise ValueError(f"Pruning does not support continuous batching: use generate. {OR_NO_PRUNING}")
        return super().generate_batch(inputs, *args, **kwargs)


def prompt_arguments(inputs_tensor: torch.Tensor, model_kwargs: dict) -> dict:
    """The prompt of a `generate` as a forward takes it: ids, embeddings, or both where both are of one length."""
    if inputs_tensor.dim() == 2:
        return {"input_ids": inputs_tensor, "inputs_embeds": None}
    ids = model_kwargs.get("input_ids")
    whole = ids is not None and ids.shape[1] == inputs_tensor.shape[1]
    return {"input_ids": ids if whole else None, "inputs_embeds": inputs_tensor}
