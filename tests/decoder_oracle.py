"""A slow decoder for references of methods that cut inside: one sample, row by row, on the rows that are left.

Of the stock model it takes weights, norms, MLPs, and the first layer's inputs; attention is written out.
"""

import math

import pytest
import torch

from tiny_models import IMAGE, build_inputs, image_tokens, row_alone, samples_of, tiny_pair


class SlowDecoder:
    """
    Attributes:
        rows (`list[int]`): Columns of the prompt that are left.
        vision, queries (`list[int]`): Those of vision tokens, and those of text that may rank them.
        hidden (`dict[int, torch.Tensor]`): What the next layer is given of each row.
        parts (`dict[int, list]`): Of the layer that ran last, for each row: what attention was given and what it put
            out, and the same of the MLP.
        number (`int`): The layer that runs next.
    """

    def __init__(self, stock, inputs, may_rank):
        ids, seen = inputs["input_ids"][0].tolist(), {}
        self.model, self.number, self.parts = stock.model.language_model, 0, {}
        self.rows = list(range(len(ids)))
        self.vision = [column for column in self.rows if ids[column] == IMAGE]
        self.queries = [column for column in self.rows if ids[column] != IMAGE and may_rank[column]]
        with self.model.layers[0].register_forward_pre_hook(
            lambda module, given, named: seen.update(named, hidden=given[0]), with_kwargs=True
        ):
            stock(**inputs)
        self.hidden = dict(enumerate(seen["hidden"][0]))
        self.cos, self.sin = (table[0] for table in seen["position_embeddings"])

    def heads(self, projection, given, row, rotated=True):
        found = projection(given).split(len(self.cos[row]))
        half = len(self.cos[row]) // 2
        if rotated:
            found = [h * self.cos[row] + torch.cat([-h[half:], h[:half]]) * self.sin[row] for h in found]
        return found

    def attention(self, number):
        """In layer `number`, on what `hidden` holds: what each row pays each column, mean over the heads; for each row
        what attention is given, and what it puts out; and its rotated keys."""
        layer = self.model.layers[number].self_attn
        given = {row: self.model.layers[number].input_layernorm(self.hidden[row]) for row in self.rows}
        keys = {row: self.heads(layer.k_proj, given[row], row) for row in self.rows}
        values = {row: self.heads(layer.v_proj, given[row], row, rotated=False) for row in self.rows}
        paid, output = {}, {}
        for row in self.rows:
            columns, weights, mixed = [column for column in self.rows if column <= row], [], []
            queries = self.heads(layer.q_proj, given[row], row)
            for head, query in enumerate(queries):
                group = head * len(keys[row]) // len(queries)
                logits = torch.stack([keys[column][group] for column in columns]) @ query / math.sqrt(len(query))
                weights.append(logits.softmax(0))
                mixed.append(weights[-1] @ torch.stack([values[column][group] for column in columns]))
            paid[row] = dict(zip(columns, (sum(weights) / len(weights)).tolist()))
            output[row] = layer.o_proj(torch.cat(mixed))
        return paid, given, output, keys

    def run(self):
        """Runs the next layer; returns what its rows paid, and its keys."""
        layer = self.model.layers[self.number]
        paid, given, output, keys = self.attention(self.number)
        for row in self.rows:
            between = self.hidden[row] + output[row]
            of_mlp = layer.post_attention_layernorm(between)
            self.parts[row] = [(given[row], output[row]), (of_mlp, layer.mlp(of_mlp))]
            self.hidden[row] = between + layer.mlp(of_mlp)
        self.number += 1
        return paid, keys

    def keep(self, chosen):
        self.rows = [row for row in self.rows if row in chosen or row not in self.vision]
        self.vision = [row for row in self.vision if row in chosen]

    def must(self):
        """The vision token that ends the sample, if one does."""
        return [row for row in self.vision if row == self.rows[-1]]

    def received(self, paid, raters):
        """What each vision token receives, mean over the raters that see it; `None` where none does."""
        scores = {}
        for column in self.vision:
            shares = [paid[row][column] for row in raters if row > column]
            scores[column] = sum(shares) / len(shares) if shares else None
        return scores

    def best(self, scores, count):
        """The `count` best; columns that no rater sees compete, in order, with their quantile among their own kind."""
        seen = sorted((c for c in scores if scores[c] is not None), key=lambda c: (-scores[c], c))
        unseen = [c for c in scores if scores[c] is None]
        unseen = self.must() + [c for c in unseen if c not in self.must()]
        quantile = {c: (place + 0.5) / len(kind) for kind in (seen, unseen) for place, c in enumerate(kind)}
        order = sorted(quantile, key=lambda c: (c not in self.must(), quantile[c], c))
        return order[:count]


def assert_equals(reference, method, family, batch, some_text=False, **model):
    """The method's cuts on a batch are the reference's on each sample alone.

    Args:
        reference: Takes a [`SlowDecoder`], the layers before which it cuts, and how many tokens it keeps; yields for
            each cut the columns chosen, and their scores before it (`None` where there is none).
        batch: A name of `samples_of`, or the samples.
        some_text: Every third row of the text may not rank.
    """
    stock, pruned = tiny_pair(family, **model)
    for name, parameter in stock.model.language_model.named_parameters():
        if "norm" in name:  # of ones, they would not show where one is left out
            torch.nn.init.uniform_(parameter, 0.2, 2.0)
    pruned.load_state_dict(stock.state_dict(), strict=False)
    samples = samples_of(batch, family) if isinstance(batch, str) else batch
    inputs = build_inputs(family, samples)
    may_rank = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    if some_text:
        may_rank = inputs["input_ids"] % 3 > 0
    outputs = pruned(**inputs, query_mask=may_rank, schedule=method)
    cuts, checked = method.cuts(pruned.model), 0
    for row, sample in enumerate(samples):
        sizes = [image_tokens(family, *part) for part in sample if isinstance(part, tuple)]
        if not sizes:
            continue
        single, valid = row_alone(family, inputs, samples, row)
        slow = SlowDecoder(stock, single, may_rank[row, valid].tolist())
        counts = [sum(cut.keep(size) for size in sizes) for cut in cuts]
        vision = set(slow.vision)
        found = reference(slow, [cut.layer for cut in cuts], counts)
        for step, (chosen, scores) in enumerate(found):
            kept = outputs.kept_mask[step][row, valid].nonzero().flatten().tolist()
            assert set(kept) & vision == set(chosen), (row, step)
            for column, score in enumerate(outputs.vision_scores[step][row, valid].tolist()):
                if scores.get(column) is None:
                    assert math.isnan(score), (row, step, column)
                else:
                    assert score == pytest.approx(scores[column], rel=1e-3, abs=1e-5), (row, step, column)
            checked += 1
        assert step == len(cuts) - 1
    assert checked


def run_until(slow, layer):
    """Runs the layers before `layer`; returns what the last of them paid, and its keys."""
    last = None
    while slow.number < layer:
        last = slow.run()
    return last


# Different images, rows of text alone, images one after the other, and samples without text on one side.
CASES = [
    *(("llava", batch, False) for batch in ("mixed", "image_first", "image_last")),
    ("llava", "padded", True),
    ("llava_next", "padded", False),
    ("qwen2_vl", "mixed", False),
    ("qwen2_vl", "two_images", True),
    # Text sees the first image alone.
    ("llava", [[2, (32, 32), 3, (32, 32)]], False),
]
