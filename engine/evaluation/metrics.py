"""Metrics: how right answers are. The names are those of lm-evaluation-harness, BIG-bench, rouge_score and sacrebleu.

    acc                     the most likely choice is a best one: argmax_c log p(c | question)
    acc_norm                the same with log p(c | question) / (bytes of c)
    multiple_choice_grade   the score of the most likely choice (BIG-bench)
    exact_match             the answer is a target, without blanks around; exact_str_match is BIG-bench's name of it
    number_match            both are the same number: 1,000 is 1000.0
    squad_exact_match       equal without case, punctuation and articles; squad_f1: F1 of their words, the best target
    rouge1 rouge2 rougeL rougeLsum     F1 of n-grams or subsequences, stemmed, the best target
    bleu chrf               of all answers together, 0 to 100

Rajpurkar et al. 2016, arXiv:1606.05250 (SQuAD); Lin 2004 (ROUGE); Post 2018, arXiv:1804.08771 (sacrebleu).
"""

from __future__ import annotations

import json
import re
import statistics
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import partial
from itertools import zip_longest
from typing import Protocol

from peakgpt.engine.data.documents import require
from peakgpt.engine.evaluation.intervals import EXTRA, RESAMPLES, Estimate, mean_estimate
from peakgpt.engine.evaluation.task import Example, Task

CHOICES, TEXT = "multiple_choice", "generate_until"  # output types of lm-evaluation-harness


@dataclass(frozen=True)
class Answer:
    """What a model answers to an example.

    Args:
        prompt: the text that was asked.
        logprobs: choice -> log-probability after the question, in nats; {} if choices were not scored.
        outputs: generated texts; () if none was generated.
        answers: the answer in each of them, "" where there is none.
        text: the answer that most of them have.
    """

    example: Example
    prompt: str
    logprobs: Mapping[str, float]
    outputs: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    text: str = ""

    @property
    def choice(self) -> str:
        """The most likely choice."""
        return max(self.logprobs, key=self.logprobs.__getitem__)


class Metric(Protocol):
    """A metric.

    Attributes:
        reads: CHOICES or TEXT, the part of an answer that it reads.
    """

    reads: str

    def values(self, answers: Sequence[Answer]) -> list[float] | None:
        """Return the value of each answer; None if there is only a score of all together."""

    def estimate(self, answers: Sequence[Answer], seed: int) -> Estimate:
        """Return the score of at least one answer, and its interval; `seed` is of the bootstrap."""

    def chance(self, examples: Sequence[Example]) -> float | None:
        """Return the expected score of random choices; None where answers are no choices."""


class MeanMetric:
    """A metric that gives each answer a value. The score is the mean of the values."""

    def __init__(
        self, reads: str, value: Callable[[Answer], float], chance: Callable[[Example], float] | None = None
    ):  # fmt: skip
        """
        Args:
            value: of an answer.
            chance: its expectation for a random choice.
        """
        self.reads, self._value, self._chance = reads, value, chance

    def values(self, answers: Sequence[Answer]) -> list[float]:
        return [float(self._value(answer)) for answer in answers]

    def estimate(self, answers: Sequence[Answer], seed: int) -> Estimate:
        return mean_estimate(self.values(answers), seed)

    def chance(self, examples: Sequence[Example]) -> float | None:
        return None if self._chance is None else statistics.fmean(map(self._chance, examples))


class CorpusMetric:
    """A metric of sacrebleu, with the interval of its bootstrap."""

    reads = TEXT

    def __init__(self, name: str):
        self._make = getattr(require("sacrebleu.metrics", EXTRA), name)

    def values(self, answers: Sequence[Answer]) -> None:
        return None

    def chance(self, examples: Sequence[Example]) -> None:
        return None

    def estimate(self, answers: Sequence[Answer], seed: int) -> Estimate:
        """As Metric.estimate, with sacrebleu's own seed."""
        metric = self._make()
        references = [list(column) for column in zip_longest(*(answer.example.targets for answer in answers))]
        score = metric.corpus_score([answer.text for answer in answers], references, n_bootstrap=RESAMPLES)
        # The public form of its interval, mean +- half width; missing where all resamples score 0.
        shown = json.loads(score.format(width=6, signature=str(metric.get_signature()), is_json=True))
        if len(answers) < 2 or "confidence_mean" not in shown:
            return Estimate(score.score)
        mean, half = shown["confidence_mean"], shown["confidence_var"]
        return Estimate(score.score, max(mean - half, 0.0), min(mean + half, 100.0), "bootstrap")


def number_of(text: str) -> Decimal | None:
    """Return the number that a text is, such as "$1,000."; None if it is no finite number."""
    try:
        number = Decimal(text.strip().lstrip("$€£").rstrip("%.").replace(",", ""))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def majority(answers: Sequence[str]) -> str:
    """Return the most frequent answer; of equally frequent ones, the first. Texts without an answer do not vote.

    Self-consistency: Wang et al. 2022, arXiv:2203.11171. Numbers that are equal, and texts that differ in case, are one
    answer.
    """
    keys = [answer.casefold() if (number := number_of(answer)) is None else number for answer in answers]
    counts = Counter(key for key, answer in zip(keys, answers, strict=True) if answer)
    return answers[keys.index(counts.most_common(1)[0][0])] if counts else ""


# ---- values of one answer


def _is_best(answer: Answer, choice: str) -> bool:
    scores = answer.example.target_scores
    return scores[choice] == max(scores.values())


def _acc(answer: Answer) -> bool:
    return _is_best(answer, answer.choice)


def _acc_norm(answer: Answer) -> bool:
    return _is_best(answer, max(answer.logprobs, key=lambda c: answer.logprobs[c] / len(c.encode())))


def _multiple_choice_grade(answer: Answer) -> float:
    return answer.example.target_scores[answer.choice]


def _share_of_best(example: Example) -> float:
    scores = list(example.target_scores.values())
    return scores.count(max(scores)) / len(scores)


def _mean_score(example: Example) -> float:
    return statistics.fmean(example.target_scores.values())


def _exact_match(answer: Answer) -> bool:
    return answer.text in [target.strip() for target in answer.example.targets]


def _number_match(answer: Answer) -> bool:
    number = number_of(answer.text)
    return number is not None and number in [number_of(target) for target in answer.example.targets]


def squad_words(text: str) -> list[str]:
    """Return the words that SQuAD compares: lower case, without punctuation and articles."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _squad_exact_match(answer: Answer) -> bool:
    return squad_words(answer.text) in [squad_words(target) for target in answer.example.targets]


def _squad_f1(answer: Answer) -> float:
    return max(_f1(squad_words(answer.text), squad_words(target)) for target in answer.example.targets)


def _f1(words: list[str], target: list[str]) -> float:
    if not words or not target:  # as version 2.0 of SQuAD counts answers without words
        return float(words == target)
    common = (Counter(words) & Counter(target)).total()
    return 2 * common / (len(words) + len(target))


def _rouge(kind: str) -> MeanMetric:
    scorer = require("rouge_score.rouge_scorer", EXTRA).RougeScorer([kind], use_stemmer=True)
    return MeanMetric(TEXT, lambda answer: scorer.score_multi(answer.example.targets, answer.text)[kind].fmeasure)


METRICS: dict[str, Callable[[], Metric]] = {
    "acc": partial(MeanMetric, CHOICES, _acc, _share_of_best),
    "acc_norm": partial(MeanMetric, CHOICES, _acc_norm, _share_of_best),
    "multiple_choice_grade": partial(MeanMetric, CHOICES, _multiple_choice_grade, _mean_score),
    "exact_match": partial(MeanMetric, TEXT, _exact_match),
    "exact_str_match": partial(MeanMetric, TEXT, _exact_match),
    "number_match": partial(MeanMetric, TEXT, _number_match),
    "squad_exact_match": partial(MeanMetric, TEXT, _squad_exact_match),
    "squad_f1": partial(MeanMetric, TEXT, _squad_f1),
    **{kind: partial(_rouge, kind) for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")},
    "bleu": partial(CorpusMetric, "BLEU"),
    "chrf": partial(CorpusMetric, "CHRF"),
}
DEFAULTS = {CHOICES: "acc", TEXT: "exact_match"}  # where a task has no metric of the wanted output type


def metrics_of(task: Task, output_type: str | None = None) -> dict[str, Metric]:
    """Return the metrics of a task by name, the preferred one first.

    Args:
        output_type: only metrics that read this part of an answer; None: all.
    Raises:
        ValueError: a package is missing, or an example has no choices although a metric reads them.
    """
    names = sorted(task.metrics, key=lambda name: name != task.preferred_score)
    metrics = {name: METRICS[name]() for name in names}
    if output_type is not None:
        wanted = {name: metric for name, metric in metrics.items() if metric.reads == output_type}
        default = DEFAULTS[output_type]
        metrics = wanted or {default: METRICS[default]()}
    reading = next((name for name, metric in metrics.items() if metric.reads == CHOICES), None)
    without = next((example for example in task.examples if not example.choices), None)
    if reading and without:
        raise ValueError(f"{without.name}: got no target_scores, expected choices for the metric {reading}")
    return metrics
