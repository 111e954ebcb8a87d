# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Cut 2: the attention that text rows pay to vision columns in one layer, on any attention backend. And the mask that
lets gates stand in for cut 1 in training.
"""

import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

# Query rows scored at a time: bounds the memory of a long question over a long image.
ROWS_AT_A_TIME = 128
# What is left of a key whose gate is 0: nothing that shows in float32, and enough for its gradient to be the right one.
GATE_FLOOR = 1e-8


def attention_received(
    attention: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    rows: torch.Tensor,
    weights: torch.Tensor,
    keys: torch.Tensor | None,
    key_valid: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean attention that each current token receives from the weighted rows that can see it.

    Softmax over all keys a row may see, mean over heads, then mean over rows (LearnPruner, arXiv 2604.23950, stage 2).
    Dividing by the rows that can see a column, not by all, keeps an early image from winning by its place. Only
    `rows` x keys products are formed, so the model's own attention backend stays as it is. All in float32.

    Args:
        attention (`nn.Module`): A Llama, Mistral or Qwen2 attention module.
        hidden_states (`torch.Tensor` of shape `(batch, length, hidden)`): Its input, after the layer's norm.
        position_embeddings: cos and sin, each `(batch or 1, length, head_dim)`.
        rows (`torch.Tensor` of shape `(batch, queries)`, int64): Indices of the query rows among `length`.
        weights (`torch.Tensor` of shape `(batch, queries)`, bool): Which of `rows` count.
        keys (`torch.Tensor` of shape `(batch, kv_heads, past + length, head_dim)`, *optional*):
            Rotated keys of the layer from the cache; computed from `hidden_states` where there is none.
        key_valid (`torch.Tensor` of shape `(batch, past + length)`, bool, *optional*): Keys that are not padding.

    Returns:
        `tuple`: attention received, `(batch, length)` float32, and whether any counted row sees the column,
        `(batch, length)` bool.
    """
    batch, length, _ = hidden_states.shape

    def heads(states: torch.Tensor) -> torch.Tensor:
        return states.view(batch, -1, states.shape[-1] // attention.head_dim, attention.head_dim).transpose(1, 2)

    def at_rows(states: torch.Tensor) -> torch.Tensor:
        return states.expand(batch, -1, -1).gather(1, rows.unsqueeze(-1).expand(-1, -1, states.shape[-1]))

    cos, sin = position_embeddings
    if keys is None:
        keys = heads(attention.k_proj(hidden_states))
        keys, _ = apply_rotary_pos_emb(keys, keys, cos, sin)
    queries = heads(attention.q_proj(at_rows(hidden_states)))
    queries, _ = apply_rotary_pos_emb(queries, queries, at_rows(cos), at_rows(sin))

    with torch.autocast(hidden_states.device.type, enabled=False):
        return _mean_over_rows(queries.float() * attention.scaling, keys.float(), key_valid, rows, weights, length)


def _mean_over_rows(queries, keys, key_valid, rows, weights, length):
    past = keys.shape[2] - length
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1).mT
    columns = torch.arange(past + length, device=rows.device)
    received = keys.new_zeros(len(rows), length)
    watchers = torch.zeros_like(received)
    for start in range(0, rows.shape[1], ROWS_AT_A_TIME):
        chunk = slice(start, start + ROWS_AT_A_TIME)
        visible = columns <= (rows[:, chunk] + past).unsqueeze(-1)
        if key_valid is not None:
            visible = visible & key_valid.unsqueeze(1)
        logits = queries[:, :, chunk] @ keys
        # Not -inf: a row of a text-free sample sees nothing, and its softmax must stay a number.
        logits = logits.masked_fill(~visible.unsqueeze(1), torch.finfo(torch.float32).min)
        counted = weights[:, chunk].unsqueeze(-1)
        received += (logits.softmax(-1).mean(1) * counted)[..., past:].sum(1)
        watchers += (visible & counted)[..., past:].sum(1)
    return received / watchers.clamp(min=1), watchers > 0


def gated_causal_mask(gates: torch.Tensor, attention_mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The causal mask of a prompt, with each key's exponential in the softmax multiplied by its gate.

    The masked softmax of Dynamic-LLaVA (arXiv 2412.00876): at gates of 0 and 1 it is the cut itself, in between it is
    differentiable, and a dropped key still has a gradient. (Gates times embeddings would be undone by the layers'
    normalisation.) A row sees itself whatever its gate.

    Args:
        gates (`torch.Tensor` of shape `(batch, sequence)`, float32): In [0, 1], 1 for text.
        attention_mask (`torch.Tensor` of shape `(batch, sequence)`, *optional*): 0 at padding.
        dtype (`torch.dtype`): Of the layers' input.

    Returns:
        `torch.Tensor` of shape `(batch, 1, sequence, sequence)`: what is added to the attention logits.
    """
    length = gates.shape[1]
    own = torch.eye(length, dtype=torch.bool, device=gates.device)
    seen = torch.ones_like(own).tril()
    if attention_mask is not None:
        seen = (seen & attention_mask.bool().unsqueeze(1)) | own
    bias = (gates + GATE_FLOOR).log().to(dtype).unsqueeze(1).masked_fill(own, 0)
    return bias.masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)
