# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""The metrics of the benchmarks that papers on token pruning report, as `evaluate.Metric`s that download nothing.

ExactMatch().compute(predictions=["a cat"], references=["A cat."])
"""

import re
import statistics

import datasets
import evaluate

# VQA's evaluation (Antol et al., ICCV 2015) reads these alike.
NUMBERS = ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGITS = {word: str(max(0, place - 1)) for place, word in enumerate(NUMBERS)}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def normalize_answer(text: str) -> str:
    """Lower case, without articles and punctuation, small numbers as digits: VQA's reading of an answer.

    VQA has a table of contractions that puts forgotten apostrophes back; here apostrophes are left out everywhere, so
    that "dont" is "don't" as there, and also "we'll" is "well".
    """
    text = " ".join(text.lower().replace("'", "").split())
    number = re.search(r"\d,\d", text) is not None
    for mark in PUNCTUATION:
        between_words = mark in text and not (f"{mark} " in text or f" {mark}" in text or number)
        text = text.replace(mark, " " if between_words else "")
    words = re.sub(r"\.(?!\d)", "", text).split()
    return " ".join(DIGITS.get(word, word) for word in words if word not in ARTICLES)


class _AnswerMetric(evaluate.Metric):
    """Predictions are strings; a reference is a string, or a list of strings that several people gave."""

    several = False

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = {"predictions": text, "references": datasets.List(text) if self.several else text}
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", inputs_description="", features=datasets.Features(features)
        )


class ExactMatch(_AnswerMetric):
    """Share of predictions that equal their reference, read as VQA reads answers. Returns `exact_match`."""

    def _compute(self, predictions, references):
        pairs = zip(predictions, references)
        return {"exact_match": statistics.fmean(normalize_answer(p) == normalize_answer(r) for p, r in pairs)}


class VQAAccuracy(_AnswerMetric):
    """VQA accuracy (Antol et al., ICCV 2015): an answer counts min(1, n / 3), n of the other people having given it,
    averaged over leaving out each person in turn. References: lists of answers, ten in VQAv2. Returns `vqa_accuracy`.
    """

    several = True

    def _compute(self, predictions, references):
        return {"vqa_accuracy": statistics.fmean(map(self._score, predictions, references))}

    @staticmethod
    def _score(prediction: str, answers: list[str]) -> float:
        if len(answers) < 4:
            raise ValueError(f"VQA accuracy asks whether three other people agree; here are {len(answers)} answers.")
        same = [normalize_answer(answer) == normalize_answer(prediction) for answer in answers]
        return statistics.fmean(min(1.0, (sum(same) - one) / 3) for one in same)


class ANLS(_AnswerMetric):
    """Average normalized Levenshtein similarity (Biten et al., ICCV 2019): 1 - distance / longer length of the best
    reference, 0 where that is not above one half. References: lists of answers. Returns `anls`.
    """

    several = True

    def _compute(self, predictions, references):
        return {
            "anls": statistics.fmean(
                max(self._score(p, r) for r in answers) for p, answers in zip(predictions, references)
            )
        }

    @staticmethod
    def _score(prediction: str, answer: str) -> float:
        prediction, answer = (" ".join(text.lower().split()) for text in (prediction, answer))
        longest = max(len(prediction), len(answer), 1)
        similarity = 1 - edit_distance(prediction, answer) / longest
        return similarity if similarity > 0.5 else 0.0


def edit_distance(one: str, other: str) -> int:
    """Insertions, deletions and substitutions from `one` to `other` (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


class RelaxedAccuracy(_AnswerMetric):
    """Relaxed accuracy (Methani et al., WACV 2020; ChartQA): numbers within 5 % of the reference count as right, other
    answers where they are equal but for case. Returns `relaxed_accuracy`.
    """

    tolerance = 0.05

    def _compute(self, predictions, references):
        return {"relaxed_accuracy": statistics.fmean(map(self._right, predictions, references))}

    def _right(self, prediction: str, answer: str) -> bool:
        found, true = self._number(prediction), self._number(answer)
        if found is None or not true:
            return prediction.strip().lower() == answer.strip().lower()
        return abs(found - true) <= self.tolerance * abs(true)

    @staticmethod
    def _number(text: str) -> float | None:
        text = text.strip()
        try:
            return float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return None


class POPE(_AnswerMetric):
    """Object hallucination (Li et al., EMNLP 2023) with "yes" as the positive class: `f1`, `accuracy`, `precision`,
    `recall` and `yes_ratio`. An answer is a no if "No", "no" or "not" is a word of its first sentence, else a yes:
    POPE's own rule.
    """

    def _compute(self, predictions, references):
        yes, true = [self._yes(text) for text in predictions], [self._yes(text) for text in references]
        hits = sum(said and is_so for said, is_so in zip(yes, true))
        precision, recall = hits / max(1, sum(yes)), hits / max(1, sum(true))
        return {
            "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
            "accuracy": statistics.fmean(said == is_so for said, is_so in zip(yes, true)),
            "precision": precision,
            "recall": recall,
            "yes_ratio": statistics.fmean(yes),
        }

    @staticmethod
    def _yes(text: str) -> bool:
        return not {"No", "no", "not"} & set(text.partition(".")[0].replace(",", "").split())


class RelAcc(evaluate.Metric):
    """Relative accuracy: the mean over benchmarks of score / score of the unpruned model, a mean of ratios as papers
    on token pruning report it. Predictions and references: the two models' scores, one a benchmark. Returns `rel_acc`.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = dict.fromkeys(("predictions", "references"), datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions, references):
        if not all(reference > 0 for reference in references):
            raise ValueError("RelAcc divides by the unpruned model's scores, and one of them is not above 0.")
        return {"rel_acc": statistics.fmean(p / r for p, r in zip(predictions, references))}


METRICS = {
    "exact_match": ExactMatch,
    "vqa_accuracy": VQAAccuracy,
    "anls": ANLS,
    "relaxed_accuracy": RelaxedAccuracy,
    "pope": POPE,
    "rel_acc": RelAcc,
}
