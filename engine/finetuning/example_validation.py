"""Validation on held-out examples of a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from peakgpt.engine.finetuning.examples import Examples, token_count
from peakgpt.engine.finetuning.task import Task
from peakgpt.engine.training.samples import Sample
from peakgpt.engine.training.validation import BestValidation, SetMetrics
from peakgpt.engine.training.validation_config import ValidationConfig


class ExampleValidator(BestValidation):
    """Evaluates the model of a task on examples that it is not trained on."""

    def __init__(
        self, model: nn.Module, sets: Mapping[str, Examples], task: Task, config: ValidationConfig, *, batch: int
    ):
        """
        Args:
            model: from `task.model`.
            sets: held-out examples by name, at least one set.
            task: collates and evaluates.
            config: what to measure.
            batch: examples of a forward pass.
        """
        super().__init__(model, config)
        self.sets, self.task, self.batch, self.sampler = dict(sets), task, batch, task.sampler(model)

    @torch.no_grad()
    def evaluate(self, batches: int | None) -> dict[str, SetMetrics]:
        return {
            name: self.task.evaluate(self.model, self._batches(self._numbers(examples, batches), examples))
            for name, examples in self.sets.items()
        }

    def samples(self) -> list[Sample]:
        return self.sampler.samples()

    def count_targets(self) -> int:
        limit = self.config.validation_batches
        return sum(
            token_count(examples[number])
            for examples in self.sets.values()
            for number in self._numbers(examples, limit)
        )

    def _numbers(self, examples: Examples, batches: int | None) -> range:
        return range(len(examples) if batches is None else min(len(examples), batches * self.batch))

    def _batches(self, numbers: range, examples: Examples) -> Iterator[tuple[Tensor, ...]]:
        """Yield batches on the model's device; examples of similar lengths are in one batch, with little padding."""
        device = next(self.model.parameters()).device
        order = sorted(numbers, key=lambda number: self.task.length(examples[number]))
        for start in range(0, len(order), self.batch):
            batch = self.task.collate([examples[number] for number in order[start : start + self.batch]])
            yield tuple(tensor.to(device) for tensor in batch)
