"""Token shards on disk, memory-mapped: writing a stream of token ids, and reading it at any position.

A stream is a few files of ids, named by their content, and an index `<name>.json` that lists them with their SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from peakgpt.engine.data.corpus import Corpus
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.kernels.files import write_atomically
from peakgpt.kernels.strict_json import dumps

FORMAT = "peakgpt.tokens.1"
SHARD_TOKENS = 1 << 26  # 128 MiB of uint16: few files, and a buffer that fits in any machine's memory
SHARD_SUFFIX = r"-\d{5,}-[0-9a-f]{12}\.bin"  # after the stream's name: number and digest
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}  # little-endian on every machine


def write_shards(
    folder: Path | str,
    name: str,
    token_iter: Iterable[Sequence[int] | np.ndarray],
    vocab_size: int,
    shard_tokens: int = SHARD_TOKENS,
    *,
    text_bytes: int,
    corpus_digest: str,
) -> None:
    """Write a token stream as shards, then the index `<name>.json`, which makes them valid.

    A failure leaves the folder unchanged. An older stream of that name stays valid until the new index replaces it.
    Only one process at a time may write a name in a folder.

    Args:
        name: of the stream, such as "train"; letters, digits and underscores.
        token_iter: arrays or lists of ids; their concatenation is the stream.
        vocab_size: all ids are below it. An id takes 2 bytes up to a vocabulary of 65536, else 4.
        shard_tokens: tokens per shard; the last one may be shorter.
        text_bytes: UTF-8 bytes of the encoded text, to compute bits per byte.
        corpus_digest: `Corpus.digest` of the whole corpus.
    Raises:
        ValueError: an id is outside the vocabulary, there are no tokens, or a name or size is out of range.
        OSError: the folder cannot be written.
    """
    if not name.isidentifier():
        raise ValueError(f"shard name: got {name!r}, expected letters, digits and underscores")
    if shard_tokens < 1 or text_bytes < 1:
        raise ValueError(f"shards: got shard_tokens={shard_tokens}, text_bytes={text_bytes}, expected at least 1")
    if not 1 <= vocab_size <= 1 << 32:
        raise ValueError(f"vocab_size: got {vocab_size}, expected 1 to {1 << 32}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    shards = []
    try:
        for block in _regroup(token_iter, vocab_size, DTYPES[dtype], shard_tokens):
            sha256 = hashlib.sha256(block).hexdigest()
            file = f"{name}-{len(shards):05d}-{sha256[:12]}.bin"
            write_atomically(folder / file, block)
            shards.append({"file": file, "tokens": len(block), "sha256": sha256})
        if not shards:
            raise ValueError(f"shards {folder / name}: got no tokens, expected at least 1")
        index = {
            "format": FORMAT,
            "dtype": dtype,
            "vocab_size": vocab_size,
            "tokens": sum(shard["tokens"] for shard in shards),
            "text_bytes": text_bytes,
            "corpus": corpus_digest,
            "shards": shards,
        }
        write_atomically(folder / f"{name}.json", dumps(index, indent=2).encode())
    finally:
        _delete_unlisted(folder, name)


def _delete_unlisted(folder: Path, name: str) -> None:
    """Delete the shards that the index does not list: old ones after a success, new ones after a failure."""
    try:
        listed = {shard["file"] for shard in _read_index(folder / f"{name}.json")["shards"]}
    except ValueError:
        listed = set()
    for path in folder.iterdir():
        is_shard = re.fullmatch(rf"\.?{name}{SHARD_SUFFIX}(\.tmp)?", path.name)
        if is_shard and path.name not in listed:
            path.unlink()


def _regroup(
    token_iter: Iterable[Sequence[int] | np.ndarray], vocab_size: int, dtype: np.dtype, size: int
) -> Iterator[np.ndarray]:
    """Yield the stream in blocks of `size` tokens; the last one may be shorter. Blocks share memory."""
    block, filled = np.empty(size, dtype), 0
    for part in token_iter:
        ids = np.asarray(part)
        if ids.size and (ids.dtype.kind not in "iu" or ids.ndim != 1):
            raise ValueError(f"tokens: got {ids.dtype} of shape {ids.shape}, expected one-dimensional integers")
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise ValueError(f"tokens: got ids from {ids.min()} to {ids.max()}, expected 0 to {vocab_size - 1}")
        while len(ids):
            taken = ids[: size - filled]
            block[filled : filled + len(taken)] = taken
            filled, ids = filled + len(taken), ids[len(taken) :]
            if filled == size:
                yield block
                filled = 0
    if filled:
        yield block[:filled]


@dataclass(frozen=True)
class TokenShards:
    """A token stream on disk, read through memory maps."""

    vocab_size: int
    text_bytes: int  # UTF-8 bytes of the text
    corpus: str  # digest of the corpus
    digest: str  # SHA-256 (hex) of the stream: the same tokens in the same shards have the same digest
    maps: Sequence[np.ndarray]  # one per shard, uint16 or uint32
    starts: Sequence[int]  # stream position of each shard's first token, then the stream's length

    @classmethod
    def open(cls, folder: Path | str, name: str, *, check: bool = True) -> TokenShards:
        """Map the shards that `<name>.json` lists.

        Args:
            folder, name: as given to `write_shards`.
            check: compare the SHA-256 of every shard, which reads all of it, about 1 s per GB. Sizes are always
                compared.
        Raises:
            ValueError: a file is missing, damaged or truncated, or is not an index of `write_shards`.
        """
        index = _read_index(Path(folder, f"{name}.json"))
        shards, dtype = index["shards"], DTYPES[index["dtype"]]
        maps = [_map_shard(Path(folder, shard["file"]), shard, dtype, check) for shard in shards]
        starts = [0, *accumulate(shard["tokens"] for shard in shards)]
        digest = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()
        return cls(index["vocab_size"], index["text_bytes"], index["corpus"], digest, maps, starts)

    def __len__(self) -> int:
        """Return the number of tokens in the stream."""
        return self.starts[-1]

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / len(self)

    def bits_per_byte(self, loss: float) -> float:
        """Convert a mean loss in nats per token to bits per byte of text, which does not depend on the tokenizer."""
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


def _read_index(path: Path) -> dict:
    expected = f"an index of format {FORMAT} as write_shards writes it"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"token index {path}: got {error}, expected {expected}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        got = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise ValueError(f"token index {path}: got format {got!r}, expected {expected}")
    fault = _index_fault(index)
    if fault:
        raise ValueError(f"token index {path}: got {fault}, expected {expected}")
    return index


def _index_fault(index: dict) -> str | None:
    """Describe the first wrong value of an index; None if all are right."""
    for key in ("vocab_size", "tokens", "text_bytes"):
        if type(index.get(key)) is not int or index[key] < 1:
            return f"{key}={index.get(key)!r}"
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


def _map_shard(path: Path, shard: dict, dtype: np.dtype, check: bool) -> np.ndarray:
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


def tokenize_corpus(corpus: Corpus, tokenizer: Tokenizer, folder: Path | str) -> tuple[TokenShards, TokenShards]:
    """Write a corpus as the token streams `train` and `validation`, and open both."""
    for name in ("train", "validation"):
        write_shards(
            folder,
            name,
            tokenizer.encode_documents(document.text for document in getattr(corpus, name)),
            tokenizer.vocab_size,
            text_bytes=getattr(corpus, f"{name}_bytes"),
            corpus_digest=corpus.digest,
        )
    return TokenShards.open(folder, "train"), TokenShards.open(folder, "validation")
