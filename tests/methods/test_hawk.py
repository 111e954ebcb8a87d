"""HAWK's choice against one sample, head, text token and vision token at a time: all vision tokens of a sample are one
set, as in the authors' code."""

import json
import math

import pytest
import torch

from learnpruner import Cut
from learnpruner.methods import METHODS
from learnpruner.methods.base import TopKImages

from largest import Largest
from tiny_models import FAMILIES, build_inputs, covering, image_tokens, samples_of, tiny_pair, with_videos

WEIGHTS = (0.1, 0.5, 0.0, 0.4)


def embedded(stock, inputs):
    """What the stock model gives its decoder, `(batch, sequence, hidden)`."""
    seen = []
    with (
        torch.no_grad(),
        stock.model.language_model.register_forward_pre_hook(
            lambda *of: seen.append(of[2]["inputs_embeds"]), with_kwargs=True
        ),
    ):
        stock(**inputs)
    return seen[0]


def reference(layer, texts, tokens, weights, variant):
    """Scores of one sample's vision tokens, `None` for newlines."""
    attention = layer.self_attn
    d = attention.head_dim
    groups = len(weights) // (attention.k_proj.out_features // d)
    queries = [attention.q_proj(layer.input_layernorm(token)) for token in texts]
    keys = [None if token is None else attention.k_proj(layer.input_layernorm(token)) for token in tokens]
    total = [None if key is None else 0.0 for key in keys]
    for head, weight in enumerate(weights):
        shared = head // groups
        column = {}
        for number, key in enumerate(keys):
            if key is not None:
                own = key[shared * d : (shared + 1) * d]
                products = [(query[head * d : (head + 1) * d] @ own).item() / math.sqrt(d) for query in queries]
                column[number] = sum(products) / len(products)
        length = math.sqrt(sum(value**2 for value in column.values())) if variant == "code" else 1.0
        for number, value in column.items():
            total[number] += weight * value / length
    return total


@pytest.mark.parametrize(
    ("family", "batch", "variant", "weights"),
    covering(with_videos(["mixed", "image_last"]), ("paper", "code"), (None, WEIGHTS)),
)
def test_the_choice_is_the_formulas(family, batch, variant, weights):
    stock, pruned = tiny_pair(family)
    samples = samples_of(batch, family)
    inputs = build_inputs(family, samples)
    ranking = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    ranking[:, -1] = batch == "image_last"
    method = METHODS["hawk"](0.4, variant=variant, head_weights=weights)
    outputs = pruned(**inputs, schedule=method, query_mask=ranking)
    layer, embeds = stock.model.language_model.layers[0], embedded(stock, inputs)
    vision = (inputs["input_ids"] == pruned.config.image_token_id) | (inputs["input_ids"] == 121)
    for row, sample in enumerate(samples):
        columns = vision[row].nonzero().flatten().tolist()
        texts = embeds[row][inputs["attention_mask"][row].bool() & ~vision[row] & ranking[row]]
        count, tokens = 0, [embeds[row, column] for column in columns]
        for part in sample:
            if isinstance(part, tuple):
                # A video has a count for each group of its frames.
                groups = part[0] if len(part) == 3 else 1
                count += groups * max(1, round(0.4 * (image_tokens(family, *part) // groups)))
        if family == "llava_next":
            tokens = [None if torch.equal(token, stock.model.image_newline) else token for token in tokens]
        scores = reference(layer, texts, tokens, weights or [0.25] * 4, variant)
        for score, value in zip(scores, outputs.vision_scores[0][row, columns].tolist(), strict=True):
            assert math.isnan(value) if score is None else value == pytest.approx(score, abs=1e-4)
        must = len(tokens) - 1 if batch == "image_last" else None
        order = sorted(range(len(tokens)), key=lambda i: (i != must, math.inf if scores[i] is None else -scores[i]))
        kept = [columns[place] for place in sorted(order[:count])]
        assert [column for column in columns if outputs.kept_mask[0][row, column]] == kept


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_change_the_choice_and_come_from_a_file(family, tmp_path):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("padded", family))
    (tmp_path / "weights.json").write_text(json.dumps({"weights": WEIGHTS}))
    given = pruned(**inputs, schedule=METHODS["hawk"](0.4, head_weights=WEIGHTS))
    read = pruned(**inputs, schedule=METHODS["hawk"](0.4, head_weights=tmp_path / "weights.json"))
    assert torch.equal(given.logits, read.logits)
    assert not torch.equal(given.kept_mask[0], pruned(**inputs, schedule=METHODS["hawk"](0.4)).kept_mask[0])


def test_bad_settings(tmp_path):
    _, pruned = tiny_pair("llava")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="variant is 'paper' or 'code'"):
        METHODS["hawk"](variant="codes")
    with pytest.raises(ValueError, match=r"other.json holds no weights of heads: .* calibrate-hawk"):
        METHODS["hawk"](head_weights=tmp_path / "other.json")
    with pytest.raises(OSError, match=r"none.json"):
        METHODS["hawk"](head_weights=str(tmp_path / "none.json"))
    (tmp_path / "nan.json").write_text('{"weights": [1, NaN, 0, 0]}')
    for weights in ([1, math.nan, 0, 0], [math.inf] * 4, ["a"] * 4, [None] * 4, tmp_path / "nan.json"):
        with pytest.raises(ValueError, match="head_weights are finite numbers"):
            METHODS["hawk"](head_weights=weights)
    with pytest.raises(ValueError, match="4 heads, and 3"):
        METHODS["hawk"](0.4, head_weights=(1, 2, 3)).cuts(pruned.model)


class Measured(TopKImages):
    """A score that says how much it took."""

    def __init__(self, score):
        self.score = score

    def __call__(self, images):
        with Largest() as largest:
            scores = self.score(images)
        self.numel = largest.numel
        return scores


def test_memory_is_linear_in_the_images():
    _, pruned = tiny_pair("llava")
    (cut,) = METHODS["hawk"](0.1).cuts(pruned.model)
    taken = []
    for count in (8, 16):
        score = Measured(cut.score)
        with torch.no_grad():
            pruned(**build_inputs("llava", [[1, *[(32, 32)] * count, 2, 3]]), schedule=(Cut(0, cut.keep, score),))
        taken.append(score.numel)
    assert taken[1] <= 2.1 * taken[0]


def test_only_text_is_copied_and_asked():
    """The rows that the first layer's queries are made of."""
    _, pruned = tiny_pair("qwen2_vl")
    inputs = build_inputs("qwen2_vl", samples_of("mixed", "qwen2_vl"))
    seen = []
    attention = pruned.model.language_model.layers[0].self_attn
    attention.q_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[:-1].numel()))
    pruned(**inputs, schedule=METHODS["hawk"](0.4))
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != pruned.config.image_token_id)
    assert seen[0] == text.sum()
