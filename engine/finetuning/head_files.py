"""Checkpoints of models with a head: a folder that transformers' class for such a task loads.

    model.safetensors      the language model in the layout of its family, and the head: score.weight, or as
                           checkpoint/families/heads.py says
    config.json            also id2label, label2id, problem_type and pad_token_id; the class as `architectures`
    peakgpt_task.json      the task and what it has learned, for `peakgpt predict`
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peakgpt.engine.checkpoint.families.catalogue import family_of
from peakgpt.engine.checkpoint.families.heads import head_class, head_name
from peakgpt.engine.checkpoint.folder import CONFIG
from peakgpt.engine.checkpoint.model_files import FileWriter
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
from peakgpt.engine.finetuning.labelled_model import GPT_PREFIX, HEAD_PREFIX, LabelledModel
from peakgpt.kernels.strict_json import dumps

TASK_FILE = "peakgpt_task.json"


class HeadFiles:
    """Writes and reads the checkpoints of a LabelledModel."""

    def __init__(
        self, model: LabelledModel, tokenizer: TokenizerFiles, *, kind: str, fields: Mapping[str, Any],
        task: Mapping[str, Any],
    ):  # fmt: skip
        """
        Args:
            model: to write.
            tokenizer: with the tokens of the task.
            kind: SEQUENCE or TOKEN of checkpoint/families/heads.py.
            fields: of config.json.
            task: content of peakgpt_task.json.
        """
        self.model, self.tokenizer, self.fields, self.task = model, tokenizer, dict(fields), dict(task)
        family = family_of(model.config, model.source_files.get(CONFIG))
        self.family, self.head, self.class_name = family, head_name(family, kind), head_class(family, kind)
        if self.class_name is not None:
            self.fields["architectures"] = [self.class_name]

    def check(self, folder: Path) -> None:
        check_state(self.model.config, self.model.gpt.state_dict())
        warn_of_own_layout(folder, self.model.config)
        if self.class_name is None:
            warnings.warn(f"checkpoint {folder}: transformers has no class for the head of a {self.family.model_type} "
                          "model; peakgpt predict reads it", stacklevel=3)  # fmt: skip

    def layout(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        model, head = self.model, {}

        def language_model() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name.startswith(GPT_PREFIX):
                    yield name.removeprefix(GPT_PREFIX), tensor
                else:
                    head[f"{self.head}.{name.removeprefix(HEAD_PREFIX)}"] = tensor

        yield from to_layout(model.config, model.gpt.state_dict().keys(), language_model(), model.source_files)
        yield from head.items()

    def writer(self) -> FileWriter:
        config, tokenizer, source_files = self.model.config, self.tokenizer, self.model.source_files
        fields, task = self.fields, f"{dumps(self.task, indent=1)}\n"

        def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
            write_model_files(folder, config, tensors, tokenizer, source_files, fields=fields)
            (folder / TASK_FILE).write_text(task, encoding="utf-8")

        return write

    def read(self, folder: Path) -> dict[str, Tensor] | None:
        family, config = read_config(folder)
        if config != self.model.config:
            return None
        opened = open_layout(folder, family)
        state = {f"{HEAD_PREFIX}{name}": self._head_tensor(opened.path, opened.tensors, name, tensor)
                 for name, tensor in self.model.head.state_dict().items()}  # fmt: skip
        shapes = {name: tensor.shape for name, tensor in self.model.gpt.state_dict().items()}
        weights = read_weights(opened, family, config, shapes, torch.float32)
        self.model.gpt.source_files = read_source_files(folder)
        return {**{f"{GPT_PREFIX}{name}": tensor for name, tensor in weights.items()}, **state}

    def _head_tensor(self, path: Path, tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
        """Take a tensor of the head out of those of a file.

        Raises:
            ValueError: it is missing, or of another shape.
        """
        tensor = tensors.pop(f"{self.head}.{name}", None)
        if tensor is None or tensor.shape != like.shape:
            got = "no such tensor" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise ValueError(f"{path}: {self.head}.{name}: got {got}, expected shape {tuple(like.shape)}")
        return tensor.float()
