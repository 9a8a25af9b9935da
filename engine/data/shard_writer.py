"""Write a stream of token ids as shards, which shards.py reads.

A shard is written as a hidden file while it grows. Then it is flushed to the disk and named by its content, so a crash
leaves whole shards only. The index comes last and makes the stream valid.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peakgpt.engine.data.shards import DTYPES, FORMAT, SHARD_SUFFIX, read_index
from peakgpt.kernels.files import flush, write_atomically
from peakgpt.kernels.strict_json import dumps

SHARD_TOKENS = 1 << 26  # 128 MiB of uint16: few files, and half a minute of encoding to repeat after a kill


class ShardWriter:
    """Writes one stream. Only one process at a time may write a name in a folder."""

    def __init__(
        self, folder: Path, name: str, vocab_size: int, shard_tokens: int = SHARD_TOKENS, *,
        end_id: int | None = None, shards: Sequence[dict[str, Any]] = (),
    ):  # fmt: skip
        """
        Args:
            folder: exists.
            name: of the stream, such as "train"; letters, digits and underscores.
            vocab_size: all ids are below it. An id takes 2 bytes up to a vocabulary of 65536, else 4.
            shard_tokens: tokens per shard; the last one may be shorter.
            end_id: the end-of-text id, which ends a document. None: unknown.
            shards: `self.shards` of an earlier writer, whose files exist; this one appends to them.
        Raises:
            ValueError: a name or size is out of range.
        """
        if not name.isidentifier():
            raise ValueError(f"shard name: got {name!r}, expected letters, digits and underscores")
        if shard_tokens < 1:
            raise ValueError(f"shards: got shard_tokens={shard_tokens}, expected at least 1")
        if not 1 <= vocab_size <= 1 << 32:
            raise ValueError(f"vocab_size: got {vocab_size}, expected 1 to {1 << 32}")
        self.shards = list(shards)  # rows of the index, of the finished shards
        self._folder, self._name, self._vocab_size, self._end_id = folder, name, vocab_size, end_id
        self._dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self._shard_tokens = shard_tokens
        self._temporary = folder / f".{name}.bin.tmp"
        self._begin()

    def _begin(self) -> None:
        self._file, self._tokens, self._documents, self._sha256 = None, 0, 0, hashlib.sha256()

    def add(self, ids: Sequence[int] | np.ndarray) -> int | None:
        """Append ids.

        Returns:
            How many of them are in finished shards, if this call finished a shard, else None.
        Raises:
            ValueError: an id is outside the vocabulary, or `ids` is not a list of integers.
            OSError: the folder cannot be written.
        """
        ids, start, finished = self._checked(ids), 0, None
        while start < len(ids):
            part = ids[start : start + self._shard_tokens - self._tokens]
            self._write(part)
            start += len(part)
            if self._tokens == self._shard_tokens:
                self._finish_shard()
                finished = start
        return finished

    def _checked(self, part: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(part)
        if ids.size and (ids.dtype.kind not in "iu" or ids.ndim != 1):
            raise ValueError(f"tokens: got {ids.dtype} of shape {ids.shape}, expected one-dimensional integers")
        if ids.size and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise ValueError(f"tokens: got ids from {ids.min()} to {ids.max()}, expected 0 to {self._vocab_size - 1}")
        return ids.astype(DTYPES[self._dtype])

    def _write(self, ids: np.ndarray) -> None:
        if self._file is None:
            self._file = open(self._temporary, "wb")  # noqa: SIM115 closed when the shard is finished or abandoned
        data = ids.data.cast("B")
        self._file.write(data)
        self._sha256.update(data)
        self._tokens += len(ids)
        if self._end_id is not None:
            self._documents += int(np.count_nonzero(ids == self._end_id))

    def _finish_shard(self) -> None:
        sha256 = self._sha256.hexdigest()
        file = f"{self._name}-{len(self.shards):05d}-{sha256[:12]}.bin"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._folder / file)
        if os.name == "posix":  # makes the rename durable; Windows cannot open a folder
            flush(self._folder)
        ends = {} if self._end_id is None else {"documents": self._documents}
        self.shards.append({"file": file, "tokens": self._tokens, "sha256": sha256, **ends})
        self._begin()

    def finish(self, text_bytes: int | None, corpus: str, tokenizer: str | None = None) -> None:
        """Finish the last shard, write the index `<name>.json`, and delete the files of an older stream of this name.

        Args:
            text_bytes: UTF-8 bytes of the encoded text, to compute bits per byte. None: unknown.
            corpus: digest of what the stream was made of.
            tokenizer: digest of the tokenizer.
        Raises:
            ValueError: there are no tokens.
            OSError: the folder cannot be written.
        """
        if self._tokens:
            self._finish_shard()
        if not self.shards:
            raise ValueError(f"shards {self._folder / self._name}: got no tokens, expected at least 1")
        ends = {"end_id": self._end_id, "documents": sum(shard.get("documents", 0) for shard in self.shards)}
        index = {
            "format": FORMAT,
            "dtype": self._dtype,
            "vocab_size": self._vocab_size,
            "tokens": sum(shard["tokens"] for shard in self.shards),
            "text_bytes": text_bytes,
            "corpus": corpus,
            "tokenizer": tokenizer,
            **({} if self._end_id is None else ends),
            "shards": self.shards,
        }
        write_atomically(self._folder / f"{self._name}.json", dumps(index, indent=2).encode())
        self.delete_unlisted()

    def delete_unlisted(self, keep: Iterable[str] = ()) -> None:
        """Delete the files of this stream that neither its index nor `keep` lists, and a shard that is not finished."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # of a full disk: the rest of the buffer cannot be written
                self._file.close()
        try:
            listed = {shard["file"] for shard in read_index(self._folder / f"{self._name}.json")["shards"]}
        except ValueError:
            listed = set()
        pattern = re.compile(rf"{self._name}{SHARD_SUFFIX}")
        for path in self._folder.iterdir():
            if pattern.fullmatch(path.name) and path.name not in listed.union(keep):
                path.unlink()
        self._temporary.unlink(missing_ok=True)


def write_shards(
    folder: Path | str,
    name: str,
    token_iter: Iterable[Sequence[int] | np.ndarray],
    vocab_size: int,
    shard_tokens: int = SHARD_TOKENS,
    *,
    text_bytes: int | None,
    corpus_digest: str,
    end_id: int | None = None,
) -> None:
    """Write a token stream as shards, then the index `<name>.json`, which makes them valid.

    A failure leaves the folder unchanged. An older stream of that name stays valid until the new index replaces it.

    Args:
        token_iter: arrays or lists of ids; their concatenation is the stream.
        others: as in `ShardWriter`.
        text_bytes, corpus_digest: as in `ShardWriter.finish`.
    Raises:
        ValueError: an id is outside the vocabulary, there are no tokens, or a name or size is out of range.
        OSError: the folder cannot be written.
    """
    if text_bytes is not None and text_bytes < 1:
        raise ValueError(f"shards: got text_bytes={text_bytes}, expected at least 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, name, vocab_size, shard_tokens, end_id=end_id)
    try:
        for ids in token_iter:
            writer.add(ids)
        writer.finish(text_bytes, corpus_digest)
    except BaseException:
        writer.delete_unlisted()
        raise
