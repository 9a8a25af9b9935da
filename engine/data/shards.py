"""Token shards on disk, memory-mapped: a stream of token ids that is read at any position.

A stream is a few files of ids, named by their content, and an index `<name>.json` that lists them with their SHA-256.
shard_writer.py writes it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "peakgpt.tokens.1"
SHARD_SUFFIX = r"-\d{5,}-[0-9a-f]{12}\.bin"  # after the stream's name: number and digest
OPTIONAL = ("text_bytes", "end_id", "documents", "tokenizer")  # None, or absent in older indexes, if unknown
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}  # little-endian on every machine


@dataclass(frozen=True)
class TokenShards:
    """A token stream on disk, read through memory maps. A document begins after each `end_id`, and at the start.

    Args:
        vocab_size: all ids are below it.
        text_bytes: UTF-8 bytes of the text; None if it is unknown.
        corpus: digest of what the stream was made of.
        digest: SHA-256 (hex) of the stream: the same tokens in the same shards have the same digest.
        maps: one per shard, uint16 or uint32.
        starts: stream position of each shard's first token, then the stream's length.
        end_id: the end-of-text id, which ends a document; None if it is unknown.
        documents: their number, if `end_id` is known.
        tokenizer: digest of the tokenizer that encoded the text; None if it is unknown.
    """

    vocab_size: int
    text_bytes: int | None
    corpus: str
    digest: str
    maps: Sequence[np.ndarray]
    starts: Sequence[int]
    end_id: int | None = None
    documents: int | None = None
    tokenizer: str | None = None

    @classmethod
    def open(cls, folder: Path | str, name: str, *, check: bool = True) -> TokenShards:
        """Map the shards that `<name>.json` lists.

        Args:
            folder, name: as given to `write_shards`.
            check: compare the SHA-256 of every shard, which reads all of it, about 1 s per GB and core. Sizes are
                always compared.
        Raises:
            ValueError: a file is missing, damaged or truncated, or is not an index of `write_shards`.
        """
        index = read_index(Path(folder, f"{name}.json"))
        shards, dtype = index["shards"], DTYPES[index["dtype"]]
        with ThreadPoolExecutor(min(len(shards), os.cpu_count() or 1)) as pool:  # hashing releases the GIL
            maps = list(pool.map(lambda shard: _map_shard(Path(folder, shard["file"]), shard, dtype, check), shards))
        starts = [0, *accumulate(shard["tokens"] for shard in shards)]
        digest = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()
        known = {key: index.get(key) for key in OPTIONAL}
        return cls(index["vocab_size"], corpus=index["corpus"], digest=digest, maps=maps, starts=starts, **known)

    def __len__(self) -> int:
        """Return the number of tokens in the stream."""
        return self.starts[-1]

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token; NaN if the text is unknown."""
        return math.nan if self.text_bytes is None else self.text_bytes / len(self)

    def bits_per_byte(self, loss: float) -> float:
        """Convert a mean loss in nats per token to bits per byte of text, which does not depend on the tokenizer.

        NaN if the text is unknown.
        """
        return loss / math.log(2) / self.bytes_per_token

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out`, a one-dimensional integer array, with the tokens from position `start` on."""
        assert start >= 0 and start + len(out) <= len(self)
        shard = bisect_right(self.starts, start) - 1
        filled = 0
        while filled < len(out):
            offset = start + filled - self.starts[shard]
            part = self.maps[shard][offset : offset + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled, shard = filled + len(part), shard + 1


def read_index(path: Path) -> dict[str, Any]:
    """Read the index of a stream.

    Raises:
        ValueError: it is missing, or is not an index.
    """
    expected = f"an index of format {FORMAT} as write_shards writes it"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"token index {path}: got {error.strerror}, expected {expected}") from None
    except ValueError as error:
        raise ValueError(f"token index {path}: got {error}, expected {expected}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        got = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise ValueError(f"token index {path}: got format {got!r}, expected {expected}")
    fault = _index_fault(index)
    if fault:
        raise ValueError(f"token index {path}: got {fault}, expected {expected}")
    return index


def _index_fault(index: dict[str, Any]) -> str | None:
    """Describe the first wrong value of an index; None if all are right."""
    for key in ("vocab_size", "tokens", "text_bytes"):
        if (type(index.get(key)) is not int or index[key] < 1) and not (key == "text_bytes" and index.get(key) is None):
            return f"{key}={index.get(key)!r}"
    for key, kind in {"end_id": int, "documents": int, "tokenizer": str}.items():
        if type(index.get(key)) not in (kind, type(None)):
            return f"{key}={index[key]!r}"
    if index.get("dtype") not in DTYPES or not isinstance(index.get("corpus"), str):
        return f"dtype={index.get('dtype')!r} and corpus={index.get('corpus')!r}"
    shards = index.get("shards")
    if not isinstance(shards, list) or not shards:
        return f"shards={shards!r}"
    for shard in shards:
        row = shard if isinstance(shard, dict) else {}
        # A file name without a folder: an index cannot point outside of its own folder.
        if not re.fullmatch(rf"\w+{SHARD_SUFFIX}", str(row.get("file"))):
            return f"shard {shard!r}"
        if type(row.get("tokens")) is not int or row["tokens"] < 1 or not isinstance(row.get("sha256"), str):
            return f"shard {shard!r}"
    total = sum(shard["tokens"] for shard in shards)
    return None if total == index["tokens"] else f"{index['tokens']} tokens with {total} in the shards"


def _map_shard(path: Path, shard: dict[str, Any], dtype: np.dtype, check: bool) -> np.ndarray:
    try:
        size = path.stat().st_size
        if size != shard["tokens"] * dtype.itemsize:
            raise ValueError(f"token shard {path}: got {size} bytes, expected {shard['tokens'] * dtype.itemsize}")
        # An ndarray over the map: slicing np.memmap itself costs several times the copy of a window.
        tokens = np.asarray(np.memmap(path, dtype, mode="r"))
    except OSError as error:
        raise ValueError(f"token shard {path}: got {error.strerror}, expected a readable file") from None
    if check:
        sha256 = hashlib.sha256(tokens).hexdigest()
        if sha256 != shard["sha256"]:
            raise ValueError(f"token shard {path}: got sha256 {sha256[:12]}, expected {shard['sha256'][:12]}")
    return tokens
