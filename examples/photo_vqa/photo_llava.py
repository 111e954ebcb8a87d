# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The photo model's parts: its configuration, what of it is trained, and how it is run while it is trained.

Trained are the projector and, in the text model, low-rank additions to the layers that make queries, keys, values and
outputs of attention. Everything else is frozen.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Dinov2Config, LlamaConfig, LlamaForCausalLM, LlavaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from prompts import Chunk, Packed

# The fourth hidden state from the end: later ones tell less of what a patch shows.
VISION_LAYER = -4
RANK = 16
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
ATTENTION = "photo_vqa_chunks"


def build_config(vision: Dinov2Config, text: LlamaConfig, image_token: int) -> LlavaConfig:
    """The photo model's configuration. Dinov2 has a class token, which LLaVA leaves out."""
    return LlavaConfig(
        # Copies: what holds them would set their attention.
        vision_config=copy.deepcopy(vision),
        text_config=copy.deepcopy(text),
        image_token_index=image_token,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=VISION_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=text.tie_word_embeddings,
    )


class LowRank(nn.Module):
    """A frozen linear layer plus `scale * up(down(x))`, which begins at nothing.

    Args:
        linear (`nn.Linear`): Without a bias.
        rank (`int`): Width between.
    """

    scale = 2.0

    def __init__(self, linear: nn.Linear, rank: int = RANK):
        super().__init__()
        self.weight = linear.weight
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, inputs):
        rows, dtype = inputs.flatten(0, -2), inputs.dtype
        low = rows @ self.down.to(dtype).T
        return torch.addmm(rows @ self.weight.T, low, self.up.to(dtype).T, alpha=self.scale).view(
            *inputs.shape[:-1], -1
        )


class _Norm(torch.autograd.Function):
    """Llama's norm with a frozen weight. Autograd's own form writes a dozen float32 copies of its input."""

    @staticmethod
    def forward(ctx, inputs, weight, epsilon):
        mean = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True, dtype=torch.float32).square_()
        scale = mean.div_(inputs.shape[-1]).add_(epsilon).rsqrt_()
        normed = torch.mul(inputs, scale).to(inputs.dtype)
        ctx.save_for_backward(normed, scale, weight)
        return weight * normed

    @staticmethod
    def backward(ctx, grad):
        normed, scale, weight = ctx.saved_tensors
        grad = grad * weight
        along = (grad * normed).mean(-1, keepdim=True, dtype=torch.float32)
        return torch.addcmul(grad, normed, along.to(grad.dtype), value=-1).mul_(scale.to(grad.dtype)), None, None


class Norm(nn.Module):
    """A frozen `LlamaRMSNorm` that trains what lies before it faster."""

    def __init__(self, norm: LlamaRMSNorm):
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, inputs):
        return _Norm.apply(inputs, self.weight, self.epsilon)


def merged(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The weight of a linear layer that computes what a [`LowRank`] does, float32."""
    return weight.float() + LowRank.scale * up.float() @ down.float()


def adapt(text: LlamaForCausalLM, rank: int = RANK) -> dict[str, nn.Parameter]:
    """Freezes a text model, puts [`LowRank`] layers and [`Norm`]s in and returns what is trained, float32, by name."""
    text.requires_grad_(False)
    found = {}
    for name, module in list(text.named_modules()):
        parent, _, child = name.rpartition(".")
        if child in ADAPTED:
            layer = LowRank(module, rank)
            setattr(text.get_submodule(parent), child, layer)
            found |= {f"{name}.down": layer.down, f"{name}.up": layer.up}
        elif isinstance(module, LlamaRMSNorm):
            setattr(text.get_submodule(parent), child, Norm(module))
    return found


def _take(every: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """Of keys or values `(key heads, rows, width)` those that a chunk's rows attend."""
    if chunk.seen == chunk.first:
        return every[:, : chunk.last]
    return torch.cat([every[:, : chunk.seen], every[:, chunk.first : chunk.last]], 1)


class _Chunked(torch.autograd.Function):
    """Attention chunk by chunk, all heads that share keys at once.

    Plain products in bfloat16 are three times as fast on a CPU as the fused kernel, whose backward is slow there; and
    what no row of a chunk attends is left out.
    """

    @staticmethod
    def forward(ctx, query, key, value, scaling, chunks):
        """query and the result `(key heads, group, rows, width)`; key, value `(key heads, rows, width)`."""
        output, kept = torch.empty_like(query), []
        for chunk in chunks:
            place = slice(chunk.first, chunk.last)
            rows = query[:, :, place]
            scores = (rows * scaling).flatten(1, 2) @ _take(key, chunk).transpose(1, 2)
            last = scores.view(*rows.shape[:3], -1)[..., -len(chunk.mask) :]
            last.masked_fill_(~chunk.mask, torch.finfo(scores.dtype).min)
            weights = scores.softmax(-1)
            output[:, :, place] = (weights @ _take(value, chunk)).view(rows.shape)
            kept.append(weights)
        ctx.scaling, ctx.chunks = scaling, chunks
        ctx.save_for_backward(query, key, value, *kept)
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *kept = ctx.saved_tensors
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for chunk, weights in zip(ctx.chunks, kept):
            place = slice(chunk.first, chunk.last)
            rows, out = query[:, :, place], grad[:, :, place].flatten(1, 2)
            inner = out @ _take(value, chunk).transpose(1, 2)
            inner = torch._softmax_backward_data(inner, weights, -1, weights.dtype).mul_(ctx.scaling)
            of_query[:, :, place] = (inner @ _take(key, chunk)).view(rows.shape)
            inner, weights = inner.transpose(1, 2), weights.transpose(1, 2)
            for total, part in ((of_key, inner @ rows.flatten(1, 2)), (of_value, weights @ out)):
                total[:, : chunk.seen] += part[:, : chunk.seen]
                total[:, place] += part[:, chunk.seen :]
        return of_query, of_key, of_value, None, None


def attend(module, query, key, value, attention_mask, scaling, chunks: list[Chunk], **kwargs):
    """An attention function of `transformers` for one sequence. What attends what is in `chunks`."""
    grouped = query[0].unflatten(0, (key.shape[1], -1))
    output = _Chunked.apply(grouped, key[0], value[0], scaling, chunks)
    return output.flatten(0, 1).transpose(0, 1)[None], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)


def run(
    text: LlamaForCausalLM, projector: LlavaMultiModalProjector, start: list[int], patches: torch.Tensor, packed: Packed
) -> torch.Tensor:
    """Logits `(2 * questions, vocabulary)`, float32, at the rows of a packed sequence.

    Args:
        text (`LlamaForCausalLM`): With the attention of this module.
        start (`list[int]`): Tokens before the image.
        patches (`torch.Tensor` of shape `(tokens, tower width)`): Of the layer that LLaVA reads.
    """
    words = text.get_input_embeddings()(torch.cat([torch.tensor(start), packed.ids]))
    image = projector(patches).to(words.dtype)
    rows = torch.cat([words[: len(start)], image, words[len(start) :]])[None]
    hidden = text.model(
        inputs_embeds=rows, position_ids=packed.positions[None], use_cache=False, chunks=packed.chunks
    ).last_hidden_state
    return text.lm_head(hidden[0, packed.rows]).float()


def answer_loss(logits: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Cross-entropy of answers and ends."""
    return F.cross_entropy(logits, packed.targets)
