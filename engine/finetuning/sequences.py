"""Token sequences of examples: cut to a length, put one after the other in an example, and padded to a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from peakgpt.engine.finetuning.examples import Example

ROUNDED = 8  # the length of a batch is a multiple of this, so that fewer lengths occur


def shortened(texts: Sequence[list[int]], room: int) -> list[list[int]]:
    """Cut the ends of texts until they have `room` tokens together: always the longest one, of equal ones the last.

    Raises:
        ValueError: there is no room for one token of each.
    """
    if room < len(texts):
        raise ValueError(f"got room for {room} tokens of {len(texts)} texts, expected one of each or more")
    limits = [min(len(text), room) for text in texts]
    while sum(limits) > room:
        longest = max(range(len(limits)), key=lambda index: (limits[index], index))
        limits[longest] -= 1
    return [text[:limit] for text, limit in zip(texts, limits, strict=True)]


def pack(sequences: Sequence[Sequence[int]], label: np.ndarray) -> Example:
    """Return an example of several sequences: `ids` one after the other, `lengths`, and `label`."""
    lengths = [len(sequence) for sequence in sequences]
    ids = [token for sequence in sequences for token in sequence]
    return {"ids": np.array(ids, np.int32), "lengths": np.array(lengths, np.int32), "label": label}


def unpack(example: Example) -> list[np.ndarray]:
    """Return the sequences of an example."""
    return np.split(example["ids"], np.cumsum(example["lengths"])[:-1])


def pad(examples: Sequence[Example], fill: int, longest: int) -> tuple[Tensor, Tensor]:
    """Pad the sequences of a batch at their ends.

    Args:
        examples: of `pack`.
        fill: id of the padding.
        longest: most tokens of a row.
    Returns:
        (ids, lengths), int64 (B, S, T) and (B, S). S is the most sequences of an example; others have length 0.
    """
    count = max(len(example["lengths"]) for example in examples)
    tokens = max(int(example["lengths"].max()) for example in examples)
    tokens = min(-(-tokens // ROUNDED) * ROUNDED, max(longest, tokens))
    ids = np.full((len(examples), count, tokens), fill, np.int64)
    lengths = np.zeros((len(examples), count), np.int64)
    for row, example in enumerate(examples):
        lengths[row, : len(example["lengths"])] = example["lengths"]
        for column, sequence in enumerate(unpack(example)):
            ids[row, column, : len(sequence)] = sequence
    return torch.from_numpy(ids), torch.from_numpy(lengths)
