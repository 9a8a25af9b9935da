"""Token classification: [start; words], and a class for each word, such as its part of speech or the kind of a name.

The class of a word is read at its last token, which has read the whole word and all words before it. The model is
causal: it does not see the words that follow. The paper has no such task; the sequence begins as those of its others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peakgpt.engine.checkpoint.families.heads import TOKEN
from peakgpt.engine.finetuning.examples import Example
from peakgpt.engine.finetuning.label_set import find_labels
from peakgpt.engine.finetuning.labelled_model import TokenModel
from peakgpt.engine.finetuning.rows import Row
from peakgpt.engine.finetuning.sequences import pack, pad
from peakgpt.engine.finetuning.tasks.label_config import CLASSES
from peakgpt.engine.finetuning.tasks.labelled import LabelledTask
from peakgpt.kernels.ops.linear_cross_entropy import IGNORE_INDEX


class TokenClassification(LabelledTask):
    """A list of words, and a list of as many labels."""

    name = "token-classification"
    fields = ("tokens",)
    model_class = TokenModel
    kind = TOKEN
    has_extract = False

    def learn(self, rows: Sequence[Row]) -> None:
        self.labels = find_labels([(row, label) for row in rows for label in self._labels_of_words(row)], CLASSES)

    def encode(self, rows: Sequence[Row], *, labelled: bool = True) -> list[Example]:
        """Encode rows; words without labels get any label."""
        examples = []
        for row, (ids, ends) in zip(rows, self.encode_words(rows), strict=True):
            classes = [self.labels.id_of(row, label) for label in self._labels_of_words(row)] if labelled else []
            label = np.full(len(ids), IGNORE_INDEX, np.int64)
            label[ends] = classes[: len(ends)] if labelled else 0
            examples.append(pack([ids], label))
        return examples

    def encode_words(self, rows: Sequence[Row]) -> list[tuple[list[int], list[int]]]:
        """Return the sequence of each row, and the index of the last token of each word, without those cut off.

        Raises:
            ValueError: a row has no list of words, or is longer than the most tokens of an example, which are not cut.
        """
        words = [self._words(row) for row in rows]
        encoded = self.tokenizer.encode_with_offsets([" ".join(texts) for texts in words])
        return [self._located(*parts) for parts in zip(rows, words, encoded, strict=True)]

    def collate(self, examples: Sequence[Example]) -> tuple[Tensor, ...]:
        ids, lengths = pad(examples, self.tokens.pad, self.config.train.tokens)
        labels = torch.full((len(examples), ids.shape[-1]), IGNORE_INDEX)
        for row, example in zip(labels, examples, strict=True):
            row[: len(example["label"])] = torch.from_numpy(example["label"])
        return ids, lengths, labels

    def pairs(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        is_label = labels != IGNORE_INDEX
        return self.decide(logits)[is_label], labels[is_label]

    def prediction(self, example: Example, logits: Tensor) -> dict[str, Any]:
        found = logits[: len(example["label"])][torch.from_numpy(example["label"] != IGNORE_INDEX)]
        return {"prediction": [self.labels.names[index] for index in found.argmax(-1).tolist()]}

    def label(self, example: Example) -> Any:
        return [self.labels.names[index] for index in example["label"].tolist() if index != IGNORE_INDEX]

    def _words(self, row: Row) -> list[str]:
        (name,) = self.field_names
        words = row.values.get(name)
        if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
            got = repr(words) if name in row.values else f"fields {', '.join(row.values)}"
            raise row.error(f"got {got:.200}, expected a list of words in {name!r}")
        return [row.checked(name, word) for word in words]

    def _labels_of_words(self, row: Row) -> list[Any]:
        labels, words = self.label_of(row), self._words(row)
        if not isinstance(labels, list) or len(labels) != len(words):
            raise row.error(f"got {labels!r:.60}, expected a list of {len(words)} labels, one for each word")
        return labels

    def _located(
        self, row: Row, words: Sequence[str], encoded: tuple[list[int], list[tuple[int, int]]]
    ) -> tuple[list[int], list[int]]:  # fmt: skip
        """Return the sequence of a row's words, and the index of the last token of each word that is not cut off."""
        ids, offsets = encoded
        sequence, first = self.fitted(row, [ids]), len(self.tokens.sequence(()))
        ends, begin = [], 0
        for word in words:
            inside = [i for i, (left, right) in enumerate(offsets) if left < begin + len(word) and right > begin]
            if not inside or first + inside[-1] in ends[-1:]:
                raise row.error(f"got the word {word!r:.60}, expected one that has a last token of its own")
            ends.append(first + inside[-1])
            begin += len(word) + 1
        kept = [end for end in ends if end < len(sequence)]
        if not kept:
            raise row.error(f"got no whole word in the first {len(sequence)} tokens, expected at least one")
        return sequence, kept
