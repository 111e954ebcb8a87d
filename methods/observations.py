# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""What a model does with each image of a call: what methods keep of it, and where attention to it goes."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from learnpruner.cuts_learnpruner import Cut, DecoderState, EncodedImages, TextAttention

from .base import Method, TopKImages
from .decoder import look_ahead
from .images import ReadsEncoder, cls_attention, cls_layers, coordinates


@dataclass
class Observation:
    """One image, on the host. Its patches are its vision tokens without structure (LLaVA-NeXT's newlines).

    Attributes:
        places (`torch.Tensor` of shape `(patches, 2)`, float32): The middle of each patch, x and y in its picture as
            shares of its width and height.
        text (`torch.Tensor` of shape `(layers, patches)`, float32): What the prompt's text pays each patch in each
            decoder layer of the unpruned model, as LearnPruner's stage 2 would rank by it: mean over heads and rows.
        cls (`torch.Tensor` of shape `(patches,)`, float32, or `None`): What [CLS] pays each, mean over heads.
        kept (`dict[str, torch.Tensor]`, each `(cuts, patches)` bool): Survivors of each cut of each method.
    """

    places: torch.Tensor
    text: torch.Tensor
    cls: torch.Tensor | None
    kept: dict[str, torch.Tensor]


class Look(ReadsEncoder, TopKImages):
    """A score that ranks nothing, and keeps where the patches of a call's images are and what [CLS] pays them."""

    def __init__(self, reads_cls: bool):
        self.reads_cls, self.sizes, self.places, self.cls = reads_cls, [], None, None

    def __call__(self, images: EncodedImages) -> torch.Tensor:
        self.sizes, self.places = images.sizes, coordinates(images).cpu()
        if self.reads_cls:
            self.cls = cls_attention(images)[0].cpu()
        return images.features.new_zeros(images.present.shape, dtype=torch.float32)


def why_no_cls(model: nn.Module) -> str | None:
    """Why [CLS] attention cannot be read of `model`, the one without its head; `None` where it can."""
    try:
        cls_layers(model, "[CLS] attention")
    except ValueError as error:
        return str(error)
    return None


@contextmanager
def watched_layers(model: PreTrainedModel, valid: torch.Tensor, vision: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """The block in which `model` runs one prompt unpruned, without a cache. Fills a list: for each decoder layer what
    text pays each vision token, `(batch, sequence)` float32, NaN elsewhere. No attention map is made. Not for models
    that other threads use meanwhile.

    Args:
        valid, vision (`torch.Tensor` of shape `(batch, sequence)`, bool): What is not padding, and of that the images.
    """
    queries = valid & ~vision
    num_text, score, received = int(queries.sum(1).max()), TextAttention(model.config.pruner_query), []

    def look(number: int, layer: nn.Module, arguments: tuple, keywords: dict) -> None:
        states = arguments[0]
        device, embeddings = states.device, tuple(part.to(states.device) for part in keywords["position_embeddings"])
        state = DecoderState(
            decoder=model.model.language_model,
            number=number,
            hidden_states=states,
            output=states,
            position_embeddings=embeddings,
            attended=look_ahead(layer, states, embeddings),
            key_valid=valid.to(device),
            index=torch.arange(states.shape[1], device=device).expand(len(states), -1),
            vision=vision.to(device),
            queries=queries.to(device),
            num_text=num_text,
            vision_scores=torch.full(vision.shape, torch.nan, device=device),
        )
        received.append(score(state).cpu())

    with ExitStack() as hooks:
        for number, layer in enumerate(model.model.language_model.layers):
            hooks.enter_context(layer.register_forward_pre_hook(partial(look, number), with_kwargs=True))
        yield received


@torch.no_grad()
def observe(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], methods: Mapping[str, Method]
) -> list[Observation]:
    """Runs a batch once unpruned, once to look at its images, and once with each method.

    Args:
        model: A model of this project, with its head.
        inputs: What the processor returned for samples of one image each.
        methods: By the names that they have in the observations.

    Raises:
        `ValueError`: where a sample has not one image, an image has a token that is neither patch nor newline or one
            token alone, or no text comes after an image.
    """
    inner = model.model
    prompt = inner.read_prompt(inputs)
    valid = torch.ones_like(prompt.kinds, dtype=torch.bool) if prompt.valid is None else prompt.valid
    vision = valid & (prompt.kinds > 0)
    look = Look(why_no_cls(inner) is None)
    cut = Cut(0, lambda tokens: 1, look, watched=(-1,) if look.reads_cls else ())
    inner(**inputs, schedule=(cut,), use_cache=False)
    if look.sizes != prompt.placeholders["image"] or min(look.sizes) < 2:
        raise ValueError("Samples of one image of two tokens or more are observed, and these are others.")
    if look.places.shape[1] != max(look.sizes):
        raise ValueError("An image has a token that is no patch, such as the tower's [CLS]: its places are not known.")
    with watched_layers(model, valid, vision) as received:
        inner(**inputs, pruner_ratio=1.0, use_cache=False)
    text, masks, vision = torch.stack(received, dim=1), {}, vision.cpu()
    for name, method in methods.items():
        kept = inner(**inputs, schedule=method, use_cache=False).kept_mask
        # Where every count is that of the image nothing is cut.
        kept = [vision] * len(method.cuts(inner)) if kept is None else [mask.cpu() for mask in kept]
        masks[name] = torch.stack(kept, dim=1)
    observations = []
    for row, (own, size) in enumerate(zip(vision, look.sizes)):
        patches = ~look.places[row, :size].isnan().any(-1)
        paid = text[row][:, own][:, patches]
        if paid.isnan().any():
            raise ValueError("No text comes after an image, so none attends to it: put the question behind the image.")
        observations.append(
            Observation(
                places=look.places[row, :size][patches],
                text=paid,
                cls=None if look.cls is None else look.cls[row, :size][patches],
                kept={name: kept[row][:, own][:, patches] for name, kept in masks.items()},
            )
        )
    return observations
