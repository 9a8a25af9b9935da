"""What a task of fine-tuning decides; `tasks/` has one file for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from peakgpt.engine.checkpoint.model_files import ModelFiles, WholeModel
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.finetuning.config import FinetuneConfig
from peakgpt.engine.finetuning.examples import Example, token_count
from peakgpt.engine.finetuning.rows import Row
from peakgpt.engine.gpt import GPT
from peakgpt.engine.training.samples import Sampler
from peakgpt.engine.training.validation import SetMetrics


class Task(ABC):
    """How rows of a file become batches, which model they train, and how it is evaluated.

    Attributes:
        config: of the run.
        tokenizer: with the tokens that the task adds; every checkpoint has it.
        fixed_shapes: whether all training batches have the same shapes, so that a step can be captured.
    """

    name: ClassVar[str]

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer, state: dict[str, Any] | None = None):
        """
        Args:
            config: of the run.
            tokenizer: of the checkpoint; of a run that goes on, the one that this class had.
            state: from `state_dict`. None: of a new run.
        Raises:
            ValueError: the tokenizer lacks what the task needs.
        """
        self.config, self.tokenizer, self.fixed_shapes = config, tokenizer, False

    def learn(self, rows: Sequence[Row]) -> None:  # noqa: B027 most tasks learn nothing
        """Take what the task must know of all training rows, such as their labels, before the first is encoded."""

    def state_dict(self) -> dict[str, Any]:
        """Return what `learn` has found, as JSON."""
        return {}

    @abstractmethod
    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Encode rows.

        Raises:
            ValueError: a row is not an example of the task; the message names its file and line.
        """

    def arrange(self, examples: list[Example]) -> list[Example]:
        """Return the rows of batches: each example alone, or several packed into one."""
        return examples

    def describe(self, examples: Sequence[Example], rows: Sequence[Example]) -> str:
        """Say in a line what the training data are, before and after `arrange`."""
        return f"{len(examples):,} examples, {sum(map(token_count, examples)):,} tokens"

    def length(self, example: Example) -> int:
        """Return the tokens of an example's longest sequence, on which the padding of a batch depends."""
        return token_count(example)

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> tuple[Tensor, ...]:
        """Return a batch, as the model's call takes it: tensors on the CPU whose first dimension is the examples."""

    def model(self, gpt: GPT) -> nn.Module:
        """Build the model that is trained around a GPT, whose weights are those of the checkpoint, or any.

        Its `config` is the GPTConfig after all changes; see `Trainer` for how it is called.
        """
        return gpt

    @abstractmethod
    def evaluate(self, model: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> SetMetrics:
        """Evaluate a model in evaluation mode.

        Args:
            model: from `model`.
            batches: from `collate`, on the model's device.
        """

    def sampler(self, model: nn.Module) -> Sampler:
        """Return what continues the prompts of a run.

        Raises:
            ValueError: there are prompts, and the task has no use for them.
        """
        if prompts := self.config.validation.prompts:
            raise ValueError(f"prompts: got {prompts[0]!r:.40} with task {self.name}, expected them with task sft")
        return Sampler(model, self.config.validation, None, None, 0)

    def finish(self, run: Path, model: nn.Module, examples: Sequence[Example]) -> list[str]:
        """Write what a run leaves besides its checkpoints, at its end.

        Args:
            run: its folder.
            model: with the weights of the best checkpoint.
            examples: of validation.
        Returns:
            Lines to print.
        """
        return []

    def files(self, model: nn.Module) -> ModelFiles:
        """Return how checkpoints of the model are written and read."""
        return WholeModel(model, self.tokenizer)
