# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""How rows leave a stock text model, and are put back: hooks on the model and on its layers.

The stock model runs: its loop, norm, rotary embeddings, masks and outputs. Where a cut falls, the hook in front of a layer
hands on fewer rows, with the mask and the rotary embeddings of those that stay; the hook behind the model puts the rows
back where the caller had them. Logical is the caller's sequence, physical what is held; both meet here, and in the cache,
which keeps the same account of its keys.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from inspect import signature

import torch
from torch import nn
from torch.nn import functional as F
from transformers.masking_utils import create_causal_mask

from .compat_learnpruner import CACHE, DEEPSTACK_FEATURES, DEEPSTACK_WHERE, installed_names
from .cuts_learnpruner import Cut, DecoderState, watching
from .guards_learnpruner import refuse_gating, refuse_prepared_mask
from .keys_learnpruner import LOST_CACHE, PrunedCache, PrunedCacheLayer, is_pruned
from .plan_learnpruner import PruningCall
from .probe_learnpruner import RUN, Note, install_probe
from .prompt_learnpruner import send
from .scores_learnpruner import gated_causal_mask


class PhysicalRows:
    """The rows of one call that are still there.

    Attributes:
        index (`torch.Tensor` of shape `(batch, length)`, int64): The logical row of each.
        valid (`torch.Tensor` of shape `(batch, length)`, bool, or `None`): False at padding.
    """

    def __init__(self, batch: int, length: int, device: torch.device, valid: torch.Tensor | None):
        self.index = torch.arange(length, device=device).expand(batch, -1)
        self.valid = valid

    @property
    def length(self) -> int:
        return self.index.shape[1]

    def keep(self, kept: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Drops all rows but `kept`, `(batch, length)` bool with `lengths[i]` of sample i, filling up on the left.

        Returns:
            `torch.Tensor` of shape `(batch, new length)`, int64: where each row that stays was.
        """
        longest = max(lengths)
        order = kept.long().argsort(dim=1, stable=True)[:, self.length - longest :]
        self.valid = kept.gather(1, order) if min(lengths) < longest else None
        self.index = self.index.gather(1, order)
        return order

    def to_physical(self, logical: torch.Tensor) -> torch.Tensor:
        """`(batch, sequence)` -> `(batch, length)`."""
        return logical.to(self.index.device).gather(1, self.index)

    def to_logical(self, physical: torch.Tensor, sequence: int, fill: float | bool) -> torch.Tensor:
        """`(batch, length, ...)` -> `(batch, sequence, ...)`, `fill` where a row is gone."""
        index, valid = self.index.to(physical.device), self.valid
        if valid is not None:
            gone = ~valid.to(physical.device).view(*valid.shape, *(1,) * (physical.dim() - 2))
            physical = physical.masked_fill(gone, fill)
        logical = physical.new_full((physical.shape[0], sequence, *physical.shape[2:]), fill)
        return logical.scatter(1, index.view(*index.shape, *(1,) * (physical.dim() - 2)).expand_as(physical), physical)


def gather_rows(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """`(batch or 1, length, d)` -> `(batch, new length, d)`: the rows `order`, `(batch, new length)` int64."""
    order = order.to(states.device).unsqueeze(-1).expand(-1, -1, states.shape[-1])
    return states.expand(len(order), -1, -1).gather(1, order)


@dataclass
class Step:
    """What the hook in front of a layer decided, so that a second pass of the layer (recomputation under checkpointing)
    is the same.

    Attributes:
        order (`torch.Tensor` of shape `(batch, length)`, int64, or `None`): Where the rows that stay were, at a cut.
        arguments (`dict`): The layer's, in place of the stock model's.
        index (`torch.Tensor` of shape `(batch, length)`, int64): The logical row of each row.
    """

    order: torch.Tensor | None
    arguments: dict
    index: torch.Tensor


class Run:
    """One call of a text model that has rows missing: what its hooks share. It travels among the layers' keyword
    arguments.

    Attributes:
        decoder (`nn.Module`): The text model.
        call ([`PruningCall`], *optional*): The prompt's; `None` for a step on a cache that was pruned before.
        cache ([`PrunedCache`], *optional*): The caller's, or the one that the stock model makes.
        attention_mask (`torch.Tensor` of shape `(batch, past + sequence)`, bool, *optional*): The caller's.
        sequence (`int`): Rows of the call before any cut.
        added (`list[torch.Tensor]`, each `(batch, sequence, hidden)`): What the stock loop would add to the rows behind
            its first layers (DeepStack).
        rows ([`PhysicalRows`]): Those still there, from the first layer on.
        position_embeddings: cos and sin of the unpruned prompt's positions, each `(batch or 1, length, head_dim)`.
        steps (`dict[int, Step]`): What each layer's hook decided.
        note ([`Note`]): What the probe found.
        adopted (`bool`): Whether the stock model made the cache.
    """

    # No dataclass: FSDP2 and DataParallel copy those that they find among arguments.
    def __init__(self, decoder: nn.Module, call: PruningCall | None, cache, attention_mask, sequence: int, added: list):
        self.decoder, self.call, self.cache = decoder, call, cache
        self.attention_mask, self.sequence, self.added = attention_mask, sequence, added
        self.cuts: dict[int, Cut] = {} if call is None else {cut.layer: cut for cut in call.schedule}
        self.rows = self.position_embeddings = self.mask = self.key_valid = self.history = None
        self.steps: dict[int, Step] = {}
        self.note, self.adopted, self.watch = Note(), False, ExitStack()
        # The layer that runs, what it was given, and how many keys it will hold.
        self.number, self.num_keys = -1, 0
        self.hidden_states = self.given_embeddings = None

    def begin(self, hidden_states: torch.Tensor, arguments: dict) -> None:
        """In front of the first layer."""
        batch, length, _ = hidden_states.shape
        mask = None if self.attention_mask is None else self.attention_mask[:, -length:].to(hidden_states.device)
        if self.call is not None and min(self.call.plan.lengths(0)) == length:
            mask = None
        self.rows = PhysicalRows(batch, length, hidden_states.device, mask)
        self.position_embeddings = arguments["position_embeddings"]
        if self.call is not None and self.cache is None and arguments.get(CACHE) is not None:
            self.cache, self.adopted = PrunedCache.adopt(arguments[CACHE], self.depth), True

    @property
    def depth(self) -> int:
        return self.decoder.config.num_hidden_layers

    def cut(self, number: int, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Makes the cut in front of a layer, if one falls there. Returns the rows that stay, `(batch, length)` int64."""
        cut, rows, plan = self.cuts.get(number), self.rows, self.call and self.call.plan
        if cut is None:
            return None
        record, (vision, text) = self.call.record, self._kinds()
        if cut.layer == 0:
            scores, chosen = plan.scores, rows.to_physical(plan.kept)
        else:
            state = self._state(hidden_states, self.note.take())
            scores = cut.score(state)
            must = (rows.index == plan.last.unsqueeze(1).to(rows.index.device)) & vision
            counts = send([row[2 + len(record.decisions)] for row in plan.counts], scores.device)
            chosen = cut.score.select(scores.masked_fill(must.to(scores.device), torch.inf), state, counts)
            chosen = chosen.to(text.device)
            scores = rows.to_logical(scores.to(text.device), self.sequence, torch.nan)
        order = rows.keep(chosen | text, plan.lengths(1 + len(record.decisions)))
        kept = rows.to_logical(torch.ones_like(rows.index, dtype=torch.bool), self.sequence, False)
        record.decisions.append((kept, scores))
        self.position_embeddings = tuple(gather_rows(part, order) for part in self.position_embeddings)
        return order

    def announce(self, number: int, hidden_states: torch.Tensor) -> dict:
        """Tells the cache what layer `number` is about to be given. Returns the layer's arguments, where they are not
        the stock model's."""
        rows, held = self.rows, None if self.cache is None else self.cache.layers[number]
        stale = number == 0 or number in self.cuts or (held is not None and held.history != self.history)
        if stale:
            self.key_valid = rows.valid if held is None else _join(held, self.attention_mask, rows, self.sequence)
        if held is not None:
            self.history, self.num_keys = held.history, held.physical_length + rows.length
            if self.call is not None:
                self._hold(number, held)
        if stale:
            self.mask = self._mask(number, hidden_states)
        self.number, self.hidden_states, self.given_embeddings = number, hidden_states, self.position_embeddings
        self.note = Note(wanted=number + 1 in self.cuts)
        self.watch = watching(self.cuts.values(), number, partial(self._state, hidden_states, None))
        # Packed sequences were refused, so the layers need positions for nothing but the rotary embeddings; the gaps
        # left by a cut would even look like packing to flash attention.
        return {
            "attention_mask": self.mask,
            "position_embeddings": self.position_embeddings,
            "position_ids": None,
        }

    def _hold(self, number: int, held: PrunedCacheLayer) -> None:
        plan, decisions = self.call.plan, self.call.record.decisions
        length = self.rows.length
        held.hold(self.key_valid, self.sequence - length, length - plan.answer_length, len(decisions))
        held.kept_mask = held.vision_scores = None
        if number in self.cuts:
            prompt = slice(self.sequence - plan.answer_length)
            held.kept_mask, held.vision_scores = (record[:, prompt] for record in decisions[-1])

    def _mask(self, number: int, hidden_states: torch.Tensor) -> torch.Tensor | None:
        key_valid = self.key_valid
        if self.cache is not None and key_valid is not None:
            # The mask counts keys from the first logical one: the cut ones stand in front, as padding.
            key_valid = F.pad(key_valid, (self.cache.layers[number].num_pruned, 0), value=False)
        return create_causal_mask(
            config=self.decoder.config,
            inputs_embeds=hidden_states,
            attention_mask=key_valid,
            **{CACHE: self.cache},
            layer_idx=number,
            # That there is padding is known here: looking for it would make the host wait.
            allow_is_causal_skip=key_valid is None,
        )

    def _kinds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of vision and of text, each `(batch, length)` bool."""
        vision, valid = self.rows.to_physical(self.call.plan.vision), self.rows.valid
        return (vision, ~vision) if valid is None else (vision & valid, ~vision & valid)

    def _state(self, output: torch.Tensor, attended) -> DecoderState:
        """What a score sees of the layer that ran last, or is about to run."""
        rows, plan, device = self.rows, self.call.plan, output.device
        vision, text = self._kinds()
        queries = text if plan.query_mask is None else text & rows.to_physical(plan.query_mask)
        return DecoderState(
            decoder=self.decoder,
            number=self.number,
            hidden_states=self.hidden_states.to(device),
            output=output,
            position_embeddings=tuple(part.to(device) for part in self.given_embeddings),
            attended=None if attended is None else attended.to(device),
            key_valid=None if self.key_valid is None else self.key_valid.to(device),
            index=rows.index.to(device),
            vision=vision.to(device),
            queries=queries.to(device),
            num_text=plan.num_text,
            vision_scores=rows.to_physical(plan.scores).to(device),
        )


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


def install_hooks(decoder: nn.Module) -> None:
    """Lets a stock text model run a schedule of cuts. Hooks that are there already are replaced.

    Text tokens are never cut. Positions, rotary embeddings and everything that the caller sees are the unpruned prompt's.
    Without a planned call (`pruning` among the arguments) and without a pruned cache the hooks change nothing.
    """
    _install(decoder, partial(enter), partial(leave), always_call=True)  # after an error, too
    for number, layer in enumerate(decoder.layers):
        install_probe(layer.self_attn)
        _install(layer, partial(enter_layer, number), partial(leave_layer, number))


def _install(module: nn.Module, before: partial, behind: partial, **options) -> None:
    for hooks, hook in ((module._forward_pre_hooks, before), (module._forward_hooks, behind)):
        for key in [key for key, there in hooks.items() if isinstance(there, partial) and there.func is hook.func]:
            del hooks[key]
    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(behind, with_kwargs=True, **options)


def enter(decoder: nn.Module, args: tuple, arguments: dict) -> tuple[tuple, dict]:
    """In front of the text model."""
    arguments = installed_names(arguments)
    call = arguments.pop("pruning", None)
    if call is not None and not torch.compiler.is_compiling():
        for number, layer in enumerate(decoder.layers):
            if not _has_hook(layer):
                raise RuntimeError(_unhooked(number))
    if call is None and not any(is_pruned(cache) for cache in (arguments.get(CACHE), *args)):
        return args, arguments
    arguments = {**dict(zip(list(signature(decoder.forward).parameters), args)), **arguments}
    cache, attention_mask = arguments.get(CACHE), arguments.get("attention_mask")
    inputs_embeds = arguments.get("inputs_embeds")
    refuse_prepared_mask(attention_mask)
    if call is not None and call.soft:
        refuse_gating(decoder.config)
        gates = call.plan.gates.to(inputs_embeds.device)
        return (), {**arguments, "attention_mask": gated_causal_mask(gates, attention_mask, inputs_embeds.dtype)}
    if inputs_embeds is None:
        inputs_embeds = decoder.get_input_embeddings()(arguments.pop("input_ids"))
    if cache is not None and call is not None:
        cache = PrunedCache.adopt(cache, decoder.config.num_hidden_layers)
    added = []
    if arguments.get(DEEPSTACK_FEATURES) is not None:
        where, features = arguments.pop(DEEPSTACK_WHERE), arguments.pop(DEEPSTACK_FEATURES)
        nothing = torch.zeros_like(inputs_embeds)
        added = [nothing.masked_scatter(where.unsqueeze(-1), feature.to(nothing)) for feature in features]
    mask = None if attention_mask is None else attention_mask.bool()
    run = Run(decoder, call, cache, mask, inputs_embeds.shape[1], added)
    own = {
        "inputs_embeds": inputs_embeds,
        CACHE: cache,
        # Prepared masks are handed on as they are, so that the stock model makes none: each layer's comes from its hook.
        "attention_mask": inputs_embeds.new_zeros(1, 1, 1, 1),
        "return_dict": True,
        RUN: run,
    }
    return (), {**arguments, **own}


def leave(decoder: nn.Module, args: tuple, arguments: dict, outputs) -> None:
    """Behind the text model."""
    run = arguments.get(RUN)
    if run is None:
        return
    run.watch.close()
    if outputs is None:  # an error
        return
    made = 0 if run.call is None else len(run.call.record.decisions)
    if list(run.steps) != list(range(run.depth)) or made != len(run.cuts):
        raise RuntimeError(_unhooked(len(run.steps)))
    if run.adopted:
        outputs[CACHE] = run.cache
    if run.call is not None:
        outputs.last_hidden_state = run.rows.to_logical(outputs.last_hidden_state, run.sequence, 0)


def enter_layer(number: int, layer: nn.Module, args: tuple, arguments: dict) -> tuple[tuple, dict] | None:
    """In front of a decoder layer."""
    run = arguments.get(RUN)
    if run is None:
        return None
    hidden_states, *rest = args
    if number in run.steps:  # again, in the backward pass: nothing is decided twice
        step = run.steps[number]
        hidden_states = hidden_states if step.order is None else gather_rows(hidden_states, step.order)
        return (hidden_states, *rest), {**arguments, **step.arguments}
    if number != len(run.steps):
        raise RuntimeError(_unhooked(len(run.steps)))
    with torch.no_grad():
        if number == 0:
            run.begin(hidden_states, arguments)
        order = run.cut(number, hidden_states.detach())
    # The gather of rows alone carries gradients.
    hidden_states = hidden_states if order is None else gather_rows(hidden_states, order)
    with torch.no_grad():
        own = run.announce(number, hidden_states.detach())
    run.steps[number] = Step(order, own, run.rows.index)
    return (hidden_states, *rest), {**arguments, **own}


def leave_layer(
    number: int, layer: nn.Module, args: tuple, arguments: dict, output: torch.Tensor
) -> torch.Tensor | None:
    """Behind a decoder layer."""
    run = arguments.get(RUN)
    if run is None:
        return None
    run.watch.close()
    if run.cache is not None and run.cache.layers[number].physical_length != run.num_keys:
        raise RuntimeError(LOST_CACHE)
    if number >= len(run.added):
        return None
    return output + gather_rows(run.added[number], run.steps[number].index).to(output.device)


def _has_hook(layer: nn.Module) -> bool:
    # A wrapper (torch's checkpoint_wrapper) has the layer inside.
    hooks = (hook for module in layer.modules() for hook in module._forward_pre_hooks.values())
    return any(isinstance(hook, partial) and hook.func is enter_layer for hook in hooks)


def _unhooked(number: int) -> str:
    return (
        f"Layer {number} of the text model ran without its hook, so that no cut is made there. If layers were replaced "
        "or taken out after the model was made, call `install_hooks(model.model.language_model)` of "
        "learnpruner.rows_learnpruner, or pass pruner_ratio=1.0 to run the stock model."
    )
