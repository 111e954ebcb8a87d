# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""HAWK (arXiv 2604.07812): the question's first-layer queries on the image, heads weighed by what they are worth."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import torch
from torch import nn

from learnpruner.cuts_learnpruner import EncodedImages
from learnpruner.prompt_learnpruner import send

from .base import Method, Place, TopKImages
from .decoder import in_layer
from .images import embeddings, text


@dataclass(unsafe_hash=True)
class Hawk(Method):
    """HAWK (https://arxiv.org/abs/2604.07812): keeps, before the decoder, the tokens that its first layer would look at
    when it reads the question.

    With q `(heads, text, head_dim)` and k `(heads, tokens, head_dim)` the first layer's queries of the text and keys of
    the vision tokens, from normed embeddings, without rotary positions, keys repeated for the heads that share them:

        c_{h,i} = mean over text t of q_{h,t} k_{h,i} / sqrt(head_dim)        score of token i = sum_h w_h c_{h,i}

    As in the authors' code, all images and videos of a sample share one budget.

    Departures: the text is all of the prompt's that may rank (`query_mask`), before the image too; the authors read
    what stands between the last image and the end of the user's turn. Counts are rounded as for all methods here, where
    the paper rounds down and the code up.

    Args:
        variant (`"paper"` or `"code"`): The paper sums the raw c; the authors' code divides each head's by its L2 norm
            over the sample's vision tokens first. The authors' published numbers are of their code.
        head_weights (`Sequence[float]`, or `str` or `Path`, *optional*): w, one for each head of the first layer, or
            the file that `learnpruner calibrate-hawk` wrote. By default all weigh the same. The weights that the
            authors measured for Qwen2.5-VL-7B are not part of this. That a file was measured on the model's own base
            (its `base_sha256`) is not checked: only the number of heads is.
    """

    variant: str = "paper"
    head_weights: Sequence[float] | str | Path | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.variant not in ("paper", "code"):
            raise ValueError(f"hawk: variant is 'paper' or 'code', got {self.variant!r}.")
        weights = self.head_weights
        if isinstance(weights, str | Path):
            object.__setattr__(self, "head_weights", read_weights(Path(weights)))
        elif weights is not None:
            object.__setattr__(self, "head_weights", tuple(weights))
        if not all(isinstance(weight, Real) and math.isfinite(weight) for weight in self.head_weights or ()):
            raise ValueError(f"hawk: head_weights are finite numbers, got {self.head_weights}.")

    def check(self, model: nn.Module) -> None:
        heads = model.config.text_config.num_attention_heads
        if self.head_weights is not None and len(self.head_weights) != heads:
            raise ValueError(
                f"hawk: the model has {heads} heads, and {len(self.head_weights)} head_weights were given."
            )

    def places(self, model: nn.Module) -> tuple[Place, ...]:
        heads = model.config.text_config.num_attention_heads
        return (Place(0, 1, HawkScore(self.variant, self.head_weights or (1 / heads,) * heads), unit="sample"),)


def read_weights(path: Path) -> tuple[float, ...]:
    """Raises `ValueError` where the file is none of `learnpruner calibrate-hawk`, `OSError` where there is none."""
    try:
        return tuple(map(float, json.loads(path.read_text())["weights"]))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} holds no weights of heads: make it with learnpruner calibrate-hawk.") from error


@dataclass(unsafe_hash=True)
class HawkScore(TopKImages):
    variant: str
    head_weights: tuple[float, ...]

    @torch.no_grad()
    def __call__(self, images: EncodedImages) -> torch.Tensor:
        layer = images.model.language_model.layers[0]
        samples, tokens = text(images), embeddings(images)
        structure = images.features.isnan().any(-1) | ~images.present

        def paid(states: torch.Tensor) -> torch.Tensor:
            return self._paid(layer, samples, tokens.to(states.device), structure.to(states.device), images.owners)

        return in_layer(layer, tokens.new_zeros(1, 1, tokens.shape[-1]), paid)

    def _paid(
        self,
        layer: nn.Module,
        samples: list[torch.Tensor],
        tokens: torch.Tensor,
        structure: torch.Tensor,
        owners: list[int],
    ) -> torch.Tensor:
        """The scores, on the device of `tokens`, where the layer's weights are."""
        attention, device = layer.self_attn, tokens.device
        tokens = tokens.masked_fill(structure.unsqueeze(-1), 0)
        queries = attention.q_proj(layer.input_layernorm(torch.cat(samples).to(device))).float()
        keys = attention.k_proj(layer.input_layernorm(tokens))
        with torch.autocast(device.type, enabled=False):
            # The mean of products is the product with the mean.
            parts = queries.split([len(rows) for rows in samples])
            query = torch.stack([part.sum(0) / max(1, len(part)) for part in parts])[owners]
            query = query.unflatten(-1, (-1, attention.head_dim))
            keys = keys.float().unflatten(-1, (-1, attention.head_dim))
            keys = keys.repeat_interleave(query.shape[1] // keys.shape[2], dim=2)
            paid = torch.einsum("ihd,ithd->ith", query, keys) * attention.scaling
            if self.variant == "code":
                norm = paid.masked_fill(structure.unsqueeze(-1), 0).norm(dim=1, keepdim=True)
                paid = paid / norm.clamp(min=torch.finfo(paid.dtype).tiny)
            return (paid @ send(self.head_weights, paid.device).to(paid)).masked_fill(structure, torch.nan)
