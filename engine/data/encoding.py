"""Encode documents as a stream of pieces, while the next pieces are read.

Long documents are cut into pieces at positions where a cut changes no token. So memory does not grow with their length,
and the pieces of one document are encoded on all cores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from peakgpt.engine.data.documents import Document
from peakgpt.engine.data.freed_memory import release_freed_memory
from peakgpt.engine.data.library_call import submit

PIECE_CHARS = 1 << 16  # long enough to hide the cost per call, short enough to encode one file on all cores
# Per library call. Two calls run at a time: Python converts the ids of one (40 ns each) while the other encodes (600 ns
# each on 2 cores). Threads need no copy of the tokenizer and of torch for each core, as processes would: 230 MB.
# The encodings of a call take about 50 bytes per character.
BATCH_CHARS = 1 << 19
RELEASE_BATCHES = 64  # between two returns of freed memory to the system; each thread of the library keeps its own
# No match of GPT-2's expression continues from a visible character to a blank, so a cut there changes no token.
CUT = re.compile(r"(?<=\S)(?=[ \n])")


class Encoder(Protocol):
    """What `encode_parts` needs of a tokenizer."""

    @property
    def can_cut(self) -> bool: ...  # whether texts may be cut as `cut_text` does
    @property
    def document_marks(self) -> tuple[list[int], list[int]]: ...  # before and after each document
    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> list[list[int]]: ...


@dataclass(frozen=True)
class Piece:
    """A part of a token stream.

    Args:
        stream: its name.
        source: what it is made of, to find out whether that changed.
        text_bytes: of its text in UTF-8; None if unknown.
        ids: token ids; None for a piece that is skipped.
    """

    stream: str
    source: bytes
    text_bytes: int | None
    ids: np.ndarray | None


@dataclass(frozen=True)
class _Text:
    """A piece before it is encoded. `name` is the document's if the piece is its last one, else None."""

    stream: str
    text: str
    is_first: bool
    name: str | None


def encode_parts(
    parts: Iterable[tuple[str, Document]], tokenizer: Encoder, skip: Mapping[str, int] | None = None
) -> Iterator[Piece]:
    """Encode documents on all cores, with `document_marks` of the tokenizer around each and special tokens as text.

    Args:
        parts: (stream, document) pairs.
        tokenizer: encodes the texts.
        skip: the number of first pieces of each stream that are not encoded, only read.
    Returns:
        The pieces of each stream in order.
    """
    left = dict(skip or {})
    before, after = tokenizer.document_marks

    def texts() -> Iterator[_Text]:
        for stream, document in parts:
            is_first = True
            for text, is_last in cut_text(document.blocks(), can_cut=tokenizer.can_cut):
                yield _Text(stream, text, is_first, document.name if is_last else None)
                is_first = False

    def pieces(batch: list[_Text], encoded: list[list[int]]) -> Iterator[Piece]:
        for text, ids in zip(batch, encoded, strict=True):
            around = [*(before if text.is_first else []), *ids, *(after if text.name is not None else [])]
            yield _piece(text, np.array(around, np.int64))

    def encode(batch: list[_Text]) -> Future[list[list[int]]]:
        # Text stays text: a document that contains the end-of-text mark must not end there.
        texts = [text.text for text in batch]
        return submit(tokenizer.encode_batch, texts, add_special_tokens=False, split_special_tokens=True)

    pending: tuple[list[_Text], Future[list[list[int]]]] | None = None
    batch: list[_Text] = []
    chars = batches = 0
    for text in texts():
        if left.get(text.stream, 0):
            left[text.stream] -= 1
            yield _piece(text, None)
            continue
        batch.append(text)
        chars += len(text.text)
        if chars >= BATCH_CHARS:
            following = batch, encode(batch)
            if pending:
                yield from pieces(pending[0], pending[1].result())
            pending, batch, chars, batches = following, [], 0, batches + 1
            if batches % RELEASE_BATCHES == 0:
                release_freed_memory()
    if pending:
        yield from pieces(pending[0], pending[1].result())
    if batch:
        yield from pieces(batch, encode(batch).result())


def _piece(text: _Text, ids: np.ndarray | None) -> Piece:
    data = text.text.encode()
    # The name with its length separates ("ab", "c") from ("a", "bc").
    name = b"" if text.name is None else b"\0" + text.name.encode() + len(text.name).to_bytes(8, "little")
    return Piece(text.stream, data + name, len(data), ids)


def cut_text(blocks: Iterable[str], *, can_cut: bool = True) -> Iterator[tuple[str, bool]]:
    """Cut a text; yield (piece, whether it is the last one). An empty text is one empty piece.

    Args:
        blocks: of the text; how it is cut does not depend on them.
        can_cut: False returns the text in one piece.
    """
    text, searched = "", PIECE_CHARS
    for block in blocks:
        text += block
        start = 0
        while can_cut and (cut := CUT.search(text, searched)):
            yield text[start : cut.start()], False
            start, searched = cut.start(), cut.start() + PIECE_CHARS
        searched = max(searched, len(text)) - start  # the end may be a cut once the next character is known
        text = text[start:]
    yield text, True
