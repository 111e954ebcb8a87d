"""The cache through whatever a conversation does to it, against lists of the keys that each layer must hold."""

from dataclasses import dataclass, field
from itertools import count

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import DynamicCache

from learnpruner.keys_learnpruner import PrunedCache, PrunedCacheLayer

from property_settings import PROPERTY

pytestmark = pytest.mark.core

LAYERS = 3
MOST_SAMPLES = 6
FLAGS = st.lists(st.booleans(), min_size=6, max_size=6)


@dataclass
class Layer:
    """What one layer must hold.

    Of each sample, one `(position, valid, value)` for each key, in order. `position` is the token's place in the
    conversation; what fills up has none. `history` has the cuts before the layer, of each pruned prompt. `kept` is
    what the cut right before the layer left of the last pruned prompt, of each sample, and `scores` what it left that
    by; both `None` where there is no cut.
    """

    keys: list[list[tuple[int | None, bool, int]]]
    history: tuple[int, ...] = ()
    kept: list[list[bool]] | None = None
    scores: list[list[int]] | None = None


@dataclass
class Conversation:
    """What the caller knows: which tokens of each sample are not padding. And what the layers must hold."""

    seen: list[list[bool]]
    layers: list[Layer] = field(default_factory=list)
    # Tokens behind the last pruned prompt; of a conversation without one, all.
    behind: int = 0

    @property
    def batch(self):
        return len(self.seen)

    @property
    def length(self):
        return len(self.seen[0])

    def select(self, samples):
        self.seen = [list(self.seen[sample]) for sample in samples]
        for layer in self.layers:
            layer.keys = [list(layer.keys[sample]) for sample in samples]
            if layer.kept is not None:
                layer.kept = [layer.kept[sample] for sample in samples]
                layer.scores = [layer.scores[sample] for sample in samples]


def bools(rows):
    return torch.tensor(rows, dtype=torch.bool)


def valid_of(keys):
    return [[valid for _, valid, _ in sample] for sample in keys]


def states(keys):
    """Keys and values of one head that say which they are, each `(batch, 1, length, 1)`."""
    values = torch.tensor([[value for *_, value in sample] for sample in keys], dtype=torch.float32)
    return values[:, None, :, None], -values[:, None, :, None]


def read(tensor):
    return tensor[:, 0, :, 0].tolist()


class CacheMachine(RuleBasedStateMachine):
    """A cache that the caller made, a pruned one from its first pruned prompt on."""

    @initialize(batch=st.integers(1, 3), length=st.integers(0, 2), flags=FLAGS)
    def begin(self, batch, length, flags):
        """With some text, or with nothing."""
        self.values = count(1)
        self.given = self.cache = DynamicCache()
        self.talk = Conversation([[] for _ in range(batch)], [Layer([[] for _ in range(batch)]) for _ in range(LAYERS)])
        if length:
            self.append_text(length, flags, wanted=False)

    def pruned(self):
        return isinstance(self.cache, PrunedCache)

    def holds_keys(self):
        return self.talk.length > 0

    # What the caller may pass as attention_mask: the conversation with the new tokens, or nothing where all since the
    # last pruned prompt are valid. The cache remembers the padding that stood before.
    def mask(self, new, wanted):
        behind = [row[len(row) - self.talk.behind :] for row in self.talk.seen]
        if wanted or not all(map(all, behind)) or not all(map(all, new)):
            return bools([old + own for old, own in zip(self.talk.seen, new)])
        return None

    def past_valid(self, layer, mask, query_length):
        """As the decoder asks: nothing stands for all valid."""
        keys = self.talk.layers[layer].keys
        found = self.cache.layers[layer].key_valid(mask, query_length)
        expected = valid_of(keys)
        assert all(map(all, expected)) if found is None else found.tolist() == expected
        return found

    @rule(length=st.integers(1, 3), flags=FLAGS, wanted=st.booleans())
    def append_text(self, length, flags, wanted):
        """Text, as generate or a turn without images adds it; a sample may be filled up on the left."""
        new = [[place > 0 or flag for place in range(length)] for flag in flags[: self.talk.batch]]
        mask = self.mask(new, wanted)
        start = self.talk.length
        for number, layer in enumerate(self.talk.layers):
            if self.pruned():
                self.past_valid(number, mask, length)
            added = [[(start + i, valid, next(self.values)) for i, valid in enumerate(own)] for own in new]
            layer.keys = [old + own for old, own in zip(layer.keys, added)]
            self.update(number, added)
        self.talk.seen = [old + own for old, own in zip(self.talk.seen, new)]
        self.talk.behind += length

    def update(self, number, added):
        found = self.cache.update(*states(added), number)
        assert [read(part) for part in found] == [read(part) for part in states(self.talk.layers[number].keys)]

    @rule(data=st.data(), length=st.integers(1, 5), answer=st.integers(0, 2), wanted=st.booleans())
    def prune_a_prompt(self, data, length, answer, wanted):
        """A prompt with cuts, and an answer behind it that was run in the same call.

        Each row leaves before a layer, or never: padding with the first cut, the last row of a sample never.
        """
        self.cache = PrunedCache.adopt(self.cache, LAYERS)
        talk, sequence, start = self.talk, length + answer, self.talk.length
        pads = [data.draw(st.integers(0, length - 1)) for _ in range(talk.batch)]
        leaving = st.lists(st.integers(0, LAYERS), min_size=length - 1, max_size=length - 1)
        leaves = [[*data.draw(leaving), *[LAYERS] * (answer + 1)] for _ in range(talk.batch)]
        new = [[place >= pad for place in range(sequence)] for pad in pads]
        cuts = sorted({at for own, pad in zip(leaves, pads) for at in own[pad:] if at < LAYERS})
        mask = self.mask(new, wanted)
        rows = [[(start + i, valid, next(self.values)) for i, valid in enumerate(own)] for own in new]
        for number, layer in enumerate(talk.layers):
            if number in cuts:
                rows, leaves = self.cut(rows, leaves, number)
            past = self.past_valid(number, mask, sequence)
            own_valid = bools(valid_of(rows))
            if past is None and all(map(all, valid_of(rows))):
                key_valid = None
            else:
                past = torch.ones(talk.batch, len(layer.keys[0]), dtype=torch.bool) if past is None else past
                key_valid = torch.cat([past, own_valid], dim=1)
            held = self.cache.layers[number]
            made = sum(at <= number for at in cuts)
            held.hold(key_valid, sequence - len(rows[0]), len(rows[0]) - answer, made)
            layer.history += (made,)
            layer.kept = layer.scores = held.kept_mask = held.vision_scores = None
            if number in cuts:
                there = [{position for position, valid, _ in own if valid} for own in rows]
                layer.kept = [[start + place in own for place in range(length)] for own in there]
                layer.scores = [[next(self.values) for _ in own] for own in layer.kept]
                held.kept_mask, held.vision_scores = bools(layer.kept), torch.tensor(layer.scores)
            layer.keys = [old + own for old, own in zip(layer.keys, rows)]
            self.update(number, rows)
        talk.seen = [old + [place >= pad for place in range(sequence)] for old, pad in zip(talk.seen, pads)]
        talk.behind = answer

    def cut(self, rows, leaves, number):
        """Takes out padding and what leaves here, and fills samples up on the left, to the longest."""
        pairs = [[(row, at) for row, at in zip(*sample) if row[1] and at > number] for sample in zip(rows, leaves)]
        longest = max(map(len, pairs))
        filled = [
            [((None, False, next(self.values)), LAYERS) for _ in range(longest - len(own))] + own for own in pairs
        ]
        return [[row for row, _ in own] for own in filled], [[at for _, at in own] for own in filled]

    @rule(tokens=st.integers(0, 6))
    def crop(self, tokens):
        """Tokens behind the last pruned prompt can be taken back, no others."""
        talk = self.talk
        if self.pruned() and talk.layers[0].history and tokens > talk.behind:
            with pytest.raises(ValueError, match="Cannot crop"):
                self.cache.crop(-tokens)
            return
        tokens = min(tokens, talk.length)
        self.cache.crop(-tokens)
        if tokens:
            talk.seen = [own[:-tokens] for own in talk.seen]
            for layer in talk.layers:
                layer.keys = [own[:-tokens] for own in layer.keys]
            talk.behind -= tokens

    @precondition(holds_keys)
    @rule(data=st.data())
    def reorder(self, data):
        beams = data.draw(
            st.lists(st.integers(0, self.talk.batch - 1), min_size=self.talk.batch, max_size=self.talk.batch)
        )
        self.cache.reorder_cache(torch.tensor(beams))
        self.talk.select(beams)

    @precondition(holds_keys)
    @rule(repeats=st.integers(1, 3))
    def repeat(self, repeats):
        if self.talk.batch * repeats <= MOST_SAMPLES:
            self.cache.batch_repeat_interleave(repeats)
            self.talk.select([sample for sample in range(self.talk.batch) for _ in range(repeats)])

    @precondition(holds_keys)
    @rule(data=st.data())
    def choose(self, data):
        samples = data.draw(st.lists(st.integers(0, self.talk.batch - 1), min_size=1, max_size=MOST_SAMPLES))
        self.cache.batch_select_indices(torch.tensor(samples))
        self.talk.select(samples)

    @precondition(pruned)
    @rule(batch=st.integers(1, 3))
    def reset(self, batch):
        """What begins then may be of another number of samples."""
        self.cache.reset()
        self.talk = Conversation([[] for _ in range(batch)], [Layer([[] for _ in range(batch)]) for _ in range(LAYERS)])

    @precondition(pruned)
    @rule(query_length=st.integers(0, 2), off=st.sampled_from([-1, 1, 2]))
    def mask_of_another_length(self, query_length, off):
        """A mask that is not of the whole conversation is refused wherever it would be read."""
        width = self.talk.length + query_length + off
        if width >= 0:
            mask = torch.ones(self.talk.batch, width, dtype=torch.bool)
            for layer in self.cache.layers:
                with pytest.raises(ValueError, match="covers the whole conversation"):
                    layer.key_valid(mask, query_length)

    @invariant()
    def keys_are_those_of_the_lists(self):
        assert self.given.layers is self.cache.layers
        for number, layer in enumerate(self.talk.layers):
            if self.holds_keys():
                held = self.cache.layers[number]
                assert [read(held.keys), read(held.values)] == [read(part) for part in states(layer.keys)]
                places = [[position for position, valid, _ in own if valid] for own in layer.keys]
                assert all(own == sorted(set(own)) for own in places)

    @invariant()
    def lengths_are_the_callers(self):
        for cache in (self.cache, self.given):
            for number, layer in enumerate(self.talk.layers):
                assert cache.get_seq_length(number) == self.talk.length
                physical = len(layer.keys[0])
                for query_length in (1, 3):
                    sizes = cache.get_mask_sizes(query_length, number)
                    assert sizes == (physical + query_length, self.talk.length - physical)

    @precondition(pruned)
    @invariant()
    def padding_is_known(self):
        """With the caller's mask, and without it where none is needed; for the new tokens, whatever it says."""
        for new in ([], [True], [False, True]):
            own = [new] * self.talk.batch
            for wanted in (True, False):
                mask = self.mask(own, wanted)
                for number in range(LAYERS):
                    self.past_valid(number, mask, len(new))

    @precondition(pruned)
    @invariant()
    def layers_of_one_history_share_a_mask(self):
        for layer, held in zip(self.talk.layers, self.cache.layers):
            assert held.history == layer.history
            for other, own in zip(self.talk.layers, self.cache.layers):
                if layer.history == other.history:
                    assert held.get_mask_sizes(1) == own.get_mask_sizes(1)
                    assert valid_of(layer.keys) == valid_of(other.keys)

    @precondition(pruned)
    @invariant()
    def records_are_the_last_prompts(self):
        cut = [layer for layer in self.talk.layers if layer.kept is not None]
        if not cut:
            assert self.cache.kept_mask is None
            assert self.cache.vision_scores is None
        else:
            assert [record.tolist() for record in self.cache.kept_mask] == [layer.kept for layer in cut]
            assert [record.tolist() for record in self.cache.vision_scores] == [layer.scores for layer in cut]


TestCache = CacheMachine.TestCase
TestCache.settings = settings(PROPERTY, max_examples=80, stateful_step_count=15)


def test_what_heads_kept_has_its_place():
    """It follows samples and beams as keys do; attention over it is not built, and says so."""
    layer = PrunedCacheLayer()
    states = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 2, 3, 4)
    layer.update(states, states)
    layer.head_valid = torch.tensor([[[True, True, False], [False, True, True]], [[True, False, True]] * 2])
    kept = layer.head_valid
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([3, 0, 0, 2]))
    layer.batch_select_indices(torch.tensor([0, 1]))
    assert torch.equal(layer.head_valid, kept[[1, 0]])
    assert layer.keys[:, 0, 0, 0].tolist() == [1, 0]
    with pytest.raises(NotImplementedError, match="heads kept different keys"):
        layer.key_valid(None, 1)
