"""The first cut of a pruner that is not trained yet: the encoder's features alone choose. All invariants hold."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers

from learnpruner import Cut, LearnedScore
from learnpruner.compat_learnpruner import CACHE
from learnpruner.cuts_learnpruner import TrainingFreeScore
from learnpruner.plan_learnpruner import UNTRAINED_DIVERSITY

from host_waits import Waits
from oracles import masked
from tiny_models import (
    FAMILIES,
    LAYERS,
    NO_PLACEHOLDERS,
    build_inputs,
    labelled,
    positions,
    row_alone,
    samples_of,
    tiny_pair,
    with_answer,
    with_videos,
)

pytestmark = pytest.mark.core
CASES = [case for case in with_videos(("mixed",)) if case[1] != "video"]
GREEDY = {"do_sample": False, "max_new_tokens": 6, **NO_PLACEHOLDERS}


def untrained(family, **fields):
    return tiny_pair(family, pruner_trained=False, **fields)


def part_features(pruned, inputs):
    """The encoder's features of each image or group of frames, `(tokens, d)`, in the order of the prompt."""
    prompt = pruned.model.read_prompt(inputs)
    encoded = pruned.model.encode_images({**inputs}, prompt)
    return pruned.model.pruner_features(encoded, prompt)


def chosen_by_hand(features, count, diversity):
    """One token after another, as the words say it: far from the mean first, then unlike those that are there."""
    patches = [number for number, row in enumerate(features) if not row.isnan().any()]
    directions = F.normalize(features.double(), dim=-1)
    mean = F.normalize(features[patches].double().mean(0), dim=-1)
    scores = 1 - directions @ mean
    by_score = max(1, count - round(diversity * count))
    order = sorted(patches, key=lambda number: -scores[number])
    chosen = order[:by_score]
    while len(chosen) < min(count, len(patches)):
        left = [number for number in patches if number not in chosen]
        chosen.append(min(left, key=lambda number: (directions[chosen] @ directions[number]).max()))
    structure = [number for number in range(len(features)) if number not in patches]
    return scores, {*chosen, *structure[: count - len(chosen)]}


@pytest.mark.parametrize(("family", "batch"), with_videos(("mixed",)))
def test_it_ranks_each_part_by_the_encoders_features(family, batch):
    _, pruned = untrained(family)
    inputs = build_inputs(family, samples_of(batch, family))
    outputs = pruned(**inputs)
    vision = pruned.model.vision_kinds(inputs["input_ids"], None)
    features = part_features(pruned, inputs)
    for kind, modality in enumerate(("image", "video"), 1):
        at = vision == kind
        scores, kept = outputs.vision_scores[0][at], outputs.kept_mask[0][at]
        for part in features.get(modality, ()):
            expected, chosen = chosen_by_hand(part, int(kept[: len(part)].sum()), UNTRAINED_DIVERSITY)
            assert torch.allclose(scores[: len(part)].double(), expected, atol=1e-5, equal_nan=True)
            assert set(kept[: len(part)].nonzero().flatten().tolist()) == chosen
            scores, kept = scores[len(part) :], kept[len(part) :]
        assert not len(scores)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weight_of_the_pruner_chooses(family):
    _, pruned = untrained(family)
    inputs = build_inputs(family, samples_of("mixed", family))
    before = pruned(**inputs)
    text = pruned.generate(**inputs, **GREEDY)
    trained = tiny_pair(family)[1](**inputs)
    assert not torch.equal(before.kept_mask[0], trained.kept_mask[0])
    assert torch.equal(before.kept_mask[0].sum(1), trained.kept_mask[0].sum(1))
    for parameter in pruned.model.pruner.parameters():
        parameter.fill_(torch.nan)
    assert torch.equal(pruned(**inputs).logits, before.logits)
    assert torch.equal(pruned.generate(**inputs, **GREEDY), text)
    # Nor in the part of a schedule that a caller makes.
    cut = Cut(0, lambda tokens: tokens // 2, LearnedScore(0.0))
    assert not pruned(**inputs, schedule=(cut,)).vision_scores[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_float32_and_of_what_is_present(dtype):
    """Structure takes no part, nor what a smaller image is filled up with, whatever stands there."""
    features = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    features[0, 3] = torch.nan
    present = torch.ones(2, 9, dtype=torch.bool)
    present[1, 6:] = False
    scores = TrainingFreeScore(0.5)(SimpleNamespace(features=features, present=present))
    assert scores.dtype == torch.float32
    assert scores[present].isnan().nonzero().tolist() == [[3]]
    for row, ok in zip(range(2), (torch.arange(9) != 3, present[1])):
        mean = features[row, ok].double().mean(0)
        expected = 1 - F.cosine_similarity(features[row, ok].double(), mean.expand(int(ok.sum()), -1))
        assert torch.allclose(scores[row, ok].double(), expected, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_choice_of_the_whole_sample(family):
    """The mean is then one of all images of the sample."""
    _, pruned = untrained(family)
    inputs = build_inputs(family, samples_of("mixed", family))
    cut = Cut(0, lambda tokens: tokens // 2, LearnedScore(0.0), unit="sample")
    outputs = pruned(**inputs, schedule=(cut,))
    features = part_features(pruned, inputs)["image"]
    for row, parts in ((0, features[:1]), (1, features[1:])):
        at = pruned.model.vision_kinds(inputs["input_ids"], None)[row] == 1
        scores, _ = chosen_by_hand(torch.cat(parts), 1, 0.0)
        assert torch.allclose(outputs.vision_scores[0][row, at].double(), scores, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_gates_by_the_module_and_generate_cuts_without_it(family):
    """As soon as a step has been taken, the module chooses everywhere."""
    _, pruned = untrained(family)
    inputs = labelled(family, samples_of("mixed", family))
    prompt = build_inputs(family, samples_of("mixed", family))
    free = pruned.generate(**prompt, **GREEDY, return_dict_in_generate=True)[CACHE].kept_mask[0]
    pruned.train_pruner_only()
    with torch.enable_grad():
        outputs = pruned(**inputs)
        assert outputs.kept_mask is None
        assert torch.equal(pruned.generate(**prompt, **GREEDY, return_dict_in_generate=True)[CACHE].kept_mask[0], free)
        outputs.loss.backward()
    assert pruned.config.pruner_trained
    learned = pruned.generate(**prompt, **GREEDY, return_dict_in_generate=True)[CACHE].kept_mask[0]
    assert not torch.equal(learned, free)


@pytest.mark.parametrize(("family", "batch"), CASES)
def test_cutting_equals_masking(family, batch):
    """Each step of generation, and the forward of the prompt, against the stock model with masked keys."""
    stock, pruned = untrained(family)
    inputs = build_inputs(family, samples_of(batch, family))
    outputs = pruned(**inputs)
    with masked(stock, outputs.kept_mask, (0, pruned.config.pruner_layer), inputs["attention_mask"], LAYERS):
        expected = stock(**inputs).logits
    rows = outputs.kept_mask[-1] & inputs["attention_mask"].bool()
    assert (outputs.logits - expected)[rows].abs().max() < 1e-4
    assert (outputs.logits - stock(**inputs).logits)[rows].abs().max() > 1e-2

    generated = pruned.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    answer = torch.ones(len(generated.sequences), 6, dtype=torch.bool)
    kept_mask = [torch.cat([kept, answer], dim=1) for kept in generated[CACHE].kept_mask]
    whole = with_answer(inputs, generated.sequences)
    with masked(stock, kept_mask, (0, pruned.config.pruner_layer), whole["attention_mask"], LAYERS):
        expected = stock(**whole, position_ids=positions(family, stock, inputs, 6)).logits
    steps = torch.stack(generated.logits, dim=1)
    assert (steps - expected[:, inputs["input_ids"].shape[1] - 1 : -1]).abs().max() < 1e-4


@pytest.mark.parametrize(("family", "batch"), CASES)
def test_a_batch_equals_its_rows(family, batch):
    _, pruned = untrained(family)
    samples = samples_of(batch, family)
    inputs = build_inputs(family, samples)
    together = pruned(**inputs, position_ids=positions(family, pruned, inputs))
    answers = pruned.generate(**inputs, **GREEDY)
    for row in range(len(samples)):
        single, valid = row_alone(family, inputs, samples, row)
        alone = pruned(**single)
        if alone.kept_mask is not None:
            for cut in range(2):
                assert torch.equal(together.kept_mask[cut][row, valid], alone.kept_mask[cut][0])
        kept = together.kept_mask[-1][row]
        assert (together.logits[row][kept] - alone.logits[0][kept[valid]]).abs().max() < 1e-4
        assert torch.equal(answers[row, -6:], pruned.generate(**single, **GREEDY)[0, -6:])


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_and_a_run_without_a_cache(family):
    _, pruned = untrained(family)
    inputs = build_inputs(family, samples_of("mixed", family))
    expected = pruned(**inputs, position_ids=positions(family, pruned, inputs))
    cache = pruned.generate(**inputs, **GREEDY, num_beams=2, return_dict_in_generate=True)[CACHE]
    for cut in range(2):
        assert torch.equal(cache.kept_mask[cut], expected.kept_mask[cut].repeat_interleave(2, 0))
        scores = expected.vision_scores[cut].repeat_interleave(2, 0)
        assert torch.allclose(cache.vision_scores[cut], scores, equal_nan=True, atol=1e-6)
    assert torch.equal(pruned.generate(**inputs, **GREEDY), pruned.generate(**inputs, **GREEDY, use_cache=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ratio_of_one_is_the_stock_model(family):
    stock, pruned = untrained(family, pruner_ratio=1.0)
    inputs = build_inputs(family, samples_of("mixed", family))
    assert torch.equal(pruned(**inputs).logits, stock(**inputs).logits)
    assert torch.equal(pruned.generate(**inputs, **GREEDY), stock.generate(**inputs, **GREEDY))


@pytest.mark.parametrize(("family", "batch"), CASES)
def test_the_host_waits_no_more_than_for_the_learned_cut(family, batch):
    inputs, counts = build_inputs(family, samples_of(batch, family)), []
    for trained in (True, False):
        _, pruned = tiny_pair(family, pruner_trained=trained)
        log = []
        with Waits(log):
            pruned(**inputs)
        counts.append(len(log))
    assert counts[1] <= counts[0]


def test_one_line_says_so_at_the_first_pruned_call(caplog):
    _, pruned = untrained("llava")
    inputs = build_inputs("llava", samples_of("one", "llava"))
    transformers.utils.logging.warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        pruned(**inputs, pruner_ratio=1.0)
        pruned(**build_inputs("llava", [[5]]))
        assert "not trained" not in caplog.text
        pruned(**inputs)
        pruned.generate(**inputs, **GREEDY)
        assert caplog.text.count("not trained") == 1
        assert "training-free" in caplog.text
        assert "train_pruner_only()" in caplog.text
    transformers.utils.logging.warning_once.cache_clear()
    caplog.clear()
    pruned.config.pruner_trained = True
    with caplog.at_level("WARNING"):
        pruned(**inputs)
    assert "not trained" not in caplog.text
