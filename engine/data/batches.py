"""Training and validation batches, cut from token streams.

An epoch takes a token stream from a random offset o, cuts it into windows of T inputs and the T targets one to their
right, and visits the windows in random order:

    window i:  ids = stream[o + iT : o + (i+1)T]    targets = stream[o + iT + 1 : o + (i+1)T + 1]

so every token is an input at most once, and a target at most once, in an epoch. The order comes from the raw 64-bit
words of Philox with the key (seed, epoch) and the source's number in the counter. numpy guarantees those words for all
versions (NEP 19), unlike its shuffles. Of several sources, each has its own epochs; mixture.py chooses the next one.

A window may contain several documents. A document begins with the token that separates documents: its last token
predicts the separator, and the separator predicts the first token of the next document, so no target is lost.

Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", SC'11 (Philox).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peakgpt.engine.data.mixture import Mixture
from peakgpt.engine.data.shards import TokenShards
from peakgpt.kernels.ops.linear_cross_entropy import IGNORE_INDEX


class Batches:
    """An endless iterator over training batches: (ids, targets), int64 tensors (B, T), targets shifted by one.

    The position counts windows, so batches of any number of rows may follow each other. A batch may span two epochs.
    """

    def __init__(
        self, shards: TokenShards | Sequence[TokenShards], batch: int, tokens: int, seed: int,
        weights: Sequence[float] | None = None, *, document_token: int | None = None,
    ):  # fmt: skip
        """
        Args:
            shards: the token stream, or those of several sources.
            batch, tokens: B and T.
            seed: 0 to 2^64 - 1; seed, source and epoch determine offset and order.
            weights: of several sources; their shares of the tokens seen. A source may be seen for several epochs while
                another one is not finished. None: their lengths.
            document_token: the id with which each document begins. None: batches have no position_ids.
        Raises:
            ValueError: a stream has fewer than T + 1 tokens, the vocabularies differ, or a size, a weight or the seed
                is out of range.
        """
        _check_sizes(batch, tokens)
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed: got {seed}, expected 0 to 2^64 - 1")
        sources = [shards] if isinstance(shards, TokenShards) else list(shards)
        if not sources:
            raise ValueError("training data: got no sources, expected at least one")
        weights = [len(source) for source in sources] if weights is None else list(weights)
        if len(weights) != len(sources):
            raise ValueError(f"weights: got {len(weights)}, expected one for each of {len(sources)} sources")
        if len({(source.vocab_size, source.end_id, source.tokenizer) for source in sources}) > 1:
            raise ValueError("training data: got sources of different tokenizers, expected one tokenizer for all")
        self.batch, self.tokens, self.seed = batch, tokens, seed
        self.end_id = sources[0].end_id  # ends a document; None if it is unknown
        self.document_token = document_token
        self._weights, self._mixture = weights, Mixture(weights)
        self._sources = [_Windows(source, tokens, seed, number) for number, source in enumerate(sources)]

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> tuple[Tensor, ...]:
        return self.take(self.batch)

    @property
    def windows(self) -> int:
        """The number of windows taken."""
        return self._mixture.windows

    @property
    def epochs(self) -> list[float]:
        """How often each source was seen, such as 1.5."""
        return [source.epoch + source.index / len(source.order) for source in self._sources]

    def take(self, rows: int) -> tuple[Tensor, ...]:
        """Return a batch of the next windows: (ids, targets), int64 (rows, T) each.

        Raises:
            ValueError: rows is below 1.
        """
        _check_sizes(rows, self.tokens)
        windows = np.empty((rows, self.tokens + 1), np.int64)
        for row in windows:
            source, start = self._next_window()
            source.shards.read(start, row)
        ids, targets = _ids_and_targets(windows)
        if self.document_token is None:
            return ids, targets
        return ids, targets, document_positions(ids, self.document_token)

    def skip(self, rows: int) -> None:
        """Leave out the next batch of this number of rows."""
        for _ in range(rows):
            self._next_window()

    def _next_window(self) -> tuple[_Windows, int]:
        """Return the source of the next window, and the stream position of its first token; move behind it."""
        source = self._sources[next(self._mixture)]
        return source, source.next_start()

    def describe(self, position: dict[str, Any], rows: int) -> str:
        """Say which tokens the batch of this number of rows after a position has, in words."""
        shards = [source.shards for source in self._sources]
        batches = Batches(shards, self.batch, self.tokens, self.seed, self._weights)
        batches.load_state_dict(position)
        windows = [batches._next_window() for _ in range(rows)]
        several = len(shards) > 1
        texts = [f"{start} of source {batches._sources.index(source) + 1}" if several else str(start)
                 for source, start in windows]  # fmt: skip
        shown = ", ".join(texts[:8]) + (f" and {rows - 8} more" if rows > 8 else "")
        return f"epoch {windows[-1][0].epoch}, the {self.tokens} tokens from each of {shown}"

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the data, window size, weights and seed that it belongs to."""
        positions = [
            {"data": source.shards.digest, "weight": weight, "windows": count, "epoch": source.epoch,
             "index": source.index}
            for source, weight, count in zip(self._sources, self._weights, self._mixture.counts, strict=True)
        ]  # fmt: skip
        return {"tokens": self.tokens, "seed": self.seed, "sources": positions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the next windows are those that would have followed it.

        Raises:
            ValueError: the state belongs to other data, window size, weights or seed, or is outside the epoch; nothing
                changes.
        """
        state = _of_version_0_1_0(state, len(self._sources), self._weights[0]) if "sources" not in state else state
        _check_same(state, {"tokens": self.tokens, "seed": self.seed})
        positions = state["sources"]
        if not isinstance(positions, list) or len(positions) != len(self._sources):
            raise ValueError(f"data position: got sources {positions!r:.80}, expected {len(self._sources)} of them")
        plans = []
        for source, weight, position in zip(self._sources, self._weights, positions, strict=True):
            _check_same(position, {"data": source.shards.digest, "weight": weight})
            if type(position.get("windows")) is not int:
                raise ValueError(f"data position: got windows={position.get('windows')!r}, expected an integer")
            plans.append(source.plan(position.get("epoch"), position.get("index")))
        self._mixture.go_to([position["windows"] for position in positions])
        for source, plan in zip(self._sources, plans, strict=True):
            source.epoch, source.index, source.offset, source.order = plan


class _Windows:
    """The windows of one source, epoch after epoch."""

    def __init__(self, shards: TokenShards, tokens: int, seed: int, number: int):
        if len(shards) < tokens + 1:
            raise ValueError(f"training data: got {len(shards)} tokens, expected at least {tokens + 1} for one window "
                             f"of {tokens} and its last target")  # fmt: skip
        self.shards, self._tokens, self._seed, self._number = shards, tokens, seed, number
        self.epoch, self.index, self.offset, self.order = self.plan(0, 0)

    def next_start(self) -> int:
        """Return the stream position of the next window, and move behind it."""
        if self.index == len(self.order):
            self.epoch, self.index, self.offset, self.order = self.plan(self.epoch + 1, 0)
        self.index += 1
        return self.offset + int(self.order[self.index - 1]) * self._tokens

    def plan(self, epoch: Any, index: Any) -> tuple[int, int, int, np.ndarray]:
        """Return a position, the offset of its epoch's first window, and the order of its windows.

        Raises:
            ValueError: there is no such position.
        """
        if type(epoch) is not int or type(index) is not int or not 0 <= epoch < 1 << 64:
            raise ValueError(f"data position: got epoch={epoch!r}, index={index!r}, expected integers from 0")
        words = np.random.Philox(key=np.array([self._seed, epoch], np.uint64),
                                 counter=np.array([0, 0, 0, self._number], np.uint64))  # fmt: skip
        # Any offset below T that leaves a window.
        offset = int(words.random_raw()) % min(self._tokens, len(self.shards) - self._tokens)
        count = (len(self.shards) - 1 - offset) // self._tokens
        if not 0 <= index <= count:
            raise ValueError(f"data position: got index={index}, expected 0 to {count}")
        return epoch, index, offset, np.argsort(words.random_raw(count), kind="stable")


def _check_same(state: Any, expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        if not isinstance(state, dict) or state.get(key) != value:
            got = state.get(key) if isinstance(state, dict) else state
            raise ValueError(f"data position: got {key}={got!r}, expected {value!r}")


def _of_version_0_1_0(state: dict[str, Any], sources: int, weight: float) -> dict[str, Any]:
    """Return a position of version 0.1.0, which counted batches of one source, in today's form."""
    batch, index = state.get("batch"), state.get("index")
    if type(batch) is not int or type(index) is not int or sources > 1:
        raise ValueError(f"data position: got batch={batch!r}, index={index!r}, expected integers and one source")
    position = {"data": state.get("data"), "weight": weight, "windows": 0, "epoch": state.get("epoch"),
                "index": index * batch}  # fmt: skip
    return {"tokens": state.get("tokens"), "seed": state.get("seed"), "sources": [position]}


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
    windows = np.zeros((len(starts), tokens + 1), np.int64)
    for row, start in zip(windows, starts.tolist(), strict=True):
        shards.read(start, row[: len(shards) - start])
    ids, targets = _ids_and_targets(windows)
    if (excess := int(starts.max()) + tokens + 1 - len(shards)) > 0:
        targets = targets.clone()  # one row is contiguous, and shares its memory with ids
        targets[-1, -excess:] = IGNORE_INDEX
    return ids, targets


def _ids_and_targets(windows: np.ndarray) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(windows)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
