"""Question answering and commonsense reasoning: one sequence for each possible answer.

    [start; context question; delimiter; answer; extract]

The head gives each sequence a number, and a softmax over the sequences of an example gives the probabilities. Radford
et al. 2018, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from peakgpt.engine.finetuning.examples import Example
from peakgpt.engine.finetuning.label_metrics import accuracy
from peakgpt.engine.finetuning.labelled_model import ChoiceModel
from peakgpt.engine.finetuning.predictions import probabilities
from peakgpt.engine.finetuning.rows import Row
from peakgpt.engine.finetuning.tasks.sequence_task import SequenceTask, Texts

CONTEXT, QUESTION, CHOICES = "context", "question", "choices"


class MultipleChoice(SequenceTask):
    """A context, perhaps a question, a list of answers, and the number of the right one, from 0."""

    name = "multiple-choice"
    fields = (CONTEXT, CHOICES)
    model_class = ChoiceModel

    is_regression = False

    def learn(self, rows: Sequence[Row]) -> None:
        """The choices are no classes: there is nothing to learn."""

    def texts(self, row: Row) -> list[Texts]:
        *names, choices_name = self._names(row)
        context = " ".join(row.text(name) for name in names)
        choices = row.values.get(choices_name)
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(text, str) for text in choices):
            got = repr(choices) if choices_name in row.values else f"fields {', '.join(row.values)}"
            raise row.error(f"got {got:.200}, expected a list of two texts or more in {choices_name!r}")
        return [(context, row.checked(choices_name, choice)) for choice in choices]

    def scores(self, predicted: Sequence[Any], truth: Sequence[Any]) -> dict[str, float]:
        return accuracy(predicted, truth)

    def prediction(self, example: Example, logits: Tensor) -> dict[str, Any]:
        numbers = logits[: len(example["lengths"])]
        return {"prediction": int(numbers.argmax()), "probabilities": probabilities(numbers)}

    def encoded_label(self, row: Row) -> np.ndarray:
        label, count = self.label_of(row), len(self.texts(row))
        if type(label) is not int or not 0 <= label < count:
            raise row.error(f"got label {label!r:.60}, expected the number of one of the {count} choices, from 0")
        return np.array([label], np.int64)

    def _names(self, row: Row) -> Texts:
        names = self.config.labels.text_fields
        if names is None:
            return (CONTEXT, QUESTION, CHOICES) if QUESTION in row.values else (CONTEXT, CHOICES)
        if len(names) not in (2, 3):
            raise ValueError(f"text_fields are {' '.join(names)}, expected 2 or 3 for task {self.name}: those of "
                             f"{CONTEXT}, perhaps {QUESTION}, and {CHOICES}")  # fmt: skip
        return names
