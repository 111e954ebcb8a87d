# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The KV cache whose layers hold fewer keys (physical) than tokens were seen (logical)."""

import torch
from transformers import Cache, DynamicCache

from .compat_learnpruner import DynamicLayer
from .plan_learnpruner import PruningCall


class PrunedCacheLayer(DynamicLayer):
    """One decoder layer's keys and values after cuts. Layers may hold different rows; heads will, by `head_valid`.

    Outside, a cache counts in the caller's tokens: generate, positions, slicing of a next turn and crop all read
    `get_seq_length`. So that is the logical length, and only the mask learns the physical one.
    """

    def __init__(self):
        super().__init__()
        self.num_pruned = 0  # logical minus physical length
        self.prefix_length = 0  # physical length at the last cut; behind it, each key is one of the last tokens seen
        self.prefix_valid = None  # (batch, prefix_length), bool: False at padding; None: all valid
        self.head_valid = None  # (batch, kv_heads, prefix_length), bool: what each head kept; None: as the layer
        self.history = ()  # for each pruned prompt, how many cuts came before this layer
        # What the cut right before this layer decided, each (batch, sequence), in the caller's coordinates.
        self.kept_mask = self.vision_scores = None
        self.own = None, None  # the keys and values as this class left them

    @classmethod
    def from_dynamic(cls, layer: DynamicLayer) -> "PrunedCacheLayer":
        pruned = cls()
        pruned.__dict__.update(layer.__dict__)
        pruned.own = pruned.keys, pruned.values
        return pruned

    @property
    def physical_length(self) -> int:
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        return self.physical_length + self.num_pruned

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.physical_length + query_length, self.num_pruned

    def key_valid(self, attention_mask: torch.Tensor | None, query_length: int) -> torch.Tensor | None:
        """Which keys held before a call of `query_length` tokens are not padding: `(batch, physical_length)` bool, or
        `None`: all. `attention_mask` is the caller's, `(batch, logical length)` bool, of past and call."""
        if self.head_valid is not None:
            raise NotImplementedError("Attention over a cache whose heads kept different keys is not supported yet.")
        if attention_mask is None and self.prefix_valid is None:
            return None
        suffix, prefix = self.physical_length - self.prefix_length, self.prefix_valid
        if attention_mask is None:
            return torch.cat([prefix, prefix.new_ones(len(prefix), suffix)], dim=1)
        if prefix is None:
            prefix = attention_mask.new_ones(len(attention_mask), self.prefix_length)
        end = attention_mask.shape[1] - query_length
        if end != self.get_seq_length():
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns; on a cache it covers the whole conversation: "
                f"{self.get_seq_length()} tokens that the cache has seen and {query_length} new ones."
            )
        return torch.cat([prefix, attention_mask[:, end - suffix : end]], dim=1)

    def hold(self, key_valid: torch.Tensor | None, num_pruned: int, length: int, cuts: int) -> None:
        """Announces a pruned prompt before its keys are added: `num_pruned` of its rows are gone after so many `cuts`,
        `length` will be held. `key_valid`, `(batch, past + length)` bool or `None`, is False at padding."""
        self.num_pruned += num_pruned
        self.prefix_length = self.physical_length + length
        self.prefix_valid = None if key_valid is None else key_valid[:, : self.prefix_length]
        self.history += (cuts,)

    def update(self, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        states = super().update(*args, **kwargs)
        self.own = self.keys, self.values
        return states

    def crop(self, tokens_to_remove: int) -> None:
        removable = self.physical_length - self.prefix_length
        if self.history and -tokens_to_remove > removable:
            raise ValueError(
                f"Cannot crop {-tokens_to_remove} tokens: only the {removable} tokens after the pruned prompt can be "
                "removed. Run the prompt again with a fresh cache instead."
            )
        super().crop(tokens_to_remove)
        self.own = self.keys, self.values

    def reset(self) -> None:
        self.__init__()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(lambda tensor: tensor[indices])

    def _select(self, select) -> None:
        self.own = self.keys, self.values
        for name in ("prefix_valid", "head_valid", "kept_mask", "vision_scores"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else select(tensor))


class PrunedCache(DynamicCache):
    """A [`DynamicCache`] of [`PrunedCacheLayer`]s: what becomes of one in a pruned prompt."""

    @classmethod
    def adopt(cls, cache: DynamicCache, num_layers: int) -> "PrunedCache":
        """Makes a cache able to hold pruned layers, in place: it stays the object that the caller has."""
        if not isinstance(cache, cls):
            cache.layers[:] = [PrunedCacheLayer.from_dynamic(layer) for layer in cache.layers]
            cache.layers += [PrunedCacheLayer() for _ in range(num_layers - len(cache.layers))]
            cache.__class__, cache.own_layers = cls, [*cache.layers]
        return cache

    def check_edits(self) -> None:
        """Raises `ValueError` where others replaced layers, keys or values: which tokens they are is not known then."""
        states = (pair for layer in self.layers for pair in zip((layer.keys, layer.values), layer.own))
        if self.layers != self.own_layers or any(held is not own for held, own in states):
            raise ValueError(EDITED_CACHE)

    @property
    def kept_mask(self) -> tuple[torch.Tensor, ...] | None:
        """Survivors of each cut of the last pruned prompt, each `(batch, sequence)` bool, caller's coordinates."""
        return self._records("kept_mask")

    @property
    def vision_scores(self) -> tuple[torch.Tensor, ...] | None:
        """Scores at each cut of the last pruned prompt, each `(batch, sequence)` float32, NaN where not scored."""
        return self._records("vision_scores")

    def _records(self, name: str) -> tuple[torch.Tensor, ...] | None:
        return tuple(getattr(layer, name) for layer in self.layers if getattr(layer, name) is not None) or None


EDITED_CACHE = (
    "The layers of a pruned prompt's cache, or their keys or values, were replaced, sliced or copied into another "
    "cache: which tokens they stand for is lost. Edit a cache by its own methods (crop, reorder_cache, "
    "batch_select_indices, batch_repeat_interleave) or copy.deepcopy, or run the prompt again with a fresh cache."
)
LOST_CACHE = (
    "The KV cache of a pruned prompt was lost or swapped on its way through transformers: the answer would be wrong. "
    "Run `learnpruner doctor`, or pass pruner_ratio=1.0 to run the stock model."
)


def check_cache(cache: Cache | None, given: Cache | None, call: PruningCall) -> None:
    """Raises `RuntimeError` unless, behind a pruned prompt and each step on its cache, the cache that came back is the
    one that was given, or that the stock model made. That each layer grew by its rows, the hooks see."""
    pruned = call.decisions or isinstance(given, PrunedCache)
    expected = {id(each.layers) for each in (given, call.cache) if each is not None and pruned}
    if expected and (cache is not None or call.decisions) and expected != {id(getattr(cache, "layers", None))}:
        raise RuntimeError(LOST_CACHE)
