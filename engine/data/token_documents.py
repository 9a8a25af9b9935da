"""The documents of prepared token shards, decoded."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from peakgpt.engine.data.documents import Document
from peakgpt.engine.data.run_layout import TOKENS
from peakgpt.engine.data.shards import TokenShards
from peakgpt.engine.data.tokenizer import StreamDecoder, Tokenizer

WINDOW = 1 << 16  # tokens in memory at a time
TRAIN = "train"  # name of the stream


def shard_folder(path: Path | str) -> Path | None:
    """Return the folder of token shards that a path means: itself, or that of a run; None if there are none."""
    found = [folder for folder in (Path(path), Path(path, TOKENS)) if (folder / f"{TRAIN}.json").is_file()]
    return found[0] if found else None


def token_documents(folder: Path) -> Iterator[Document]:
    """Yield the documents of the training stream of a folder with its tokenizer; their names are numbers from 1.

    Raises:
        ValueError: shards or tokenizer are damaged, or the tokenizer has no end of text.
    """
    shards, tokenizer = TokenShards.open(folder, TRAIN, check=False), Tokenizer.load(folder)
    before, [end_id] = tokenizer.document_marks
    start = number = 0
    for window_start in range(0, len(shards), WINDOW):
        window = _read(shards, window_start, min(len(shards), window_start + WINDOW))
        for stop in (np.flatnonzero(window == end_id) + window_start).tolist():
            number += 1
            yield Document(f"{folder}:{number}", partial(_blocks, shards, tokenizer, before, start, stop))
            start = stop + 1
    if start < len(shards):
        yield Document(f"{folder}:{number + 1}", partial(_blocks, shards, tokenizer, before, start, len(shards)))


def _blocks(shards: TokenShards, tokenizer: Tokenizer, before: list[int], start: int, stop: int) -> Iterator[str]:
    if before and _read(shards, start, min(stop, start + len(before))).tolist() == before:
        start += len(before)
    stream = StreamDecoder(tokenizer)
    for first in range(start, stop, WINDOW):
        yield "".join(map(stream.feed, _read(shards, first, min(stop, first + WINDOW)).tolist()))
    yield stream.finish()


def _read(shards: TokenShards, start: int, stop: int) -> np.ndarray:
    ids = np.empty(stop - start, np.int64)
    if len(ids):
        shards.read(start, ids)
    return ids
