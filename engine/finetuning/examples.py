"""Encoded examples of a run: arrays of numbers, in one file in its token folder.

An example is {name: array}, with the same names and dtypes in all examples of a task. The file has two tensors for each
name: the arrays of all examples, one behind the other, and where each begins. So a resumed run needs neither the data
nor the tokenizer that it began with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from peakgpt.engine.checkpoint.safetensors_io import read_safetensors, write_safetensors

Example = Mapping[str, np.ndarray]  # 1-D arrays
STARTS = ":starts"  # behind the name of an array


class Examples(Sequence[Example]):
    """The examples of a file, in its order.

    Attributes:
        digest: SHA-256 (hex) of all their numbers.
    """

    def __init__(self, columns: Mapping[str, tuple[np.ndarray, np.ndarray]]):
        """
        Args:
            columns: name -> (arrays of all examples, starts of each and the end).
        """
        self._columns = dict(columns)
        digest = hashlib.sha256()
        for name, (values, starts) in sorted(self._columns.items()):
            for part in (name.encode(), str(values.dtype).encode(), starts, values):
                digest.update(part)
        self.digest = digest.hexdigest()

    @classmethod
    def open(cls, path: Path) -> Examples:
        """Read a file.

        Raises:
            ValueError: the file is missing or damaged.
        """
        tensors, _ = read_safetensors(path)
        names = [name for name in tensors if not name.endswith(STARTS)]
        return cls({name: (tensors[name].numpy(), tensors[name + STARTS].numpy()) for name in names})

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()))[1]) - 1

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"example {index}: got {len(self)} examples")
        return {name: values[starts[index] : starts[index + 1]] for name, (values, starts) in self._columns.items()}


def token_count(example: Example) -> int:
    """Return the number of tokens of all sequences of an example, which are one behind the other in `ids`."""
    return len(example["ids"])


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write examples, at least one, into a new file.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {}
    for name in examples[0]:
        arrays = [example[name] for example in examples]
        starts = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
        tensors[name] = torch.from_numpy(np.concatenate(arrays))
        tensors[name + STARTS] = torch.from_numpy(starts)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, tensors, {})
