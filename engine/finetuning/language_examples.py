"""Examples of language modeling as rows of batches: padded, or packed without attention from one to another.

An example has `ids` and `targets`, of the same length; a packed row also `position_ids`, which begin anew with each
example. Padding is on the right, where no token of an example attends to it. In packed rows each token of it is a
document of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from peakgpt.engine.finetuning.examples import Example
from peakgpt.engine.finetuning.packing import best_fit
from peakgpt.kernels.ops.linear_cross_entropy import IGNORE_INDEX

# Arrays of an example, the dtype that the model takes, and what fills them up.
COLUMNS = (("ids", torch.int64, 0), ("targets", torch.int64, IGNORE_INDEX), ("position_ids", torch.int32, 0))


def pack(examples: Sequence[Example], size: int) -> list[Example]:
    """Return rows of at most `size` tokens, each of several examples."""
    return [
        {
            **{name: np.concatenate([examples[i][name] for i in row]) for name in ("ids", "targets")},
            "position_ids": np.concatenate([np.arange(len(examples[i]["ids"]), dtype=np.int32) for i in row]),
        }
        for row in best_fit([len(example["ids"]) for example in examples], size)
    ]


def collate(examples: Sequence[Example], length: int | None = None) -> tuple[Tensor, ...]:
    """Return ids and targets, (B, T) int64, and of packed rows position_ids, (B, T) int32.

    Args:
        examples: B of them.
        length: T. None: that of the longest example.
    """
    longest = max(len(example["ids"]) for example in examples) if length is None else length
    return tuple(
        _padded([example[name] for example in examples], longest, dtype, filler)
        for name, dtype, filler in COLUMNS
        if name in examples[0]
    )


def _padded(arrays: Sequence[np.ndarray], length: int, dtype: torch.dtype, filler: int) -> Tensor:
    rows = torch.full((len(arrays), length), filler, dtype=dtype)
    for row, array in zip(rows, arrays, strict=True):
        row[: len(array)] = torch.from_numpy(np.ascontiguousarray(array))
    return rows
