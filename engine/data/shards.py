"""Token shards on disk, memory-mapped, and the batches cut from them.

An epoch takes the token stream from a random offset o, cuts it into windows of T inputs and the T targets one to
their right, and visits the windows in random order:

    window i:  ids = stream[o + iT : o + (i+1)T]    targets = stream[o + iT + 1 : o + (i+1)T + 1]

so every token is an input at most once, and a target at most once, in an epoch. The order comes from the raw
64-bit words of Philox keyed by (seed, epoch), which numpy keeps the same for ever (NEP 19), unlike its shuffles.

Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", SC'11 (Philox).
"""

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
import torch
from torch import Tensor

from peakgpt.engine.data.corpus import Corpus
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.kernels.files import write_whole

FORMAT = "peakgpt.tokens.1"
SHARD_TOKENS = 1 << 26  # 128 MiB of uint16: few files, and one buffer of it fits anywhere
SHARD_SUFFIX = r"-\d{5,}-[0-9a-f]{12}\.bin"  # number and digest, after the stream's name
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}  # little-endian on disk, whatever the machine


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
    """Write a token stream as shards named by their digest, then the index `<name>.json` that makes them valid.

    A failure leaves the folder as it was; an older stream of that name stays valid until the new index replaces it.
    One writer at a time for each folder and name.

    Args:
        token_iter: arrays or lists of ids; their concatenation is the stream.
        vocab_size: ids are below it; up to 65536 they take 2 bytes, else 4.
        shard_tokens: tokens in every shard but the last.
        text_bytes: UTF-8 bytes of the text that was encoded, for bits per byte.
        corpus_digest: `Corpus.digest` of the whole corpus.
    Raises:
        ValueError: an id outside the vocabulary, no tokens, or a bad name or size.
        OSError: the folder can not be written.
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
            write_whole(folder / file, block)
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
        write_whole(folder / f"{name}.json", json.dumps(index, indent=2).encode())
    finally:
        _sweep(folder, name)


def _sweep(folder: Path, name: str) -> None:
    """Delete the shards that the index does not list: the old ones after success, the new ones after a failure."""
    try:
        listed = {shard["file"] for shard in _read_index(folder / f"{name}.json")["shards"]}
    except ValueError:
        listed = set()
    for path in folder.iterdir():
        ours = re.fullmatch(rf"\.?{name}{SHARD_SUFFIX}(\.tmp)?", path.name)
        if ours and path.name not in listed:
            path.unlink()


def _regroup(
    token_iter: Iterable[Sequence[int] | np.ndarray], vocab_size: int, dtype: np.dtype, size: int
) -> Iterator[np.ndarray]:
    """Yield the stream in blocks of `size` tokens, the last one shorter."""
    block, filled = np.empty(size, dtype), 0
    for given in token_iter:
        ids = np.asarray(given)
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
    """A token stream on disk, read through memory maps. `digest` names its contents and order."""

    vocab_size: int
    text_bytes: int
    corpus: str
    digest: str
    maps: Sequence[np.ndarray]  # one for each shard, uint16 or uint32
    starts: Sequence[int]  # position in the stream of each shard's first token, and of the end

    @classmethod
    def open(cls, folder: Path | str, name: str, *, check: bool = True) -> "TokenShards":
        """Map the shards that `<name>.json` lists.

        Args:
            check: compare every shard with its sha256 (reads it all, about 1 s a GB); sizes are always compared.
        Raises:
            ValueError: a file is missing, damaged, truncated or not ours.
        """
        index = _read_index(Path(folder, f"{name}.json"))
        shards, dtype = index["shards"], DTYPES[index["dtype"]]
        maps = [_map_shard(Path(folder, shard["file"]), shard, dtype, check) for shard in shards]
        starts = [0, *accumulate(shard["tokens"] for shard in shards)]
        digest = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()
        return cls(index["vocab_size"], index["text_bytes"], index["corpus"], digest, maps, starts)

    def __len__(self) -> int:
        """Tokens in the stream."""
        return self.starts[-1]

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / len(self)

    def bits_per_byte(self, loss: float) -> float:
        """Convert a mean loss in nats per token to bits per byte of text, which no tokenizer changes."""
        return loss / math.log(2) / self.bytes_per_token

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill out (any integer dtype, one-dimensional) with the tokens from position start on."""
        assert start >= 0 and start + len(out) <= len(self)
        shard = bisect_right(self.starts, start) - 1
        filled = 0
        while filled < len(out):
            inside = start + filled - self.starts[shard]
            part = self.maps[shard][inside : inside + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled, shard = filled + len(part), shard + 1


def _read_index(path: Path) -> dict:
    expected = f"an index of format {FORMAT} as write_shards leaves it"
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
        # A plain file name: an index can not point outside its folder.
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
        # A plain array over the map: np.memmap's own slicing costs several times the copy of a window.
        tokens = np.asarray(np.memmap(path, dtype, mode="r"))
    except OSError as error:
        raise ValueError(f"token shard {path}: got {error.strerror}, expected a readable file") from None
    if check:
        sha256 = hashlib.sha256(tokens).hexdigest()
        if sha256 != shard["sha256"]:
            raise ValueError(f"token shard {path}: got sha256 {sha256[:12]}, expected {shard['sha256'][:12]}")
    return tokens


class Batches:
    """An endless iterator of (ids, targets), int64 tensors (B, T), targets shifted by one already.

    `epoch` and `index` (batches taken in this epoch) are the position. The windows left over
    when an epoch does not divide by B are skipped, other ones in every epoch.

    Args:
        shards: the stream.
        batch, tokens: B and T.
        seed: 0 to 2^64 - 1; with the epoch it fixes offset and order.
    Raises:
        ValueError: fewer than B * T + 1 tokens, or a bad size or seed.
    """

    def __init__(self, shards: TokenShards, batch: int, tokens: int, seed: int):
        _check_sizes(batch, tokens)
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed: got {seed}, expected 0 to 2^64 - 1")
        if len(shards) < batch * tokens + 1:
            raise ValueError(
                f"training data: got {len(shards)} tokens, expected at least {batch * tokens + 1} for one batch of "
                f"{batch} x {tokens} and its last target"
            )
        self.shards, self.batch, self.tokens, self.seed = shards, batch, tokens, seed
        self.epoch, self.index = 0, 0
        self._offset, self._order = self._plan(0)

    def _plan(self, epoch: int) -> tuple[int, np.ndarray]:
        """Offset of the epoch's first window, and the windows in their order."""
        words = np.random.Philox(key=np.array([self.seed, epoch], np.uint64))
        # Any offset below T, unless it would leave less than one batch.
        choices = min(self.tokens, len(self.shards) - self.batch * self.tokens)
        offset = int(words.random_raw()) % choices
        return offset, np.argsort(words.random_raw((len(self.shards) - 1 - offset) // self.tokens), kind="stable")

    @property
    def epoch_batches(self) -> int:
        """Batches in this epoch."""
        return len(self._order) // self.batch

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self.index == self.epoch_batches:
            self.epoch, self.index = self.epoch + 1, 0
            self._offset, self._order = self._plan(self.epoch)
        windows = self._order[self.index * self.batch : (self.index + 1) * self.batch]
        self.index += 1
        return _gather(self.shards, self._offset + windows * self.tokens, self.tokens)

    def state_dict(self) -> dict[str, int | str]:
        """Return the position, and what it is a position in."""
        return {**self._identity(), "epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Go to a saved position: the batches that follow are those that followed it then.

        Raises:
            ValueError: the state belongs to other data, sizes or seed, or lies outside the epoch; nothing changes then.
        """
        for key, expected in self._identity().items():
            if state.get(key) != expected:
                raise ValueError(f"data position: got {key}={state.get(key)!r}, expected {expected!r}")
        epoch, index = state.get("epoch"), state.get("index")
        if type(epoch) is not int or type(index) is not int or not 0 <= epoch < 1 << 64:
            raise ValueError(f"data position: got epoch={epoch!r}, index={index!r}, expected integers from 0")
        offset, order = self._plan(epoch)
        if not 0 <= index <= len(order) // self.batch:
            raise ValueError(f"data position: got index={index}, expected 0 to {len(order) // self.batch}")
        self.epoch, self.index, self._offset, self._order = epoch, index, offset, order

    def _identity(self) -> dict[str, int | str]:
        return {"data": self.shards.digest, "batch": self.batch, "tokens": self.tokens, "seed": self.seed}


def validation_windows(shards: TokenShards, batch: int, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Sweep the stream from its start in whole batches of equal size, the same on every call.

    All batches have the same number of windows, so the plain mean of their losses is the mean over tokens. At most
    one batch's worth of tokens at the end is left out.

    Args:
        shards: the stream.
        batch, tokens: B and T; where the stream holds fewer than B windows, B is what it holds.
    Returns:
        An iterator of (ids, targets), int64 (B, T), targets shifted by one already.
    Raises:
        ValueError: fewer than T + 1 tokens, or a bad size; at the call, not at the first batch.
    """
    _check_sizes(batch, tokens)
    windows = (len(shards) - 1) // tokens
    if windows < 1:
        raise ValueError(f"validation data: got {len(shards)} tokens, expected at least {tokens + 1} for one window")
    rows = min(batch, windows)
    starts = np.arange(windows // rows * rows).reshape(-1, rows) * tokens
    return (_gather(shards, row, tokens) for row in starts)


def prepare(corpus: Corpus, tokenizer: Tokenizer, folder: Path | str) -> tuple[TokenShards, TokenShards]:
    """Encode both sides of a corpus into shards `train` and `validation` in folder, and open them."""
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


def _check_sizes(batch: int, tokens: int) -> None:
    if batch < 1 or tokens < 1:
        raise ValueError(f"batch x tokens: got {batch} x {tokens}, expected at least 1 x 1")


def _gather(shards: TokenShards, starts: np.ndarray, tokens: int) -> tuple[Tensor, Tensor]:
    rows = np.empty((len(starts), tokens + 1), np.int64)
    for row, start in zip(rows, starts.tolist(), strict=True):
        shards.read(start, row)
    both = torch.from_numpy(rows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()
