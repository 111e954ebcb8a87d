"""Slow and literal references, written from the paper and DESIGN, without the code they judge.

`masked` runs a *stock* model at full length and hides the dropped tokens' keys from the layers that must not see them,
by an attention function registered with transformers. `first_cut` and `second_cut` choose tokens with plain loops.
"""

import contextlib
import math
from fractions import Fraction
from functools import cache

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

HIDDEN_KEYS = []  # for each decoder layer, (batch, sequence) bool; empty outside `masked`


def _masked_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    weights = query @ key.transpose(2, 3) * scaling + attention_mask
    hidden = HIDDEN_KEYS[module.layer_idx][:, None, None, :]
    weights = weights.masked_fill(hidden, torch.finfo(weights.dtype).min)
    weights = weights.float().softmax(-1).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("masked_oracle", _masked_attention)
AttentionMaskInterface.register("masked_oracle", eager_mask)


@contextlib.contextmanager
def masked(stock, kept_mask, cut_layers, attention_mask, num_layers):
    """The stock model as a masked oracle; `kept_mask[i]` holds from decoder layer `cut_layers[i]` on."""
    before = stock.config.text_config._attn_implementation
    stock.model.language_model.set_attn_implementation("masked_oracle")
    for layer in range(num_layers):
        hidden = torch.zeros_like(kept_mask[0])
        for kept, first_layer in zip(kept_mask, cut_layers):
            if layer >= first_layer:
                hidden = ~kept & attention_mask.bool()
        HIDDEN_KEYS.append(hidden)
    try:
        yield
    finally:
        HIDDEN_KEYS.clear()
        stock.model.language_model.set_attn_implementation(before)


def half_up(number):
    return math.floor(number + Fraction(1, 2))


def written(number):
    """The fraction that a float was written as; tests write small ones."""
    return Fraction(number).limit_denominator(10_000)


def keep_counts(tokens, ratio, layers, k, rho):
    """DESIGN's formula for (R1, R2), as it is written there, in exact fractions."""
    n, length, avg, rho = tokens, layers, written(ratio) * tokens, written(rho)
    if k == length:
        return (max(1, half_up(avg)),) * 2
    r2 = max(1, min(math.floor(avg), half_up(avg * length / (rho * k + length - k))))
    r1 = max(r2, half_up((avg * length - (length - k) * r2) / k))
    if r1 >= n:
        r1 = n
        r2 = max(1, half_up((avg * length - k * n) / (length - k)))
    return r1, r2


def lpm_score(pruner, feature):
    """Keep minus drop logit of one feature vector, in float64."""
    weights = {name: value.double() for name, value in pruner.state_dict().items()}
    x = feature.double()
    x = (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-5) * weights["norm.weight"] + weights["norm.bias"]
    h = weights["hidden.weight"] @ x + weights["hidden.bias"]
    h = torch.stack([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in h])
    drop, keep = weights["output.weight"] @ h + weights["output.bias"]
    return (keep - drop).item()


def first_cut(pruner, features, count, diversity):
    """Indices kept of one image. `features` is a list of vectors, None for structure."""
    scores = {i: lpm_score(pruner, feature) for i, feature in enumerate(features) if feature is not None}
    structure = [i for i, feature in enumerate(features) if feature is None]
    by_score = max(1, count - round(diversity * count))
    order = sorted(scores, key=lambda i: (-scores[i], i)) + structure
    chosen = order[:by_score]

    @cache
    def similarity(i, j):
        return torch.nn.functional.cosine_similarity(features[i].double(), features[j].double(), dim=0).item()

    while len(chosen) < count:
        best, best_similarity = None, None
        for i in scores:
            if i in chosen:
                continue
            similarities = [similarity(i, j) for j in chosen if features[j] is not None]
            if best is None or max(similarities) < best_similarity:
                best, best_similarity = i, max(similarities)
        chosen.append(best if best is not None else next(i for i in structure if i not in chosen))
    return sorted(chosen)


def second_cut(attention, vision_columns, text_rows, count, last_only=False):
    """Indices kept of one sample by attention `(heads, sequence, sequence)`; every column must be seen by a row."""
    if last_only:
        text_rows = text_rows[-1:]
    scores = {}
    for column in vision_columns:
        rows = [row for row in text_rows if row >= column]
        scores[column] = sum(attention[:, row, column].mean().item() for row in rows) / len(rows)
    return sorted(sorted(scores, key=lambda c: (-scores[c], c))[:count]), scores
