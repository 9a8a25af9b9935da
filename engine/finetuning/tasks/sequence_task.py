"""The tasks that have one label for an example of one or several sequences."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from peakgpt.engine.finetuning.examples import Example
from peakgpt.engine.finetuning.label_set import find_labels
from peakgpt.engine.finetuning.rows import Row
from peakgpt.engine.finetuning.sequences import pack, pad
from peakgpt.engine.finetuning.tasks.labelled import LabelledTask

Texts = tuple[str, ...]  # of one sequence


class SequenceTask(LabelledTask):
    """A task that is given by the texts of its sequences."""

    @abstractmethod
    def texts(self, row: Row) -> list[Texts]:
        """Return the sequences of a row, each as the texts that it joins.

        Raises:
            ValueError: a field is missing or is no text.
        """

    def learn(self, rows: Sequence[Row]) -> None:
        """Find the labels of the training rows."""
        self.labels = find_labels([(row, self.label_of(row)) for row in rows], self.config.labels.problem_type)

    def encode(self, rows: Sequence[Row], *, labelled: bool = True) -> list[Example]:
        """Encode rows; those without labels get any label."""
        labels = [self.encoded_label(row) if labelled else self.any_label for row in rows]
        return [pack(*parts) for parts in zip(self.encode_texts(rows), labels, strict=True)]

    def encode_texts(self, rows: Sequence[Row]) -> list[list[list[int]]]:
        """Return the sequences of each row.

        Raises:
            ValueError: a row lacks a text, or is longer than the most tokens of an example, which are not cut.
        """
        all_texts = [self.texts(row) for row in rows]
        distinct = list(dict.fromkeys(text for sequences in all_texts for texts in sequences for text in texts))
        ids = dict(zip(distinct, self.tokens.encode(distinct), strict=True))
        return [
            [self.fitted(row, [ids[text] for text in texts]) for texts in sequences]
            for row, sequences in zip(rows, all_texts, strict=True)
        ]

    def encoded_label(self, row: Row) -> np.ndarray:
        """Return the label of a row as an array of one number.

        Raises:
            ValueError: the row has none, or one that no training row has.
        """
        return self.labels.encoded(row, self.label_of(row))

    @property
    def any_label(self) -> np.ndarray:
        """A label for a row without one."""
        return np.zeros(1, np.float32 if self.is_regression else np.int64)

    def collate(self, examples: Sequence[Example]) -> tuple[Tensor, ...]:
        labels = torch.from_numpy(np.concatenate([example["label"] for example in examples]))
        return *pad(examples, self.tokens.pad, self.config.train.tokens), labels
