"""How well labels are predicted: the metrics of GLUE and of the GPT-1 paper, computed by scikit-learn and scipy.

    classes     accuracy, f1_macro, matthews; with two classes also f1, of the second one
    numbers     pearson, spearman

Wang et al. 2018, "GLUE", arXiv:1804.07461, table 1, names the metric of each task.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from peakgpt.engine.training.validation import SetMetrics

PACKAGES = {"sklearn": "scikit-learn", "scipy": "scipy"}  # module -> package


@dataclass(frozen=True)
class LabelMetrics(SetMetrics):
    """A model's result on examples with labels.

    Args:
        loss: L2, the mean of the task's loss over the examples, or over all labels of tokens.
        tokens: number of labels.
        scores: further metrics by name.
    """

    scores: Mapping[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        return {"validation_loss": self.loss, "validation_labels": self.tokens, **self.scores}

    def __str__(self) -> str:
        figures = {"loss": self.loss, **self.scores}
        return f"{', '.join(f'{name} {value:.4f}' for name, value in figures.items())}, {self.tokens:,} labels"


def require_packages() -> None:
    """Check that the packages of the metrics are installed, without importing them.

    Raises:
        ValueError: one is missing; the message says how to install it.
    """
    for module, package in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"got no package {package}, expected it installed: pip install 'peakgpt[finetune]'")


def class_metrics(predicted: Sequence[int], labels: Sequence[int], classes: int) -> dict[str, float]:
    """Return the metrics of predicted classes.

    Args:
        predicted, labels: ids of classes, at least one.
        classes: number of classes.
    """
    from sklearn import metrics  # takes a second

    truth, guess = np.asarray(labels), np.asarray(predicted)
    f1 = metrics.f1_score(truth, guess, labels=range(classes), average=None, zero_division=0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A single label was found")  # the coefficient is 0 then
        matthews = metrics.matthews_corrcoef(truth, guess)
    found = {"accuracy": metrics.accuracy_score(truth, guess), "f1_macro": np.mean(f1), "matthews": matthews}
    return {name: float(value) for name, value in {**found, **({"f1": f1[1]} if classes == 2 else {})}.items()}


def score_metrics(predicted: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Return the metrics of predicted numbers; a correlation is 0 if all predictions, or all labels, are equal."""
    from scipy import stats

    if len(labels) < 2:  # has no correlation
        return {"pearson": 0.0, "spearman": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        found = {"pearson": stats.pearsonr(predicted, labels), "spearman": stats.spearmanr(predicted, labels)}
    return {name: float(np.nan_to_num(result.statistic)) for name, result in found.items()}


def accuracy(predicted: Sequence[int], labels: Sequence[int]) -> dict[str, float]:
    """Return the share of right predictions."""
    from sklearn import metrics

    return {"accuracy": float(metrics.accuracy_score(labels, predicted))}
