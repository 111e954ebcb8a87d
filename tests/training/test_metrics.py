"""Each metric against values worked out by hand from its paper's definition."""

import pytest

from learnpruner.training.metrics import ANLS, METRICS, POPE, ExactMatch, RelAcc, RelaxedAccuracy, VQAAccuracy


def score(metric, predictions, references):
    return metric().compute(predictions=predictions, references=references)


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("teal", "teal", True),
        ("Teal.", "teal", True),
        ("the cat", "cat", True),
        ("two", "2", True),
        ("dont", "don't", True),
        ("1,000", "1000", True),
        ("3.5", "35", False),
        ("cat, dog", "cat dog", True),
        ("t-shirt", "t shirt", True),
        (".5", "5", False),
        ("1,000 (one)", "1000 1", True),
        ("cat", "cats", False),
        ("", "cat", False),
    ],
)
def test_exact_match(prediction, reference, right):
    assert score(ExactMatch, [prediction], [reference]) == {"exact_match": float(right)}


@pytest.mark.parametrize(("given", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy(given, expected):
    """Ten people, leaving out one at a time: of 3 who agree, 7 leave-outs count 3/3 and 3 count 2/3, so 0.9."""
    references = ["red"] * given + [f"other {n}" for n in range(10 - given)]
    assert score(VQAAccuracy, ["red"], [references])["vqa_accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("Kitten", ["kitten"], 1.0),
        ("abcd", ["wxyd"], 0.0),
        ("abcd", ["abxy"], 0.0),
        ("abcde", ["abcxy"], 0.6),
        ("abcd", ["wxyd", "abcx"], 0.75),
        ("", ["a"], 0.0),
    ],
)
def test_anls(prediction, references, expected):
    assert score(ANLS, [prediction], [references])["anls"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("95", "100", True),
        ("94.9", "100", False),
        ("1,050", "1000", False),
        ("0.0", "0", False),
        ("5%", "0.05", True),
        ("Yes", "yes", True),
        ("cat", "dog", False),
        ("0", "0", True),
        ("0.01", "0", False),
        ("ten", "10", False),
    ],
)
def test_relaxed_accuracy(prediction, reference, right):
    assert score(RelaxedAccuracy, [prediction], [reference]) == {"relaxed_accuracy": float(right)}


def test_pope():
    predictions = ["Yes, there is.", "No, nothing.", "There is not a dog. Yes", "yes", "Nothing to say"]
    result = score(POPE, predictions, ["yes", "yes", "no", "no", "yes"])
    # Said yes: 1, 4 and 5; of these 1 and 5 are so; 3 things are there.
    assert result == {
        "f1": pytest.approx(2 / 3),
        "accuracy": 0.6,
        "precision": 2 / 3,
        "recall": 2 / 3,
        "yes_ratio": 0.6,
    }
    assert score(POPE, ["no"], ["yes"])["f1"] == 0


def test_vqa_accuracy_needs_people():
    with pytest.raises(ValueError, match="three other people"):
        score(VQAAccuracy, ["red"], [["red"]])


def test_rel_acc_is_a_mean_of_ratios():
    assert score(RelAcc, [0.5, 80.0], [1.0, 100.0])["rel_acc"] == pytest.approx(0.65)
    with pytest.raises(ValueError, match="above 0"):
        score(RelAcc, [0.5], [0.0])


@pytest.mark.parametrize("name", METRICS)
def test_in_parts_as_in_one(name):
    """`add_batch` is how a benchmark feeds a metric."""
    several = name in ("vqa_accuracy", "anls")
    predictions = [0.5, 0.2, 0.9] if name == "rel_acc" else ["yes", "no", "2"]
    references = [1.0, 0.4, 0.9] if name == "rel_acc" else [["yes"] * 4, ["ni"] * 4, ["2", "3", "no", "2"]]
    if name != "rel_acc" and not several:
        references = [answers[0] for answers in references]
    whole, parts = METRICS[name](), METRICS[name]()
    for prediction, reference in zip(predictions, references):
        parts.add_batch(predictions=[prediction], references=[reference])
    assert parts.compute() == whole.compute(predictions=predictions, references=references)
