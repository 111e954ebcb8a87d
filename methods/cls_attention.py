# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""FasterVLM (arXiv 2412.01818): the attention of the vision encoder's [CLS] token."""

from dataclasses import dataclass

import torch
from torch import nn

from learnpruner.cuts_learnpruner import EncodedImages

from .base import Method, Place, TopKImages
from .images import ReadsEncoder, cls_attention, cls_layers


@dataclass(unsafe_hash=True)
class ClsAttention(Method):
    """FasterVLM (https://arxiv.org/abs/2412.01818): keeps the patches that [CLS] attends to most.

    With A `(heads, patches)` the softmax of q_[CLS] k^T / sqrt(d) in the layer whose output the projector reads, the
    score of patch i is the mean over the heads of A[h, i]. Any tower with a class token will do: CLIP, DINOv2, ViT.

    Departures: in LLaVA-NeXT all crops of an image share one budget, and newlines are kept last; the authors give each
    crop the budget, and keep every newline.
    """

    def check(self, model: nn.Module) -> None:
        cls_layers(model, "cls_attention")

    def places(self, model: nn.Module) -> tuple[Place, ...]:
        return (Place(0, 1, ClsScore(), watched=(-1,)),)


@dataclass(unsafe_hash=True)
class ClsScore(ReadsEncoder, TopKImages):
    def __call__(self, images: EncodedImages) -> torch.Tensor:
        return cls_attention(images)[0]
