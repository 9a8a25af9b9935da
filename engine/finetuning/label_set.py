"""The labels of a task: classes by name, or numbers to predict.

Classes are the values of the label field as text, in sorted order; numbers sort by value, so that 0 and 1 are classes 0
and 1. They are written as transformers' id2label, label2id, num_labels and problem_type.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peakgpt.engine.finetuning.rows import Row
from peakgpt.engine.finetuning.tasks.label_config import CLASSES, SCORES


@dataclass(frozen=True)
class LabelSet:
    """What the head predicts.

    Args:
        names: of the classes by id; () for numbers.
    """

    names: tuple[str, ...]

    @property
    def is_regression(self) -> bool:
        """Whether labels are numbers."""
        return not self.names

    @property
    def outputs(self) -> int:
        """The number of rows of the head's weight."""
        return len(self.names) or 1

    def encoded(self, row: Row, value: Any) -> np.ndarray:
        """Return a label as an array of one number: the id of its class, or the number itself."""
        if self.is_regression:
            return np.array([score_of(row, value)], np.float32)
        return np.array([self.id_of(row, value)], np.int64)

    def id_of(self, row: Row, value: Any) -> int:
        """Return the id of a class.

        Args:
            row: for the error.
            value: of the label field.
        Raises:
            ValueError: no training example has this label.
        """
        name = label_name(row, value)
        if name not in self.names:
            known = ", ".join(map(repr, self.names[:8])) + (" ..." if len(self.names) > 8 else "")
            raise row.error(f"got label {name!r:.60}, expected one of the training examples: {known}")
        return self.names.index(name)

    def config_fields(self) -> dict[str, Any]:
        """Return the fields of config.json that transformers reads."""
        names = self.names or ("LABEL_0",)
        return {
            "id2label": {str(index): name for index, name in enumerate(names)},
            "label2id": {name: index for index, name in enumerate(names)},
            "problem_type": SCORES if self.is_regression else CLASSES,
        }


def find_labels(labels: Sequence[tuple[Row, Any]], problem_type: str | None) -> LabelSet:
    """Return the labels of training examples.

    Args:
        labels: row and value of the label field, of each example, or of each word.
        problem_type: CLASSES or SCORES. None: numbers if one of the labels has a fraction or a decimal point.
    Raises:
        ValueError: a label is not text or a number, is the only one, or the only one of its class.
    """
    if problem_type is None:
        problem_type = SCORES if any(type(value) is float for _, value in labels) else CLASSES
    if problem_type == SCORES:
        scores = {score_of(row, value) for row, value in labels}
        if len(scores) < 2:
            raise labels[0][0].error(f"got label {scores.pop()} in all examples, expected two values or more")
        return LabelSet(())
    counts = Counter(label_name(row, value) for row, value in labels)
    if len(counts) < 2:
        raise labels[0][0].error(f"got label {next(iter(counts))!r} in all examples, expected two classes or more")
    for row, value in labels:
        if counts[name := label_name(row, value)] == 1:
            raise row.error(f"got the only example of label {name!r:.60}, expected two or more of each class")
    return LabelSet(tuple(sorted(counts, key=_order)))


def label_name(row: Row, value: Any) -> str:
    """Return the name of a class: text, or a number or a truth value as JSON writes it."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int | float):  # bool too
        return json.dumps(value)
    raise row.error(f"got label {value!r:.60}, expected text or a number")


def score_of(row: Row, value: Any) -> float:
    """Return a label that is a number.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise row.error(f"got label {value!r:.60}, expected a number, as problem_type is {SCORES}")
    return float(value)


def _order(name: str) -> tuple[float, str]:
    """Sort numbers by value, before other names."""
    try:
        number = float(name)
    except ValueError:
        number = math.inf
    return (number if math.isfinite(number) else math.inf), name
