"""How the model of a run becomes the files of a checkpoint, and how they are read back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from peakgpt.engine.checkpoint.model_folder import (
    TokenizerFiles,
    check_state,
    open_layout,
    read_config,
    read_source_files,
    read_weights,
    to_layout,
    warn_of_own_layout,
    write_model_files,
)
from peakgpt.engine.model.transformer import Transformer

FileWriter = Callable[[Path, Mapping[str, Tensor]], None]


class ModelFiles(Protocol):
    """Writes and reads the model of one run."""

    def check(self, folder: Path) -> None:
        """Check before the first step that the model can be written.

        Args:
            folder: of the run, which warnings name.
        Raises:
            ValueError: the model has tensors that its files cannot have.
        """

    def layout(self, weights: Iterator[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """Convert the weights to the tensors of the files, one after the other.

        Args:
            weights: names and float32 tensors of the model's state dict.
        """

    def writer(self) -> FileWriter:
        """Return a function that writes files and tensors of `layout` into an empty folder.

        It runs in a thread while training goes on, so it has everything else that it reads from the model now.
        """

    def read(self, folder: Path) -> dict[str, Tensor] | None:
        """Return the state dict of a checkpoint in float32, without the tensors that never change.

        Returns:
            None if the checkpoint belongs to another model.
        Raises:
            ValueError: the checkpoint is damaged.
        """


class WholeModel:
    """A GPT in the layout of its family, with its tokenizer."""

    def __init__(self, model: Transformer, tokenizer: TokenizerFiles | None = None):
        self.model, self.tokenizer = model, tokenizer

    def check(self, folder: Path) -> None:
        check_state(self.model.config, self.model.state_dict())
        warn_of_own_layout(folder, self.model.config)

    def layout(self, weights: Iterator[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        return to_layout(self.model.config, self.model.state_dict().keys(), weights, self.model.source_files)

    def writer(self) -> FileWriter:
        config, tokenizer, source_files = self.model.config, self.tokenizer, self.model.source_files
        return lambda folder, tensors: write_model_files(folder, config, tensors, tokenizer, source_files)

    def read(self, folder: Path) -> dict[str, Tensor] | None:
        family, config = read_config(folder)
        if config != self.model.config:
            return None
        shapes = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        weights = read_weights(open_layout(folder, family), family, config, shapes, torch.float32)
        self.model.source_files = read_source_files(folder)
        return weights
