"""The selection is right, not only the cutting: both cuts against literal references."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from learnpruner.scores_learnpruner import LearnedPruningModule, top_k, top_k_with_diversity

import oracles
from oracles import masked
from tiny_models import (
    FAMILIES,
    IMAGE,
    LAYERS,
    PATCHES,
    QWEN,
    TEXT_MODELS,
    build_inputs,
    covering,
    pixels_of,
    samples_of,
    tiny_pair,
)

pytestmark = pytest.mark.core


def projector(stock):
    return stock.model.visual.merger if hasattr(stock.model, "visual") else stock.model.multi_modal_projector


def projector_input(stock, inputs):
    """What the stock model gives its projector, or merger: the features before it, `(crops, patches, d)`."""
    seen = []
    handle = projector(stock).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    stock(**inputs)
    handle.remove()
    return seen[0]


def features_per_image(family, stock, inputs):
    """For each image a list of vectors, None for structure, found by matching the stock model's projected tokens."""
    features = projector_input(stock, inputs)
    features = features if family in QWEN else features.flatten(0, 1)
    projected = projector(stock)(features)
    # Qwen's merger makes one token of four patches that stand behind one another.
    features = features.reshape(len(projected), -1)
    images = []
    for image in stock.model.get_image_features(**pixels_of(family, inputs), return_dict=True).pooler_output:
        vectors = []
        for token in image:
            distance = (projected - token).abs().amax(-1)
            vectors.append(features[distance.argmin()] if distance.min() < 1e-6 else None)
        images.append(vectors)
    return images


def vision_columns(inputs):
    return [row.nonzero().flatten().tolist() for row in inputs["input_ids"] == IMAGE]


DIVERSITY = (0.0, 0.1, 0.5, 1.0)


@pytest.mark.parametrize(
    ("family", "diversity", "ratio", "batch"),
    covering([(family, share) for family in FAMILIES for share in DIVERSITY], (0.1, 0.3, 0.55), ("padded", "mixed")),
)
def test_first_cut(family, ratio, diversity, batch):
    stock, pruned = tiny_pair(family, pruner_ratio=ratio, pruner_diversity=diversity)
    inputs = build_inputs(family, samples_of(batch, family))
    kept_mask = pruned(**inputs).kept_mask[0]
    images = features_per_image(family, stock, inputs)
    for row, columns in enumerate(vision_columns(inputs)):
        start, expected = 0, []
        while start < len(columns):
            features = images.pop(0)
            count = oracles.keep_counts(len(features), ratio, LAYERS, pruned.config.pruner_layer, 3.0)[0]
            chosen = oracles.first_cut(pruned.model.pruner, features, count, diversity)
            expected += [columns[start + i] for i in chosen]
            start += len(features)
        assert [column for column in columns if kept_mask[row, column]] == expected
    assert not images


@pytest.mark.parametrize(
    ("family", "text", "layer", "batch", "query"),
    covering([(*model, layer) for model in TEXT_MODELS for layer in (1, 2, 3)], ("padded", "mixed"), ("all", "last")),
)
def test_second_cut_is_the_top_of_the_stock_models_eager_attention(family, batch, text, layer, query):
    stock, pruned = tiny_pair(family, text=text, pruner_layer=layer, pruner_query=query)
    inputs = build_inputs(family, samples_of(batch, family))
    outputs = pruned(**inputs)
    first, second = outputs.kept_mask
    with masked(stock, (first,), (0,), inputs["attention_mask"], LAYERS):
        attention = stock(**inputs, output_attentions=True).attentions[layer - 1]
    for row, columns in enumerate(vision_columns(inputs)):
        left = [column for column in columns if first[row, column]]
        text_rows = (first[row] & (inputs["input_ids"][row] != IMAGE)).nonzero().flatten().tolist()
        count = sum(second[row, column].item() for column in columns)
        expected, scores = oracles.second_cut(attention[row], left, text_rows, count, last_only=query == "last")
        assert [column for column in columns if second[row, column]] == expected
        for column, score in scores.items():
            assert outputs.vision_scores[1][row, column].item() == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize(
    ("family", "ratio", "batch"),
    covering(
        [(family, ratio) for family in FAMILIES for ratio in (0.05, 0.2, 0.4, 0.9)], ("padded", "two_images", "mixed")
    ),
)
def test_budgets_are_exact(family, batch, ratio):
    """Stage 1 per image, stage 2 per sample (invariant 7)."""
    _, pruned = tiny_pair(family, pruner_ratio=ratio)
    inputs = build_inputs(family, samples_of(batch, family))
    first, second = pruned(**inputs).kept_mask
    images = pruned.model.get_image_features(**pixels_of(family, inputs), return_dict=True).pooler_output
    sizes = [len(image) for image in images]
    for row, columns in enumerate(vision_columns(inputs)):
        seconds = 0
        while columns:
            image, columns = columns[: sizes[0]], columns[sizes[0] :]
            r1, r2 = oracles.keep_counts(sizes.pop(0), ratio, LAYERS, pruned.config.pruner_layer, 3.0)
            assert first[row, image].sum() == r1
            seconds += r2
        vision = inputs["input_ids"][row] == IMAGE
        assert second[row, vision].sum() == seconds
    text = (inputs["input_ids"] != IMAGE) & inputs["attention_mask"].bool()
    for kept in (first, second):
        assert kept[text].all()
        assert not kept[inputs["attention_mask"] == 0].any()
    assert (first | ~second).all()


def test_newline_rows_are_kept_last_and_have_no_score():
    _, pruned = tiny_pair("llava_next", pruner_ratio=0.55, pruner_diversity=0.1)
    inputs = build_inputs("llava_next", [[2, (60, 40), 5]])
    outputs = pruned(**inputs)
    vision = inputs["input_ids"][0] == IMAGE
    scores, kept = outputs.vision_scores[0][0, vision], outputs.kept_mask[0][0, vision]
    newline = scores.isnan()
    assert newline.sum() == 8  # one for each row of the unpadded 8 x 6 grid
    assert not newline[:PATCHES].any()
    assert not kept[newline].any() or kept[~newline].all()


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_an_image_after_the_question_does_not_starve(family):
    """No text row sees the second image; it competes by its stage 1 scores for its fair share."""
    _, pruned = tiny_pair(family, pruner_ratio=0.3)
    inputs = build_inputs(family, [[2, (32, 32), 6, (32, 32)]])
    outputs = pruned(**inputs)
    second = outputs.kept_mask[1][0]
    columns = vision_columns(inputs)[0]
    early, late = columns[:PATCHES], columns[PATCHES:]
    assert second[early].sum() == second[late].sum()
    scores = outputs.vision_scores[0][0].masked_fill(~outputs.kept_mask[0][0], -torch.inf)
    ends_prompt = late[-1]  # predicts the next token, so it stays whatever its score
    best = sorted(late[:-1], key=lambda column: -scores[column])[: int(second[late].sum()) - 1]
    assert {column for column in late if second[column]} == {ends_prompt, *best}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_row_of_a_sample_is_never_dropped(family):
    for seed in range(8):
        _, pruned = tiny_pair(family, pruner_ratio=0.05, seed=seed)
        for side in ("left", "right"):
            inputs = build_inputs(family, [[5, (32, 32)], [1, (32, 32)]], seed=seed, side=side)
            for kept in pruned(**inputs).kept_mask:
                assert kept[:, -1].tolist() == inputs["attention_mask"][:, -1].bool().tolist()
                for row, mask in zip(kept, inputs["attention_mask"]):
                    assert row[mask.nonzero().max()]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_query_mask_decides_who_ranks(family):
    stock, pruned = tiny_pair(family)
    inputs = build_inputs(family, [[2, (32, 32), 12]])
    query_mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    query_mask[0, -5:-2] = True
    outputs = pruned(**inputs, query_mask=query_mask)
    first, second = outputs.kept_mask
    with masked(stock, (first,), (0,), inputs["attention_mask"], LAYERS):
        attention = stock(**inputs, output_attentions=True).attentions[pruned.config.pruner_layer - 1][0]
    columns = [column for column in vision_columns(inputs)[0] if first[0, column]]
    rows = query_mask[0].nonzero().flatten().tolist()
    expected, _ = oracles.second_cut(attention, columns, rows, int(second[0, columns].sum()))
    assert [column for column in columns if second[0, column]] == expected


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_an_answer_does_not_choose_its_evidence(family):
    """With labels, only rows before the first supervised token rank: other answers, same evidence."""
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, [[2, (32, 32), 12]])
    labels = inputs["input_ids"].clone()
    labels[:, :-6] = -100
    other = inputs["input_ids"].clone()
    other[:, -6:] = torch.tensor([77, 78, 79, 80, 81, 82])
    kept = pruned(**inputs, labels=labels).kept_mask
    kept_other = pruned(**{**inputs, "input_ids": other}, labels=labels).kept_mask
    assert torch.equal(kept[1], kept_other[1])
    ranked_by_all = pruned(**{**inputs, "input_ids": other}).vision_scores[1]
    assert not torch.equal(ranked_by_all.nan_to_num(), pruned(**inputs).vision_scores[1].nan_to_num())


def test_parameter_count_is_the_papers():
    module = LearnedPruningModule(1024, 512)
    assert sum(parameter.numel() for parameter in module.parameters()) == 527_874


def test_scores_are_float32_and_nan_for_structure():
    module = LearnedPruningModule(8, 16).to(torch.bfloat16)
    features = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    features[0, 1] = torch.nan
    scores = module(features)
    assert scores.dtype == torch.float32
    assert scores.isnan().tolist() == [[False, True, False], [False, False, False]]


def test_ties_go_to_the_lower_index():
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    everywhere = torch.ones_like(scores, dtype=torch.bool)
    assert top_k(scores, everywhere, torch.tensor([2])).tolist() == [[False, True, True, False, False]]
    same = torch.ones(1, 5, 4)
    chosen = top_k_with_diversity(torch.zeros(1, 5), everywhere, [3], same, 0.5)
    assert chosen.tolist() == [[True, True, True, False, False]]


def test_each_diversity_token_takes_few_kernels():
    """On a GPU each launch costs as much as the work: choose, compare with all, join, strike out. Views are free."""

    class Count(TorchDispatchMode):
        launches = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.launches += not function.is_view
            return function(*args, **(kwargs or {}))

    launches = {}
    for extra in (2, 6):
        with Count() as count:
            generator = torch.Generator().manual_seed(0)
            features = torch.randn(2, 40, 8, generator=generator)
            everywhere = torch.ones(2, 40, dtype=torch.bool)
            top_k_with_diversity(features[..., 0], everywhere, [4 + extra] * 2, features, extra / (4 + extra))
        launches[extra] = count.launches
    assert launches[6] - launches[2] <= 4 * 5


def test_samples_may_want_unequally_many_by_diversity():
    """Where one has its tokens, the other goes on, up to all of its candidates."""
    features = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(3))
    candidates = torch.ones(2, 12, dtype=torch.bool)
    candidates[0, 5:] = False
    both = top_k_with_diversity(features[..., 0], candidates, [5, 12], features, 0.8)
    assert both[0].tolist() == [True] * 5 + [False] * 7
    assert both[1].all()
    few = top_k_with_diversity(features[..., 0], candidates, [3, 9], features, 0.8)
    for row, count in ((0, 3), (1, 9)):
        columns = candidates[row]
        alone = top_k_with_diversity(
            features[row, columns, 0][None], columns[columns][None], [count], features[row, columns][None], 0.8
        )
        assert few[row, columns].tolist() == alone[0].tolist()
        assert few[row].sum() == count
