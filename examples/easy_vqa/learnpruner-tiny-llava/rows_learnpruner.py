# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""How rows leave a stock text model, and are put back: hooks on the model and on its layers.

The stock model runs: its loop, norm, rotary embeddings and outputs. Where a cut falls, the hook in front of a layer
hands on fewer rows, with the mask and rotary embeddings of those that stay; text rows always stay. The hook behind the
model puts the rows back where the caller had them. Logical is the caller's sequence, physical what is held.
"""

from contextlib import ExitStack
from functools import partial
from inspect import signature

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache

from .attention_learnpruner import GATED, GATES, HARD, RUN, Note, install_probe, log_gates, reach_keywords
from .compat_learnpruner import CACHE, DEEPSTACK_FEATURES, DEEPSTACK_WHERE, create_causal_mask, installed_names
from .cuts_learnpruner import Cut, DecoderState, watching
from .guards_learnpruner import refuse_prepared_mask
from .keys_learnpruner import LOST_CACHE, PrunedCache, PrunedCacheLayer
from .plan_learnpruner import PruningCall
from .prompt_learnpruner import send


class PhysicalRows:
    """The rows of one call that are still there."""

    def __init__(self, batch: int, length: int, device: torch.device, valid: torch.Tensor | None):
        self.index = torch.arange(length, device=device).expand(batch, -1)  # (batch, length): the logical row of each
        self.valid = valid  # (batch, length), bool: False at padding; None: all valid

    @property
    def length(self) -> int:
        return self.index.shape[1]

    def keep(self, kept: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Drops all rows but `kept`, `(batch, length)` bool with `lengths[i]` of sample i, filling up on the left.
        Returns where each row that stays was, `(batch, new length)` int64."""
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
        index = self.index.to(physical.device).view(*self.index.shape, *[1] * (physical.dim() - 2))
        if self.valid is not None:
            physical = physical.masked_fill(~self.valid.to(physical.device).view(index.shape), fill)
        logical = physical.new_full((len(physical), sequence, *physical.shape[2:]), fill)
        return logical.scatter(1, index.expand_as(physical), physical)


def gather_rows(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """`(batch or 1, length, d)` -> `(batch, new length, d)`: the rows `order`, `(batch, new length)` int64."""
    order = order.to(states.device).unsqueeze(-1).expand(-1, -1, states.shape[-1])
    return states.expand(len(order), -1, -1).gather(1, order)


class Run:
    """One call of a text model that has rows missing: what its hooks share. It travels among the layers' arguments, and
    is no dataclass: FSDP2 and DataParallel copy those that they find there.

    Args:
        call: The prompt's; `None` for a step on a cache that was pruned before.
        attention_mask (`torch.Tensor` of shape `(batch, past + sequence)`, bool, *optional*): The caller's.
        sequence: Rows of the call before any cut.
        added (each `(batch, sequence, hidden)`): What the stock loop adds behind its first layers (DeepStack).
    """

    def __init__(self, decoder: nn.Module, call: PruningCall | None, attention_mask, sequence: int, added: list):
        self.decoder, self.call, self.cache = decoder, call, None
        self.checkpointed = decoder.gradient_checkpointing and decoder.training and torch.is_grad_enabled()
        self.attention_mask, self.sequence, self.added = attention_mask, sequence, added
        self.cuts: dict[int, Cut] = {} if call is None else {cut.layer: cut for cut in call.schedule}
        # What was decided in front of each layer, which a second pass of it (recomputation under checkpointing)
        # replays: where the rows that stay were, (batch, length) int64 or None; arguments for the layer; `rows.index`.
        self.steps: list[tuple[torch.Tensor | None, dict, torch.Tensor]] = []
        # Of the layer that runs: its rows, its input, what its attention takes (keys that are not padding; the cuts
        # that its cache saw before: layers with the same share a mask), how many keys it will hold, the probe's note.
        self.rows = self.hidden_states = self.position_embeddings = None
        self.mask = self.key_valid = self.history = None
        self.num_keys, self.note, self.watch = 0, Note(), ExitStack()

    def begin(self, hidden_states: torch.Tensor, arguments: dict) -> None:
        """In front of the first layer."""
        batch, length, _ = hidden_states.shape
        valid = None
        if self.attention_mask is not None and (self.call is None or min(self.call.plan.lengths(0)) < length):
            valid = self.attention_mask[:, -length:].to(hidden_states.device)
        self.rows = PhysicalRows(batch, length, hidden_states.device, valid)
        self.position_embeddings = arguments["position_embeddings"]
        if self.cache is None:
            self.adopt(arguments.get(CACHE))

    def adopt(self, cache: Cache | None) -> None:
        """Takes the caller's cache, or the one that the stock model made. Layers under checkpointing fill none."""
        if cache is not None and self.call is not None and not self.checkpointed:
            cache = self.call.cache = PrunedCache.adopt(cache, self.decoder.config.num_hidden_layers)
        self.cache = None if self.checkpointed else cache

    def cut(self, number: int, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Makes the cut in front of a layer, if one falls there. Returns where the rows that stay were."""
        if number not in self.cuts:
            return None
        cut, rows, plan, made = self.cuts[number], self.rows, self.call.plan, len(self.call.decisions)
        _, text = self._kinds()
        if number == 0:
            scores, chosen = plan.scores, rows.to_physical(plan.kept)
        else:
            state = self._state(number - 1, hidden_states, self.hidden_states, self.note.take())
            scores = cut.score(state)
            must = state.vision & (state.index == plan.last.unsqueeze(1).to(state.index.device))
            counts = send([row[2 + made] for row in plan.counts], scores.device)
            chosen = cut.score.select(scores.masked_fill(must, torch.inf), state, counts)
            scores = rows.to_logical(scores.to(text.device), self.sequence, torch.nan)
        order = rows.keep(chosen.to(text.device) | text, plan.lengths(1 + made))
        kept = rows.to_logical(torch.ones_like(rows.index, dtype=torch.bool), self.sequence, False)
        self.call.decisions.append((kept, scores))
        self.position_embeddings = tuple(gather_rows(part, order) for part in self.position_embeddings)
        return order

    def announce(self, number: int, hidden_states: torch.Tensor) -> dict:
        """Tells the cache what a layer is about to be given. Returns arguments in place of the stock model's."""
        held = None if self.cache is None else self.cache.layers[number]
        history = None if held is None else held.history
        stale = number == 0 or number in self.cuts or history != self.history
        if stale:
            self.key_valid, self.history = self._key_valid(held), history
        self.num_keys = self.rows.length + (0 if held is None else held.physical_length)
        if held is not None and self.call is not None:
            decisions, prompt = self.call.decisions, self.sequence - self.call.plan.answer_length
            gone = self.sequence - self.rows.length
            held.hold(self.key_valid, gone, prompt - gone, len(decisions))
            held.kept_mask = held.vision_scores = None
            if number in self.cuts:
                held.kept_mask, held.vision_scores = (record[:, :prompt] for record in decisions[-1])
        if stale:
            self.mask = self._mask(number, hidden_states)
        if self.cuts:
            self.hidden_states, self.note = hidden_states, Note(wanted=number + 1 in self.cuts)
            seen = partial(self._state, number, hidden_states, hidden_states)
            self.watch = watching(self.cuts.values(), number, seen)
        # Packed sequences were refused, so the layers need positions for nothing but the rotary embeddings; the gaps
        # left by a cut would even look like packing to flash attention.
        return {"attention_mask": self.mask, "position_embeddings": self.position_embeddings, "position_ids": None}

    def _key_valid(self, held: PrunedCacheLayer | None) -> torch.Tensor | None:
        """Validity of the keys `held` before this call and of its own rows; `None`: all valid."""
        own = self.rows.valid
        if held is None or held.physical_length == 0:
            return own
        past = held.key_valid(self.attention_mask, self.sequence)
        if past is None and own is None:
            return None
        own = torch.ones_like(self.rows.index, dtype=torch.bool) if own is None else own
        past = own.new_ones(len(own), held.physical_length) if past is None else past.to(own.device)
        return torch.cat([past, own], dim=1)

    def _mask(self, number: int, hidden_states: torch.Tensor) -> torch.Tensor | None:
        valid = self.key_valid
        if self.cache is not None and valid is not None:
            # The mask counts keys from the first logical one: the cut ones stand in front, as padding.
            valid = F.pad(valid, (self.cache.layers[number].num_pruned, 0), value=False)
        # That there is padding is known here: looking for it would make the host wait.
        options = {CACHE: self.cache, "layer_idx": number, "allow_is_causal_skip": valid is None}
        return create_causal_mask(self.decoder.config, inputs_embeds=hidden_states, attention_mask=valid, **options)

    def _kinds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of vision and of text, each `(batch, length)` bool."""
        vision, valid = self.rows.to_physical(self.call.plan.vision), self.rows.valid
        return (vision, ~vision) if valid is None else (vision & valid, ~vision & valid)

    def _state(self, number: int, output: torch.Tensor, given: torch.Tensor, attended=None) -> DecoderState:
        """What a score sees of a layer that ran, or is about to: what it was `given`, and its output."""
        rows, plan, device = self.rows, self.call.plan, output.device
        vision, text = self._kinds()
        queries = text if plan.query_mask is None else text & rows.to_physical(plan.query_mask)
        return DecoderState(
            decoder=self.decoder,
            number=number,
            hidden_states=given.to(device),
            output=output,
            position_embeddings=tuple(part.to(device) for part in self.position_embeddings),
            attended=None if attended is None else attended.to(device),
            key_valid=None if self.key_valid is None else self.key_valid.to(device),
            index=rows.index.to(device),
            vision=vision.to(device),
            queries=queries.to(device),
            num_text=max(text for text, *_ in plan.counts),
            vision_scores=rows.to_physical(plan.scores).to(device),
        )


def install_hooks(decoder: nn.Module) -> None:
    """Lets a stock text model run a schedule of cuts; replaces hooks that are there already. They change nothing
    without a planned call (`pruning` among the arguments) or a pruned cache."""
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
    """In front of the text model: gates its attention in training, or begins a [`Run`]."""
    arguments = installed_names(arguments)
    call = arguments.pop("pruning", None)
    if call is not None and call.zero is not None:
        arguments["inputs_embeds"] = arguments["inputs_embeds"] + call.zero.to(arguments["inputs_embeds"])
    call = None if call is None or not call.acts else call
    if call is None and not any(isinstance(given, PrunedCache) for given in (arguments.get(CACHE), *args)):
        return args, arguments
    if call is not None and not torch.compiler.is_compiling():
        for number, layer in enumerate(decoder.layers):
            # A wrapper (torch's checkpoint_wrapper) has the layer inside.
            hooks = [hook for module in layer.modules() for hook in module._forward_pre_hooks.values()]
            if not any(isinstance(hook, partial) and hook.func is enter_layer for hook in hooks):
                raise RuntimeError(_unhooked(number))
    if args:
        arguments = dict(zip(signature(decoder.forward).parameters, args)) | arguments
    cache, mask, inputs_embeds = (arguments.get(name) for name in (CACHE, "attention_mask", "inputs_embeds"))
    if isinstance(cache, PrunedCache):
        cache.check_edits()
    refuse_prepared_mask(mask)
    if call is not None:
        call.taken = True
    if inputs_embeds is None:
        inputs_embeds = decoder.get_input_embeddings()(arguments.pop("input_ids"))
    # The stock model hands a prepared mask on as it is, and makes none: each layer's comes from its hook or its gates.
    prepared = inputs_embeds.new_zeros(1, 1, 1, 1)
    if call is not None and call.soft:
        return (), {**arguments, **_gate(decoder, call, mask, inputs_embeds.device), "attention_mask": prepared}
    where, features = (arguments.pop(name, None) for name in (DEEPSTACK_WHERE, DEEPSTACK_FEATURES))
    nothing = torch.zeros_like(inputs_embeds) if features else None
    added = [nothing.masked_scatter(where.unsqueeze(-1), feature.to(nothing)) for feature in features or ()]
    mask = None if mask is None else mask.bool()
    run = Run(decoder, call, mask, inputs_embeds.shape[1], added)
    run.adopt(cache)
    own = {"inputs_embeds": inputs_embeds, CACHE: cache, "return_dict": True, RUN: run}
    return (), {**arguments, **own, "attention_mask": prepared}


def _gate(decoder: nn.Module, call: PruningCall, mask: torch.Tensor | None, device: torch.device) -> dict:
    """What the layers are given in training: the whole prompt, and gates."""
    gates = log_gates(call.plan.gates.to(device), None if mask is None else mask.to(device))
    for layer in (layer for layer in decoder.layers if layer.gradient_checkpointing):
        layer._gradient_checkpointing_func = partial(reach_keywords, layer._gradient_checkpointing_func)
    return {GATES: gates, GATED: call, HARD: None if call.plan.hard is None else call.plan.hard.to(device)}


def leave(decoder: nn.Module, args: tuple, arguments: dict, outputs) -> None:
    """Behind the text model: checks that every hook was passed and every cut made, and puts the rows back."""
    run, gating = arguments.get(RUN), arguments.get(GATED)
    for layer in (layer for layer in decoder.layers if gating is not None and layer.gradient_checkpointing):
        layer._gradient_checkpointing_func = layer._gradient_checkpointing_func.args[0]
    if outputs is not None and gating is not None and gating.gated < decoder.config.num_hidden_layers:
        raise RuntimeError(
            "The pruner is to be trained, and a layer's attention did not ask transformers for its function, so that "
            "no vision token was weighed there: was the layer or its attention module replaced?"
        )
    if run is None:
        return
    run.watch.close()
    if outputs is None:  # an error
        return
    if len(run.steps) != decoder.config.num_hidden_layers or (run.call and len(run.call.decisions) != len(run.cuts)):
        raise RuntimeError(_unhooked(len(run.steps)))
    if run.call and run.cache is None and outputs.get(CACHE) is not None and not run.checkpointed:
        raise RuntimeError(LOST_CACHE)
    if run.call is not None:
        outputs.last_hidden_state = run.rows.to_logical(outputs.last_hidden_state, run.sequence, 0)


def enter_layer(number: int, layer: nn.Module, args: tuple, arguments: dict) -> tuple[tuple, dict] | None:
    """In front of a decoder layer: makes the cut that falls there, and hands on the rows that stay."""
    run = arguments.get(RUN)
    if run is None:
        return None
    if number > len(run.steps):
        raise RuntimeError(_unhooked(len(run.steps)))
    hidden_states, *rest = args or (arguments.pop("hidden_states"),)
    first = number == len(run.steps)  # else again, in the backward pass: nothing is decided twice
    with torch.no_grad():
        if number == 0 and first:
            run.begin(hidden_states, arguments)
        order = run.cut(number, hidden_states.detach()) if first else run.steps[number][0]
    if order is not None:
        hidden_states = gather_rows(hidden_states, order)  # this alone carries gradients
    if first:
        with torch.no_grad():
            run.steps.append((order, run.announce(number, hidden_states.detach()), run.rows.index))
    return (hidden_states, *rest), {**arguments, **run.steps[number][1]}


def leave_layer(number: int, layer: nn.Module, args: tuple, arguments: dict, output: torch.Tensor):
    """Behind a decoder layer: checks its cache, and adds what the stock loop would (DeepStack)."""
    run = arguments.get(RUN)
    if run is None:
        return None
    run.watch.close()
    if run.cache is not None and run.cache.layers[number].physical_length != run.num_keys:
        raise RuntimeError(LOST_CACHE)
    if number < len(run.added):
        output = output + gather_rows(run.added[number], run.steps[number][2]).to(output.device)
    return output


def _unhooked(number: int) -> str:
    return (
        f"Layer {number} of the text model ran without its hook, so no cut is made there. If layers were replaced or "
        "taken out, call `install_hooks(model.model.language_model)` of learnpruner.rows_learnpruner, or pass "
        "pruner_ratio=1.0 to run the stock model."
    )
