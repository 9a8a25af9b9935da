"""What the tasks with labels have in common: the tokens of the sequences, a model with a head, metrics, files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from peakgpt.engine.checkpoint.families.heads import SEQUENCE
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.finetuning.config import FinetuneConfig
from peakgpt.engine.finetuning.examples import Example
from peakgpt.engine.finetuning.head_files import HeadFiles
from peakgpt.engine.finetuning.label_metrics import LabelMetrics, class_metrics, require_packages, score_metrics
from peakgpt.engine.finetuning.label_set import LabelSet
from peakgpt.engine.finetuning.labelled_model import LabelledModel, SequenceModel
from peakgpt.engine.finetuning.predictions import (
    CONFUSION_MATRIX,
    PREDICTIONS,
    Predictions,
    probabilities,
    write_confusion_matrix,
)
from peakgpt.engine.finetuning.rows import Row
from peakgpt.engine.finetuning.sequences import shortened, unpack
from peakgpt.engine.finetuning.special_tokens import add_task_tokens
from peakgpt.engine.finetuning.task import Task
from peakgpt.engine.finetuning.transfer import transferred
from peakgpt.engine.gpt import GPT
from peakgpt.kernels.files import write_atomically
from peakgpt.kernels.strict_json import dumps


class LabelledTask(Task):
    """A task whose rows have texts and labels.

    Attributes:
        tokens: the tokenizer with the added tokens, and their ids.
        labels: what the head predicts; for choices it has no names.
    """

    fields: ClassVar[tuple[str, ...]]  # of a row, which have its texts
    model_class: ClassVar[type[LabelledModel]] = SequenceModel
    kind: ClassVar[str] = SEQUENCE  # of transformers' class
    has_extract: ClassVar[bool] = True

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer, state: dict[str, Any] | None = None):
        """
        Args:
            config, tokenizer, state: as in Task.
        Raises:
            ValueError: scikit-learn or scipy is missing, or a token cannot be added.
        """
        require_packages()
        self.tokens = add_task_tokens(tokenizer, has_extract=self.has_extract)
        super().__init__(config, self.tokens.tokenizer, state)
        self.labels = LabelSet(())
        if state is not None:
            self.labels = LabelSet(tuple(state["labels"]))
            # The tokenizer of a run has the added tokens, which were new when it began.
            self.tokens = replace(self.tokens, first_new=state.get("first_new", self.tokens.first_new))

    def state_dict(self) -> dict[str, Any]:
        return {"labels": list(self.labels.names), "first_new": self.tokens.first_new}

    def length(self, example: Example) -> int:
        return int(example["lengths"].max())

    def model(self, gpt: GPT) -> LabelledModel:
        """Return the model with a head; its GPT has new tokens, and perhaps new last layers."""
        layers = self.config.labels.transfer_layers
        return self.with_head(transferred(gpt, self.tokenizer.vocab_size, self.tokens.first_new, layers))

    def with_head(self, gpt: GPT) -> LabelledModel:
        """Return the model of a GPT that has all tokens."""
        labels = self.config.labels
        return self.model_class(
            gpt, self.labels.outputs, lm_loss_weight=labels.lm_loss_weight,
            classifier_dropout=labels.classifier_dropout, is_regression=self.is_regression,
        )  # fmt: skip

    @property
    def is_regression(self) -> bool:
        """Whether the head predicts a number."""
        return self.labels.is_regression

    def evaluate(self, model: LabelledModel, batches: Iterable[tuple[Tensor, ...]]) -> LabelMetrics:
        predicted, truth, losses = [], [], []
        for input_ids, lengths, labels in batches:
            logits = model.predict(input_ids, lengths)
            losses.append(model.losses(logits, labels) * model.label_counts(labels))
            for found, tensor in zip((predicted, truth), self.pairs(logits, labels), strict=True):
                found += tensor.tolist()
        loss = float(torch.cat(losses).sum()) / len(truth)
        return LabelMetrics(loss, len(truth), scores=self.scores(predicted, truth))

    @torch.no_grad()
    def predict(self, model: LabelledModel, examples: Sequence[Example], batch: int) -> Predictions:
        """Predict the labels of examples.

        Args:
            model: of this task.
            examples: from `encode`, labelled or not.
            batch: examples of a forward pass.
        """
        rows: dict[int, dict[str, Any]] = {}
        predicted, truth = [], []
        order = sorted(range(len(examples)), key=lambda index: self.length(examples[index]))
        model.eval()
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            tensors = self.collate([examples[index] for index in chosen])
            input_ids, lengths, labels = (tensor.to(model.gpt.device) for tensor in tensors)
            logits = model.predict(input_ids, lengths)
            for found, tensor in zip((predicted, truth), self.pairs(logits, labels), strict=True):
                found += tensor.tolist()
            rows |= {i: self.prediction(examples[i], one) for i, one in zip(chosen, logits.cpu(), strict=True)}
        return Predictions([rows[index] for index in range(len(examples))], predicted, truth)

    def prediction(self, example: Example, logits: Tensor) -> dict[str, Any]:
        """Return the prediction for an example as JSON, from its row of the logits."""
        if self.is_regression:
            return {"prediction": float(logits)}
        shares = dict(zip(self.labels.names, probabilities(logits), strict=True))
        return {"prediction": self.labels.names[int(logits.argmax())], "probabilities": shares}

    def label(self, example: Example) -> Any:
        """Return the label of an example as JSON."""
        (value,) = example["label"].tolist()
        return self.labels.names[value] if self.labels.names else value

    def finish(self, run: Path, model: LabelledModel, examples: Sequence[Example]) -> list[str]:
        """Write the predictions for the examples of validation, and their confusion matrix, into the run's folder.

        Each line also has the first sequence of the example as text, as the model reads it.
        """
        found = self.predict(model, examples, self.config.train.micro_batch or self.config.train.batch)
        lines = [
            dumps({"text": self.tokenizer.decode(unpack(example)[0].tolist()), **row, "label": self.label(example)})
            for example, row in zip(examples, found.rows, strict=True)
        ]
        write_atomically(run / PREDICTIONS, "".join(f"{line}\n" for line in lines).encode())
        files = [run / PREDICTIONS]
        if self.labels.names:
            files.append(run / CONFUSION_MATRIX)
            write_confusion_matrix(files[-1], found, self.labels.names)
        return [f"predictions for the validation examples: {' '.join(map(str, files))}"]

    def pairs(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predictions and the labels of a batch, one for each label."""
        return self.decide(logits), labels

    def decide(self, logits: Tensor) -> Tensor:
        """Return the prediction of each example or token: an id, or a number."""
        return logits.squeeze(-1) if self.is_regression else logits.argmax(-1)

    def scores(self, predicted: Sequence[Any], truth: Sequence[Any]) -> dict[str, float]:
        """Return the metrics of predictions."""
        if self.is_regression:
            return score_metrics(predicted, truth)
        return class_metrics(predicted, truth, self.labels.outputs)

    def files(self, model: LabelledModel) -> HeadFiles:
        fields = {**self.labels.config_fields(), "pad_token_id": self.tokens.pad,
                  "classifier_dropout": model.classifier_dropout}  # fmt: skip
        return HeadFiles(model, self.tokenizer, kind=self.kind, fields=fields, task=self.saved())

    def saved(self) -> dict[str, Any]:
        """Return what `peakgpt predict` needs besides the model and the tokenizer."""
        labels, train = self.config.labels, self.config.train
        settings = {"text_fields": labels.text_fields, "label_field": labels.label_field, "tokens": train.tokens}
        return {"task": self.name, "state": self.state_dict(), "settings": settings}

    @property
    def field_names(self) -> tuple[str, ...]:
        """The fields of a row that have its texts.

        Raises:
            ValueError: another number of them than the task has.
        """
        names = self.config.labels.text_fields
        if names is not None and len(names) != len(self.fields):
            raise ValueError(f"text_fields are {' '.join(names)}, expected {len(self.fields)} for task {self.name}: "
                             f"those of {' '.join(self.fields)}")  # fmt: skip
        return names or self.fields

    def label_of(self, row: Row) -> Any:
        """Return the value of the label field.

        Raises:
            ValueError: the row lacks it.
        """
        name = self.config.labels.label_field
        if name not in row.values:
            raise row.error(f"got fields {', '.join(row.values):.200}, expected a label in {name!r}")
        return row.values[name]

    def fitted(self, row: Row, texts: Sequence[list[int]]) -> list[int]:
        """Return the sequence of encoded texts, cut if that is asked for.

        Raises:
            ValueError: it has too many tokens.
        """
        limit, added = self.config.train.tokens, len(self.tokens.sequence(*[()] * len(texts)))
        tokens = added + sum(map(len, texts))
        if tokens > limit:
            if not self.config.data.truncate:
                raise row.error(f"got an example of {tokens} tokens, expected at most {limit}: --truncate cuts it, and "
                                "a higher --tokens takes up to the context of the model")  # fmt: skip
            if limit - added < len(texts):
                raise row.error(f"got tokens {limit}, expected at least {added + len(texts)}: {added} of the task, and "
                                f"one of each of the {len(texts)} texts")  # fmt: skip
            texts = shortened(texts, limit - added)
        return self.tokens.sequence(*texts)
