"""Prepare data for training: text or token files -> token shards of the streams `train` and `validation`.

    train.json, train-00000-....bin              the index and the shards of the training stream, see shards.py
    validation.json, validation-00000-....bin    of the validation stream
    tokenizer.json, ...                          the tokenizer, if there is one
    preparation.json                             only while the folder is not complete: the finished shards

A preparation that was killed goes on from its last finished shards, and gives the same bytes: what they are made of is
read again, compared by its digest, and not encoded again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peakgpt.engine.data.corpus import STREAMS, Corpus
from peakgpt.engine.data.encoding import Piece, encode_parts
from peakgpt.engine.data.shard_writer import SHARD_TOKENS, ShardWriter
from peakgpt.engine.data.shards import TokenShards
from peakgpt.engine.data.token_files import TokenFile
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.kernels.files import flush, lock, make_folders, remove_empty_folders, write_atomically
from peakgpt.kernels.strict_json import dumps

JOURNAL = "preparation.json"
Progress = Callable[[int, int], None]  # bytes of text (of ids, for token files) and tokens so far


def prepare(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path | str, *,
    shard_tokens: int = SHARD_TOKENS, progress: Progress = lambda done_bytes, tokens: None,
) -> tuple[TokenShards, TokenShards]:  # fmt: skip
    """Encode a corpus into a folder, or finish a preparation that was killed.

    Args:
        corpus: such as `load_corpus(["web.jsonl"])`, or `corpus_of(texts)` for documents of a program.
        folder: new, empty, or of a preparation of the same corpus with the same arguments that was not finished.
        shard_tokens: tokens per shard.
        progress: called often.
    Returns:
        The training and the validation stream.
    Raises:
        ValueError: the folder cannot be used, the corpus is wrong, or a stream has no text. Finished shards stay for a
            next call; if there is none, the folder is as before.
    """
    _, [end_id] = tokenizer.document_marks
    identity = {"tokenizer": tokenizer.digest, "vocab_size": tokenizer.vocab_size, "end_id": end_id}
    with _Preparation.open(Path(folder), {**identity, "shard_tokens": shard_tokens}) as preparation:
        tokenizer.save(preparation.folder)
        preparation.write(encode_parts(corpus.parts(), tokenizer, preparation.done), progress)
        return preparation.finish()


def prepare_tokens(
    files: Mapping[str, Sequence[TokenFile]], folder: Path | str, *, vocab_size: int, end_id: int | None = None,
    tokenizer: Tokenizer | None = None, shard_tokens: int = SHARD_TOKENS,
    progress: Progress = lambda done_bytes, tokens: None,
) -> tuple[TokenShards, TokenShards]:  # fmt: skip
    """Copy token files into a folder as shards, or finish a preparation that was killed.

    Args:
        files: of the streams, see `find_token_files`.
        vocab_size: all ids are below it.
        end_id: the id that ends a document. None: unknown, and attention cannot be masked across documents.
        tokenizer: whose ids they are; it gives the bytes of the text, and is saved with the shards.
        others: as in `prepare`.
    Returns:
        The training and the validation stream.
    Raises:
        ValueError: as in `prepare`, or an id is outside the vocabulary.
    """
    digest = None if tokenizer is None else tokenizer.digest
    identity = {"tokenizer": digest, "vocab_size": vocab_size, "end_id": end_id, "shard_tokens": shard_tokens}
    with _Preparation.open(Path(folder), identity) as preparation:
        if tokenizer is not None:
            tokenizer.save(preparation.folder)
        preparation.write(_token_pieces(files, tokenizer, end_id), progress)
        return preparation.finish()


def _token_pieces(
    files: Mapping[str, Sequence[TokenFile]], tokenizer: Tokenizer | None, end_id: int | None
) -> Iterator[Piece]:
    sizes = None if tokenizer is None else _text_bytes(tokenizer, end_id)
    for stream in STREAMS:
        for file in files[stream]:
            for ids in file.blocks():
                known = sizes is not None and ids.max() < len(sizes)
                yield Piece(stream, ids.tobytes(), int(sizes[ids].sum()) if known else None, ids)


def _text_bytes(tokenizer: Tokenizer, end_id: int | None) -> np.ndarray:
    """Return the bytes of text of each id."""
    return np.array([0 if i == end_id else len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])


@dataclass
class _Stream:
    """One stream: its shards, and what they are made of.

    Args:
        writer: of its shards.
        skip, offset: finished shards have `skip` pieces, and `offset` tokens of the next one.
        expected: digest of the sources of these pieces, the next one included; None for a new stream.
    """

    writer: ShardWriter
    skip: int = 0
    offset: int = 0
    expected: str | None = None
    pieces: int = 0
    text_bytes: int | None = 0
    sha256: Any = field(default_factory=hashlib.sha256)

    def add(self, piece: Piece) -> dict[str, Any] | None:
        """Add the next piece; return the position for the journal if that finished a shard."""
        self.sha256.update(piece.source)
        known = piece.text_bytes is not None and self.text_bytes is not None
        self.text_bytes = self.text_bytes + piece.text_bytes if known else None
        number, self.pieces = self.pieces, self.pieces + 1
        if number < self.skip:
            return None
        start = 0
        if number == self.skip and self.expected is not None:
            self.check_sources(self.sha256.hexdigest())
            start = self.offset
        finished = None if piece.ids is None else self.writer.add(piece.ids[start:])
        if finished is None:
            return None
        return {"pieces": number, "offset": start + finished, "sha256": self.sha256.hexdigest()}

    def check_sources(self, sha256: str) -> None:
        if sha256 != self.expected:
            raise ValueError("got other text than the finished shards are made of, expected the same")


class _Preparation:
    """A folder that is being prepared, locked; see the head of the module."""

    def __init__(self, folder: Path, made: list[Path], identity: dict[str, Any], state: dict[str, Any] | None):
        self.folder, self._made, self._identity, self._is_new = folder, made, identity, state is None
        self._positions = state = dict(state or {})  # of the streams that have finished shards
        self.streams = {
            name: _Stream(
                ShardWriter(
                    folder, name, identity["vocab_size"], identity["shard_tokens"], end_id=identity["end_id"],
                    shards=state.get(name, {}).get("shards", ()),
                ),
                *(state[name][key] for key in ("pieces", "offset", "sha256") if name in state),
            )
            for name in STREAMS
        }  # fmt: skip

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path, identity: dict[str, Any]) -> Iterator[_Preparation]:
        """Begin or continue a preparation.

        If the block raises, an unfinished shard is deleted, and without finished ones everything.

        Raises:
            ValueError: the folder has other files, another process prepares it, or it cannot be written.
        """
        made: list[Path] = []
        try:
            made = make_folders(folder)
            handle = os.open(folder, os.O_RDONLY)
        except OSError as error:
            remove_empty_folders(made)
            raise ValueError(f"folder {folder}: got {error.strerror}, expected a folder to write into") from None
        try:
            preparation = cls._begin(folder, made, handle, identity)
            try:
                yield preparation
            except BaseException as error:
                preparation.abandon()
                preparation.explain(error)
                raise
        finally:
            os.close(handle)

    @classmethod
    def _begin(cls, folder: Path, made: list[Path], handle: int, identity: dict[str, Any]) -> _Preparation:
        try:
            lock(handle)
        except BlockingIOError:
            raise ValueError(f"folder {folder}: a running process writes it, expected a free one") from None
        check_folder(folder)
        state = None
        if (folder / JOURNAL).exists():
            state = _read_journal(folder / JOURNAL)
            if state.pop("identity", None) != identity:
                raise ValueError(f"folder {folder}: got a preparation with other settings or another tokenizer, "
                                 "expected the same; delete the folder to begin again")  # fmt: skip
        preparation = cls(folder, made, identity, state)
        try:
            preparation.delete_unfinished()
            preparation.write_journal(state or {})
        except OSError as error:
            preparation.abandon()
            preparation.explain(error)
        return preparation

    @property
    def done(self) -> dict[str, int]:
        """The number of pieces of each stream that need not be encoded."""
        return {name: stream.skip for name, stream in self.streams.items()}

    @property
    def finished_shards(self) -> int:
        return sum(len(position["shards"]) for position in self._positions.values())

    def write(self, pieces: Iterable[Piece], progress: Progress) -> None:
        done_bytes = tokens = 0
        for piece in pieces:
            stream = self.streams[piece.stream]
            position = stream.add(piece)
            if position is not None:
                positions = {**self._positions, piece.stream: {**position, "shards": list(stream.writer.shards)}}
                self.write_journal(positions)
            done_bytes += len(piece.source) if piece.text_bytes is None else piece.text_bytes
            tokens += 0 if piece.ids is None else len(piece.ids)
            progress(done_bytes, tokens)

    def write_journal(self, positions: dict[str, Any]) -> None:
        data = dumps({"identity": self._identity, **positions}, indent=1)
        write_atomically(self.folder / JOURNAL, f"{data}\n".encode())
        self._positions = positions

    def finish(self) -> tuple[TokenShards, TokenShards]:
        """Write the indexes, and open both streams."""
        for stream in self.streams.values():
            if stream.pieces <= stream.skip and stream.expected is not None:
                stream.check_sources("")
        if not self.streams["validation"].pieces:
            raise ValueError("corpus: got no validation text, expected some; name it with --validation")
        if not self.streams["train"].pieces:
            raise ValueError("corpus: got no training text, expected some")
        corpus = hashlib.sha256("".join(s.sha256.hexdigest() for s in self.streams.values()).encode()).hexdigest()
        for stream in self.streams.values():
            stream.writer.finish(stream.text_bytes or None, corpus, self._identity["tokenizer"])
        for path in self.folder.rglob("*"):  # the files of the tokenizer
            flush(path)
        (self.folder / JOURNAL).unlink()
        train, validation = (TokenShards.open(self.folder, name, check=False) for name in STREAMS)
        return train, validation

    def delete_unfinished(self) -> None:
        """Delete the shards that the journal does not list."""
        for name, stream in self.streams.items():
            listed = self._positions[name]["shards"] if name in self._positions else ()
            stream.writer.delete_unlisted(keep={shard["file"] for shard in listed})

    def abandon(self) -> None:
        """Delete unfinished shards; without finished ones, empty a folder that was empty before, and remove it."""
        with contextlib.suppress(OSError):
            self.delete_unfinished()
            if self._is_new and not self.finished_shards:
                for path in self.folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                remove_empty_folders(self._made)

    def explain(self, error: BaseException) -> None:
        """Raise ValueError with the folder, and what is kept in it, for an error that the user can mend."""
        count = self.finished_shards
        kept = f"; the finished shards ({count}) are kept, and the same command goes on from them" if count else ""
        if isinstance(error, OSError):
            expected = "more free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "a folder to write into"
            reason = error.strerror or error
            raise ValueError(f"folder {self.folder}: got {reason}, expected {expected}{kept}") from None
        if isinstance(error, ValueError) and kept:
            raise ValueError(f"{error}; folder {self.folder}{kept}") from None


def check_folder(folder: Path | str) -> None:
    """Refuse a folder that cannot be prepared, without making it.

    Raises:
        ValueError: it is a file, or it contains files that are not of an unfinished preparation.
    """
    folder = Path(folder)
    try:
        names = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:
        raise ValueError(f"folder {folder}: got {error.strerror}, expected a folder to write into") from None
    if JOURNAL not in names and names - {f".{JOURNAL}.tmp"}:
        raise ValueError(f"folder {folder}: got a folder with files, expected a new or empty one")


def _read_journal(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(state, dict)
        positions = [state[name] for name in STREAMS if name in state]
        assert all(type(position[key]) is int for position in positions for key in ("pieces", "offset"))
        assert all(type(position["sha256"]) is str for position in positions)
        rows = [shard["file"] for position in positions for shard in position["shards"]]
        missing = [row for row in rows if not (path.parent / row).is_file()]
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AssertionError) as error:
        raise ValueError(f"{path}: got {error!r}, expected a journal of `peakgpt prepare`; delete the folder to begin "
                         "again") from None  # fmt: skip
    if missing:
        raise ValueError(f"folder {path.parent}: got no {missing[0]}, expected the finished shards; delete the folder "
                         "to begin again")  # fmt: skip
    return state
