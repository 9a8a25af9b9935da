"""Metrics: those of lm-eval, rouge_score and sacrebleu on the same texts, and intervals by their formulas."""

import importlib.util
import math
import random
import runpy
from pathlib import Path

import numpy as np
import pytest

from peakgpt.engine.evaluation.intervals import mean_estimate, normal_estimate
from peakgpt.engine.evaluation.metrics import METRICS, Answer, majority, metrics_of, number_of
from peakgpt.engine.evaluation.results import score_task
from peakgpt.engine.evaluation.task import Example, Task

WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat,", "red.", "Blue", "house", "an", "it's", "12"]
random.seed(1)
TEXTS = [" ".join(random.choices(WORDS, k=k)) for k in (0, 1, 3, 6, 9, 9, 12)]
TARGETS = [tuple(" ".join(random.choices(WORDS, k=k)) for k in (2, 7)) for _ in TEXTS]
TARGETS[4] = (TEXTS[4].upper() + "!", "x")
ANSWERS = [Answer(Example(str(i), "", targets), "", {}, (text,), (text,), text)
           for i, (text, targets) in enumerate(zip(TEXTS, TARGETS, strict=True))]  # fmt: skip


def values(name, answers=ANSWERS):
    return METRICS[name]().values(answers)


def test_squad_metrics_equal_those_of_the_harness():
    """lm-eval's copy of SQuAD's script, read as a file: importing its package takes seconds."""
    if (spec := importlib.util.find_spec("lm_eval")) is None:
        pytest.skip("lm-eval is not installed")
    squad = runpy.run_path(Path(spec.origin).parent / "tasks" / "qasper" / "metrics.py")
    pairs = list(zip(TEXTS, TARGETS, strict=True))
    f1 = [max(squad["f1_abstractive"]([text], [target]) for target in targets) for text, targets in pairs]
    assert values("squad_f1") == pytest.approx(f1) and 0 < min(f1[4:]) < 1
    normal = squad["normalize_answer"]
    exact = [normal(text) in map(normal, targets) for text, targets in pairs]
    assert values("squad_exact_match") == exact and sum(exact) == 1


def test_an_answer_without_words_has_f1_only_if_the_target_has_none():
    answers = [Answer(Example("", "", (target,)), "", {}, text=text) for text, target in (("The", "a"), ("", "x"))]
    assert values("squad_f1", answers) == [1.0, 0.0]


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_rouge_is_the_best_target_of_rouge_score(kind):
    rouge = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer([kind], use_stemmer=True)
    expected = [max(rouge.score(t, text)[kind].fmeasure for t in targets)
                for text, targets in zip(TEXTS, TARGETS, strict=True)]  # fmt: skip
    assert values(kind) == pytest.approx(expected) and max(expected) > 0.9
    estimate = METRICS[kind]().estimate(ANSWERS, 0)
    assert estimate.value == pytest.approx(np.mean(expected)) and estimate.method == "bootstrap"


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_bleu_and_chrf_are_sacrebleu_with_its_interval(name):
    """Answers may have different numbers of targets."""
    sacrebleu = pytest.importorskip("sacrebleu")
    answers = [*ANSWERS, Answer(Example("", "", ("one two three",)), "", {}, text="one two three four")]
    references = [[*(targets[i] for targets in TARGETS), ("one two three", None)[i]] for i in range(2)]
    make = {"bleu": sacrebleu.BLEU, "chrf": sacrebleu.CHRF}[name]
    texts = [answer.text for answer in answers]
    found = METRICS[name]().estimate(answers, 0)
    assert found.value == make().corpus_score(texts, references).score > 1
    resampled = make().corpus_score(texts, references, n_bootstrap=1000)
    assert (found.low, found.high) == pytest.approx((resampled._mean - resampled._ci, resampled._mean + resampled._ci))
    assert METRICS[name]().values(answers) is None
    assert METRICS[name]().estimate(answers[:1], 0).low is None


def test_choices_are_right_if_they_have_the_best_score():
    """acc_norm divides by bytes: a long choice has a lower log-probability."""
    example = Example("", "", ("ja", "oui oui"), {"ja": 1.0, "oui oui": 1.0, "né": 0.25, "no": 0.0})
    likely = [Answer(example, "", {"ja": -3, "oui oui": -4, "né": -2.4, "no": -9}),
              Answer(example, "", {"ja": -1, "oui oui": -9, "né": -3.1, "no": -2}),
              Answer(example, "", {"ja": -3, "oui oui": -4, "né": -1.6, "no": -9})]  # fmt: skip
    assert values("acc", likely) == [0, 1, 0]
    assert values("acc_norm", likely) == [1, 1, 0]  # -4/7 of "oui oui", -1/2 of "ja", -1.6/3 of the 3 bytes of "né"
    assert values("multiple_choice_grade", likely) == [0.25, 1, 0.25]
    assert METRICS["acc"]().chance([example]) == 0.5
    assert METRICS["multiple_choice_grade"]().chance([example]) == 2.25 / 4
    assert METRICS["exact_match"]().chance([example]) is None


@pytest.mark.parametrize(("text", "number"), [
    ("1,000", 1000), ("$12.50.", 12.5), (" -3 ", -3), ("50%", 50), ("1e3", 1000), ("", None), ("x", None),
    ("nan", None), ("-inf", None), ("1 2", None),
])  # fmt: skip
def test_numbers(text, number):
    found = number_of(text)
    assert found == number if number is None else math.isclose(found, number)


def test_number_match_and_exact_match():
    example = Example("", "", ("1000", "-5 "))
    answers = [Answer(example, "", {}, text=text) for text in ("1,000.0", "5", "-5", "")]
    assert values("number_match", answers) == [1, 0, 1, 0]
    assert values("exact_match", answers) == values("exact_str_match", answers) == [0, 0, 1, 0]


@pytest.mark.parametrize(("answers", "winner"), [
    (["7", "12", "12.0", ""], "12"),  # equal numbers are one answer
    (["", "", "b"], "b"),  # texts without an answer do not vote
    (["b", "a", "A", "b"], "b"),  # a tie: the first
    (["0", "0.00", "x"], "0"),
    (["", ""], ""), ([], ""),
])  # fmt: skip
def test_majority_of_votes(answers, winner):
    assert majority(answers) == winner


# ---- intervals


@pytest.mark.parametrize(("right", "count"), [(0, 10), (3, 10), (10, 10), (871, 1000), (1, 1)])
def test_wilson_interval_by_its_formula(right, count):
    z, p = 1.959963984540054, right / count
    center = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    found = mean_estimate([1.0] * right + [0.0] * (count - right), seed=0)
    assert (found.low, found.high) == pytest.approx((center - half, center + half)) and found.method == "wilson"
    assert found.value == p


def test_bootstrap_interval_covers_the_mean_and_depends_on_the_seed_only():
    """For 400 normal values it is the interval of the standard error, within the noise of 1000 resamples."""
    sample = np.random.default_rng(3).normal(0.5, 0.2, 400).tolist()
    found, error = mean_estimate(sample, seed=1), np.std(sample) / 20
    expected = normal_estimate(np.mean(sample), error)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.25 * error)
    assert found == mean_estimate(sample, seed=1) != mean_estimate(sample, seed=2)
    assert mean_estimate([0.5], seed=1).low is None
    assert normal_estimate(1.0, None).low is None


def test_chance_is_that_of_the_examples_that_are_asked():
    few, many = ({name: float(name == "a") for name in names} for names in ("ab", "abcd"))
    examples = tuple(Example(f"t:{i}", "?", ("a",), scores) for i, scores in enumerate((few, many)))
    task = Task(name="t", examples=examples, metrics=("acc",), preferred_score="acc")
    answers = [Answer(examples[0], "?", {"a": -1.0, "b": -2.0})]
    (result,) = score_task(task, "t.jsonl", metrics_of(task), answers, shots=0, seed=0).metrics
    assert result.chance == 0.5
