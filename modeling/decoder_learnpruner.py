# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The decoder: stock text models run through a schedule of cuts.

Rows are converted between logical (the caller's sequence) and physical (what is held) here alone; the cache keeps the
same account of its keys.
"""

from functools import partial

import torch
from transformers import DynamicCache, LlamaModel, MistralModel, Qwen2_5_VLTextModel, Qwen2Model, Qwen2VLTextModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_learnpruner import gated_causal_mask
from .cache_learnpruner import PrunedCache, PrunedCacheLayer, is_pruned
from .call_learnpruner import PruningCall
from .cuts_learnpruner import Cut, DecoderState, watching
from .guards_learnpruner import refuse_gating, refuse_prepared_mask
from .layout_learnpruner import send


class PhysicalRows:
    """The rows of one call that are still there, and what belongs to each.

    Attributes:
        hidden_states (`torch.Tensor` of shape `(batch, length, hidden)`).
        position_embeddings: cos and sin of the unpruned prompt's positions, each `(batch or 1, length, head_dim)`.
        index (`torch.Tensor` of shape `(batch, length)`, int64): The logical row of each.
        valid (`torch.Tensor` of shape `(batch, length)`, bool, or `None`): False at padding.
    """

    def __init__(self, hidden_states, position_embeddings, valid):
        batch, length = hidden_states.shape[:2]
        self.hidden_states = hidden_states
        self.position_embeddings = position_embeddings
        self.valid = valid
        self.index = torch.arange(length, device=hidden_states.device).expand(batch, -1)

    @property
    def length(self) -> int:
        return self.index.shape[1]

    def keep(self, kept: torch.Tensor, lengths: list[int]) -> None:
        """Drops all rows but `kept`, `(batch, length)` bool with `lengths[i]` of sample i, filling up on the left."""
        longest = max(lengths)
        order = kept.long().argsort(dim=1, stable=True)[:, self.length - longest :]
        self.valid = kept.gather(1, order) if min(lengths) < longest else None
        self.index = self.index.gather(1, order)
        self.hidden_states = _gather_rows(self.hidden_states, order)
        self.position_embeddings = tuple(_gather_rows(part, order) for part in self.position_embeddings)

    def to_physical(self, logical: torch.Tensor) -> torch.Tensor:
        """`(batch, sequence)` -> `(batch, length)`."""
        return logical.to(self.index.device).gather(1, self.index)

    def to_logical(self, physical: torch.Tensor, sequence: int, fill: float | bool) -> torch.Tensor:
        """`(batch, length, ...)` -> `(batch, sequence, ...)`, `fill` where a row is gone."""
        if self.valid is not None:
            gone = ~self.valid.view(*self.valid.shape, *(1,) * (physical.dim() - 2))
            physical = physical.masked_fill(gone, fill)
        logical = physical.new_full((physical.shape[0], sequence, *physical.shape[2:]), fill)
        index = self.index.view(*self.index.shape, *(1,) * (physical.dim() - 2)).expand_as(physical)
        return logical.scatter(1, index, physical)


def _gather_rows(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    order = order.to(states.device).unsqueeze(-1).expand(-1, -1, states.shape[-1])
    return states.expand(len(order), -1, -1).gather(1, order)


class PrunedDecoderMixin:
    """Runs a stock text model through a schedule of cuts; without one, the stock forward runs.

    Text tokens are never cut. Positions, rotary embeddings and everything the caller sees are the unpruned prompt's.
    """

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pruning: PruningCall | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            pruning ([`PruningCall`], *optional*): The planned call; its decisions are recorded there.
            The other arguments are the stock model's.

        Returns:
            The stock output; `last_hidden_state` has the caller's length, zeros where a row was dropped, while
            `hidden_states` and `attentions` are physical.
        """
        arguments = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            **kwargs,
        }
        if pruning is not None and pruning.gates is not None:
            refuse_prepared_mask(attention_mask)
            refuse_gating(self.config)
            gates = pruning.gates.to(inputs_embeds.device)
            arguments["attention_mask"] = gated_causal_mask(gates, attention_mask, inputs_embeds.dtype)
            return super().forward(inputs_embeds=inputs_embeds, **arguments)
        if pruning is None and not is_pruned(past_key_values):
            return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **arguments)

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        sequence = inputs_embeds.shape[1]
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(sequence, device=inputs_embeds.device) + seen).unsqueeze(0)
        if position_ids.dim() == 3 and len(position_ids) == 4:
            # M-RoPE's three, behind the text's, which say nothing but whether sequences are packed.
            position_ids = position_ids[1:]
        if attention_mask is not None:
            refuse_prepared_mask(attention_mask)
            attention_mask = arguments["attention_mask"] = attention_mask.bool()
        rows = PhysicalRows(
            inputs_embeds,
            self.rotary_emb(inputs_embeds, position_ids=position_ids),
            None if attention_mask is None else attention_mask[:, -sequence:],
        )
        del arguments["position_ids"]
        outputs = self._forward_physical(rows=rows, sequence=sequence, pruning=pruning, **arguments, return_dict=True)
        if pruning is not None:
            outputs.last_hidden_state = rows.to_logical(outputs.last_hidden_state, sequence, 0)
        return outputs

    @merge_with_config_defaults
    @capture_outputs
    def _forward_physical(
        self,
        rows: PhysicalRows,
        sequence: int,
        pruning: PruningCall | None,
        attention_mask: torch.Tensor | None,
        past_key_values: DynamicCache | None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        cuts = {} if pruning is None else {cut.layer: cut for cut in pruning.schedule}
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None and pruning is not None:
            past_key_values = PrunedCache.adopt(past_key_values, self.config.num_hidden_layers)
        if pruning is not None and min(text + vision for text, vision, *_ in pruning.counts) == rows.length:
            rows.valid = None

        mask = key_valid = history = previous = None
        for number, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            if number in cuts:
                self._cut(cuts[number], rows, sequence, pruning, previous)
            held = None if past_key_values is None else past_key_values.layers[number]
            stale = number == 0 or number in cuts or (held is not None and held.history != history)
            if stale:
                key_valid = rows.valid if held is None else _join(held, attention_mask, rows, sequence)
            if held is not None:
                history = held.history
            if pruning is not None and held is not None:
                held.hold(
                    key_valid, sequence - rows.length, rows.length - pruning.answer_length, len(pruning.decisions)
                )
                held.kept_mask = held.vision_scores = None
                if number in cuts:
                    prompt = slice(sequence - pruning.answer_length)
                    held.kept_mask, held.vision_scores = (record[:, prompt] for record in pruning.decisions[-1])
            if stale:
                mask = self._mask(number, rows.hidden_states, past_key_values, key_valid)

            previous = (number, rows.hidden_states, held, key_valid, rows.position_embeddings)
            state = partial(self._state, rows, pruning, previous)
            with watching(cuts.values(), number, state):
                # Packed sequences were refused, so the layers need positions for nothing but the rotary embeddings;
                # the gaps left by a cut would even look like packing to flash attention.
                rows.hidden_states = layer(
                    rows.hidden_states,
                    attention_mask=mask,
                    position_embeddings=rows.position_embeddings,
                    position_ids=None,
                    past_key_values=past_key_values,
                    use_cache=use_cache,
                    **kwargs,
                )
        hidden_states = self.norm(rows.hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)

    def _mask(self, number, hidden_states, past_key_values, key_valid):
        if past_key_values is not None and key_valid is not None:
            # The mask counts keys from the first logical one: the cut ones stand in front, as padding.
            pruned = past_key_values.layers[number].num_pruned
            key_valid = torch.nn.functional.pad(key_valid, (pruned, 0), value=False)
        return create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=key_valid,
            past_key_values=past_key_values,
            layer_idx=number,
            # That there is padding is known here: looking for it would make the host wait.
            allow_is_causal_skip=key_valid is None,
        )

    def _state(self, rows: PhysicalRows, pruning: PruningCall, previous) -> DecoderState:
        number, hidden_states, held, key_valid, position_embeddings = previous
        device = rows.hidden_states.device
        vision, text = _kinds(rows, pruning)
        queries = text if pruning.query_mask is None else text & rows.to_physical(pruning.query_mask)
        return DecoderState(
            decoder=self,
            number=number,
            hidden_states=hidden_states.to(device),
            output=rows.hidden_states,
            position_embeddings=tuple(part.to(device) for part in position_embeddings),
            keys=None if held is None else held.keys,
            key_valid=None if key_valid is None else key_valid.to(device),
            index=rows.index.to(device),
            vision=vision.to(device),
            queries=queries.to(device),
            num_text=max(text for text, *_ in pruning.counts),
            vision_scores=rows.to_physical(pruning.vision_scores).to(device),
        )

    def _cut(self, cut: Cut, rows: PhysicalRows, sequence: int, pruning: PruningCall, previous) -> None:
        step = pruning.schedule.index(cut) + 2
        _, text = _kinds(rows, pruning)
        if cut.layer == 0:
            scores = pruning.vision_scores
            chosen = rows.to_physical(pruning.vision_kept)
        else:
            state = self._state(rows, pruning, previous)
            scores = cut.score(state)
            last = (rows.index == pruning.last.unsqueeze(1).to(rows.index.device)).to(scores.device) & state.vision
            counts = send([row[step] for row in pruning.counts], scores.device)
            chosen = cut.score.select(scores.masked_fill(last, torch.inf), state, counts).to(text.device)
            scores = rows.to_logical(scores.to(text.device), sequence, torch.nan)
        rows.keep(chosen | text, [row[0] + row[step] for row in pruning.counts])
        kept = rows.to_logical(torch.ones_like(rows.index, dtype=torch.bool), sequence, False)
        pruning.decisions.append((kept, scores))


def _kinds(rows: PhysicalRows, pruning: PruningCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of vision and of text, each `(batch, length)` bool."""
    vision = rows.to_physical(pruning.vision)
    return (vision, ~vision) if rows.valid is None else (vision & rows.valid, ~vision & rows.valid)


def _join(held: PrunedCacheLayer, attention_mask, rows: PhysicalRows, sequence: int) -> torch.Tensor | None:
    """Validity of the keys held before this call and of its own rows, `(batch, past + length)`; `None`: all valid."""
    if held.physical_length == 0:
        return rows.valid
    past = held.key_valid(attention_mask, sequence)
    if past is None and rows.valid is None:
        return None
    if past is None:
        past = rows.valid.new_ones(len(rows.valid), held.physical_length)
    own = torch.ones_like(rows.index, dtype=torch.bool) if rows.valid is None else rows.valid
    return torch.cat([past.to(own.device), own], dim=1)


# By `model_type` of the text model's configuration.
PRUNED_TEXT_MODELS = {
    stock.config_class.model_type: type(f"Pruned{stock.__name__}", (PrunedDecoderMixin, stock), {})
    for stock in (LlamaModel, MistralModel, Qwen2Model, Qwen2VLTextModel, Qwen2_5_VLTextModel)
}
