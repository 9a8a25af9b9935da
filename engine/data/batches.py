"""Training and validation batches, cut from a token stream.

An epoch takes the token stream from a random offset o, cuts it into windows of T inputs and the T targets one to
their right, and visits the windows in random order:

    window i:  ids = stream[o + iT : o + (i+1)T]    targets = stream[o + iT + 1 : o + (i+1)T + 1]

so every token is an input at most once, and a target at most once, in an epoch. The order comes from the raw 64-bit
words of Philox with the key (seed, epoch). numpy guarantees those words for all versions (NEP 19), unlike its shuffles.

A window may contain several documents. A document begins with the token that separates documents: its last token
predicts the separator, and the separator predicts the first token of the next document, so no target is lost.

Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", SC'11 (Philox).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from peakgpt.engine.data.shards import TokenShards
from peakgpt.kernels.ops.linear_cross_entropy import IGNORE_INDEX


class Batches:
    """An endless iterator over training batches: (ids, targets), int64 tensors (B, T), targets shifted by one.

    With a document token there are also the position_ids, int32 (B, T): the position of each token in its document.
    The position in the data is `epoch` and `window`, the number of windows taken in this epoch. If the windows that are
    left are fewer than a batch, they are skipped; each epoch skips other windows.

    Args:
        shards: the token stream.
        batch, tokens: B and T.
        seed: 0 to 2^64 - 1; seed and epoch determine offset and order.
        document_token: the id with which each document begins. None: no position_ids.
    Raises:
        ValueError: the stream has fewer than B * T + 1 tokens, or a size or the seed is out of range.
    """

    def __init__(self, shards: TokenShards, batch: int, tokens: int, seed: int, *, document_token: int | None = None):
        _check_sizes(batch, tokens)
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed: got {seed}, expected 0 to 2^64 - 1")
        if len(shards) < batch * tokens + 1:
            raise ValueError(
                f"training data: got {len(shards)} tokens, expected at least {batch * tokens + 1} for one batch of "
                f"{batch} x {tokens} and its last target"
            )
        self.shards, self.batch, self.tokens, self.seed = shards, batch, tokens, seed
        self.document_token = document_token
        self.epoch, self.window = 0, 0
        self._offset, self._order = self._plan(0)

    def _plan(self, epoch: int) -> tuple[int, np.ndarray]:
        """Return the offset of the epoch's first window, and the windows' order."""
        words = np.random.Philox(key=np.array([self.seed, epoch], np.uint64))
        # Any offset below T that leaves at least one batch.
        num_offsets = min(self.tokens, len(self.shards) - self.batch * self.tokens)
        offset = int(words.random_raw()) % num_offsets
        return offset, np.argsort(words.random_raw((len(self.shards) - 1 - offset) // self.tokens), kind="stable")

    @property
    def epoch_batches(self) -> int:
        """The number of whole batches in this epoch."""
        return len(self._order) // self.batch

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> tuple[Tensor, ...]:
        return self.take(self.batch)

    def take(self, rows: int) -> tuple[Tensor, ...]:
        """Return the next batch with this number of rows, at most B."""
        ids, targets = _read_windows(self.shards, self._advance(rows), self.tokens)
        if self.document_token is None:
            return ids, targets
        return ids, targets, document_positions(ids, self.document_token)

    def skip(self, rows: int) -> None:
        """Leave out the next batch of this number of rows."""
        self._advance(rows)

    def _advance(self, rows: int) -> np.ndarray:
        """Move behind the next windows, and return the stream positions of their first tokens."""
        if self.window + rows > len(self._order):
            self.epoch, self.window = self.epoch + 1, 0
            self._offset, self._order = self._plan(self.epoch)
        windows = self._order[self.window : self.window + rows]
        self.window += rows
        return self._offset + windows * self.tokens

    def describe(self, position: dict[str, int | str], rows: int) -> str:
        """Say which tokens the batch of this number of rows after a position has, in words."""
        batches = Batches(self.shards, self.batch, self.tokens, self.seed)
        batches.load_state_dict(position)
        starts = batches._advance(rows).tolist()
        shown = ", ".join(map(str, starts[:8])) + (f" and {rows - 8} more" if rows > 8 else "")
        return f"epoch {batches.epoch}, the {self.tokens} tokens from each of {shown}"

    def state_dict(self) -> dict[str, int | str]:
        """Return the position, and the data, sizes and seed that it belongs to."""
        return {**self._identity(), "epoch": self.epoch, "window": self.window}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Go to a saved position; the next batches are those that would have followed it.

        Raises:
            ValueError: the state belongs to other data, sizes or seed, or is outside the epoch; nothing changes.
        """
        for key, expected in self._identity().items():
            if state.get(key) != expected:
                raise ValueError(f"data position: got {key}={state.get(key)!r}, expected {expected!r}")
        epoch, window = state.get("epoch"), state.get("window")
        if type(index := state.get("index")) is int:  # version 0.1.0 counted batches
            window = index * self.batch
        if type(epoch) is not int or type(window) is not int or not 0 <= epoch < 1 << 64:
            raise ValueError(f"data position: got epoch={epoch!r}, window={window!r}, expected integers from 0")
        offset, order = self._plan(epoch)
        if not 0 <= window <= len(order):
            raise ValueError(f"data position: got window={window}, expected 0 to {len(order)}")
        self.epoch, self.window, self._offset, self._order = epoch, window, offset, order

    def _identity(self) -> dict[str, int | str]:
        return {"data": self.shards.digest, "batch": self.batch, "tokens": self.tokens, "seed": self.seed}


def document_positions(ids: Tensor, document_token: int) -> Tensor:
    """Return the position of each token of (B, T) ids in its document, int32 (B, T).

    A document begins at each document_token, and with each row.
    """
    index = torch.arange(ids.shape[1], dtype=torch.int32)
    return index - torch.where(ids == document_token, index, 0).cummax(1).values


def validation_batches(shards: TokenShards, batch: int, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over the stream from its start, in the same batches on every call.

    Every token of the stream except the first is a target exactly once. The last batch may have fewer rows, and its
    last row fewer tokens: the rest of that row has targets IGNORE_INDEX.

    Args:
        shards: the token stream.
        batch, tokens: B and T.
    Returns:
        An iterator of (ids, targets), int64 (B, T), targets shifted by one. If the stream is shorter than a window, T
        is its length.
    Raises:
        ValueError: the stream has fewer than 2 tokens, or a size is out of range. Raised by the call, not by the first
            batch.
    """
    _check_sizes(batch, tokens)
    count = len(shards) - 1  # of targets
    if count < 1:
        raise ValueError(f"validation data: got {len(shards)} tokens, expected at least 2")
    tokens = min(tokens, count)
    starts = np.arange(0, count, tokens)
    return (
        _read_windows(shards, starts[row : row + batch], tokens) for row in range(0, len(starts), batch)
    )


def _check_sizes(batch: int, tokens: int) -> None:
    if batch < 1 or tokens < 1:
        raise ValueError(f"batch x tokens: got {batch} x {tokens}, expected at least 1 x 1")


def _read_windows(shards: TokenShards, starts: np.ndarray, tokens: int) -> tuple[Tensor, Tensor]:
    """Return (ids, targets), (B, T) each, of the windows that start at these stream positions.

    Past the end of the stream ids are 0, and targets IGNORE_INDEX.
    """
    rows = np.zeros((len(starts), tokens + 1), np.int64)
    for row, start in zip(rows, starts.tolist(), strict=True):
        shards.read(start, row[: len(shards) - start])
    windows = torch.from_numpy(rows)
    ids, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    if (excess := int(starts.max()) + tokens + 1 - len(shards)) > 0:
        targets = targets.clone()  # one row is contiguous, and shares its memory with ids
        targets[-1, -excess:] = IGNORE_INDEX
    return ids, targets
