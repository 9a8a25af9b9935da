"""Which documents are for validation: a document is in one split, so no line of one has neighbors in the other.

A hash of the name decides: the same documents give the same split on every machine. Up to MAX_LISTED documents, the
split is exact: they are visited in the order of their hashes, and small ones become validation text up to its share of
all bytes. Of more documents, those whose hash is in the lowest part of its range are validation text; documents that
are added later move none of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from peakgpt.engine.data.documents import Document

VALIDATION_SHARE = 0.07  # maximum share of all bytes
MAX_VALIDATION_DOCUMENT = 0.01  # of all bytes, so that validation has many documents instead of a long one
MAX_LISTED = 100_000  # their names and sizes take about 20 MB


@dataclass(frozen=True)
class HashSplit:
    """A document is validation text if the hash of its name is in the lowest `share` of its range."""

    share: float

    def is_validation(self, name: str) -> bool:
        return hash_fraction(name) < self.share


@dataclass(frozen=True)
class NamedSplit:
    """The validation documents by name."""

    validation: frozenset[str]

    def is_validation(self, name: str) -> bool:
        return name in self.validation


@dataclass
class Survey:
    """Names and sizes of the documents of a corpus, which `split` is made of. Its memory is limited.

    Args:
        share: of the bytes, for validation.
    """

    share: float
    documents: int = 0
    size_bytes: int = 0
    _sizes: dict[str, int] | None = field(default_factory=dict)  # None: too many
    _by_hash: list[int] = field(default_factory=lambda: [0, 0, 0, 0])  # documents and bytes of both splits of HashSplit

    def add(self, name: str, size_bytes: int) -> None:
        self.documents += 1
        self.size_bytes += size_bytes
        part = 2 * HashSplit(self.share).is_validation(name)
        self._by_hash[part] += 1
        self._by_hash[part + 1] += size_bytes
        if self._sizes is not None:
            if name in self._sizes:
                raise ValueError(f"corpus: got two documents with the name {name!r}, expected different names")
            self._sizes[name] = size_bytes
            if len(self._sizes) > MAX_LISTED:
                self._sizes = None

    def split(self) -> tuple[HashSplit | NamedSplit, tuple[int, int], tuple[int, int]]:
        """Return the split, and (documents, bytes) of the training and of the validation text."""
        if self._sizes is None or self.share == 0:
            split = HashSplit(self.share)
            train, validation = self._by_hash[:2], self._by_hash[2:]
            return split, (train[0], train[1]), (validation[0], validation[1])
        names = _small_documents(self._sizes, self.share)
        chosen = len(names), sum(self._sizes[name] for name in names)
        return NamedSplit(names), (self.documents - chosen[0], self.size_bytes - chosen[1]), chosen


def _small_documents(sizes: dict[str, int], share: float) -> frozenset[str]:
    """Visit the documents in the order of their hashes; small ones become validation text up to its share."""
    total = sum(sizes.values())
    validation, validation_bytes = set(), 0
    for name in sorted(sizes, key=_hash):
        size = sizes[name]
        if size <= MAX_VALIDATION_DOCUMENT * total and validation_bytes + size <= share * total:
            validation.add(name)
            validation_bytes += size
    if not validation:  # few documents, each a large part of the corpus
        validation.add(min(sizes, key=lambda name: (sizes[name], name)))
    return frozenset(validation)


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def hash_fraction(name: str) -> float:
    """Return the hash of a name as a number from 0 to 1."""
    return int.from_bytes(_hash(name)[:8], "big") / 2**64


# ---- one document


def cut_document(document: Document, share: float) -> tuple[Document, Document]:
    """Cut one text near the start of its validation share.

    The cut is after the last line end before that position, else after the first line end after it. Without line ends
    the same rule applies to spaces, else the cut is at the position itself. Line ends in the first half of the text do
    not count: if the text were a title and one endless line, almost nothing would be left to train on.

    Raises:
        ValueError: the text has one character.
    """
    count = sum(map(len, document.blocks()))
    if count < 2:
        raise ValueError(f"text file {document.name}: got {count} character, expected at least 2 to split")
    cut = _cut_position(document.blocks(), count, max(1, int(count * (1 - share))))
    name = document.name
    return (Document(name, lambda: _part(document.blocks(), 0, cut)),
            Document(name, lambda: _part(document.blocks(), cut, count)))  # fmt: skip


def _cut_position(blocks: Iterable[str], count: int, cut: int) -> int:
    marks, before, after = ("\n", " "), [-1, -1], [-1, -1]  # the last position before the cut, the first one after it
    position = 0
    for block in blocks:
        middle, low = max(0, min(len(block), cut - position)), max(0, count // 2 - position)
        end = min(len(block), count - 1 - position)
        for i, mark in enumerate(marks):
            if (found := block.rfind(mark, low, middle)) >= 0:
                before[i] = position + found
            if after[i] < 0 and (found := block.find(mark, middle, end)) >= 0:
                after[i] = position + found
        position += len(block)
    return next((1 + place for pair in zip(before, after, strict=True) for place in pair if place >= 0), cut)


def _part(blocks: Iterable[str], start: int, end: int) -> Iterator[str]:
    """Yield the characters from `start` to `end` of a text."""
    position = 0
    for block in blocks:
        if part := block[max(0, start - position) : max(0, end - position)]:
            yield part
        position += len(block)
        if position >= end:
            return
