"""Text to train on, split into train and validation: the running Python's standard library, or the user's documents.

A corpus is read once when it is opened, which finds every fault of its files and the sizes for the split, and once more
when it is encoded. It is never held in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from peakgpt.engine.data.documents import Document, ReadOptions
from peakgpt.engine.data.encoding import cut_text
from peakgpt.engine.data.sources import Source, StandardLibrary, open_sources
from peakgpt.engine.data.split import VALIDATION_SHARE, HashSplit, NamedSplit, Survey, cut_document, hash_fraction

STREAMS = ("train", "validation")


@dataclass(frozen=True)
class Part:
    """The documents of one split; iterating again reads them again. Sizes are None if the corpus cannot be read twice.

    Args:
        documents: returns the documents in their order.
        count: of them.
        size_bytes: of their text in UTF-8.
    """

    documents: Callable[[], Iterator[Document]]
    count: int | None
    size_bytes: int | None

    def __iter__(self) -> Iterator[Document]:
        return self.documents()

    def sample(self, size_bytes: int) -> Iterator[str]:
        """Yield about `size_bytes` of the text, in pieces from all of it; all of a shorter text.

        The first part of the text, if the corpus cannot be read twice.
        """
        if self.size_bytes is not None and self.size_bytes <= size_bytes:
            yield from (document.text for document in self)
            return
        share = 1.0 if self.size_bytes is None else size_bytes / self.size_bytes
        for document in self:
            for number, (text, _) in enumerate(cut_text(document.blocks())):
                if hash_fraction(f"{document.name}\0{number}") < share:
                    yield text
                    size_bytes -= len(text.encode())
                if self.size_bytes is None and size_bytes <= 0:
                    return


@dataclass(frozen=True)
class Corpus:
    """The documents of both splits.

    Args:
        train, validation: each split alone.
        parts: yields (split, document) of all documents, in one reading.
    """

    train: Part
    validation: Part
    parts: Callable[[], Iterator[tuple[str, Document]]]

    @property
    def size_bytes(self) -> int | None:
        """Bytes of all text; None if the corpus cannot be read twice."""
        sizes = self.train.size_bytes, self.validation.size_bytes
        return None if None in sizes else sum(sizes)

    def __str__(self) -> str:
        total = self.size_bytes
        if total is None:
            return "texts of unknown number and size"
        return (
            f"{self.train.count} training and {self.validation.count} validation texts, {total / 1e6:.2f} MB, "
            f"{self.validation.size_bytes / total:.1%} for validation"
        )


def load_corpus(
    names: Iterable[Path | str] | None = None,
    *,
    validation: Iterable[Path | str] | None = None,
    share: float = VALIDATION_SHARE,
    options: ReadOptions = ReadOptions(),  # noqa: B008 frozen
) -> Corpus:
    """Open text that a user names, check all of it, and split it.

    Args:
        names: files, folders and data sets, see sources.py. None: the standard library of the running Python.
        validation: sources of validation text; `names` are all for training then. None: split `names`.
        share: of the bytes, for validation.
        options: how documents are read.
    Returns:
        The corpus. A single document is split by position, at the end of a line if there is one.
    Raises:
        ValueError: there is no text, or some of it is empty, unreadable, binary or not UTF-8.
    """
    sources: list[Source] = [StandardLibrary()] if names is None else open_sources(names, options)
    if validation is None:
        return split_documents(_Chain(sources), share)
    held_out = open_sources(validation, options)
    if both := sorted(_places(sources) & _places(held_out)):
        raise ValueError(f"corpus: got {both[0]} for training and validation, expected it in one of them")
    return join_splits(_Chain(sources), _Chain(held_out))


def _places(sources: list[Source]) -> set[str]:
    """Return the files of sources, behind links too, and the names of data sets."""
    return {place for source in sources for place in source.places}


class _Chain:
    """Several sources as one."""

    def __init__(self, sources: list[Source]):
        self._sources, self.rereadable = sources, all(source.rereadable for source in sources)

    def __iter__(self) -> Iterator[Document]:
        for source in self._sources:
            yield from source


def split_documents(documents: Source, share: float = VALIDATION_SHARE) -> Corpus:
    """Split documents by their names; see split.py. Documents that can be read once are split by their hashes alone.

    Raises:
        ValueError: the share is not above 0 and below 1, there is no text, or the documents cannot be read.
    """
    if not 0 < share < 1:
        raise ValueError(f"validation share: got {share}, expected above 0 and below 1")
    if not documents.rereadable:
        return _by_name(documents, HashSplit(share), (None, None), (None, None))
    survey = _survey(documents, share)
    if survey.documents == 1:
        [document] = documents
        return _of_two(*cut_document(document, share))
    return _by_name(documents, *survey.split())


def corpus_of(
    documents: Iterable[Document | str], validation: Iterable[Document | str] | None = None,
    share: float = VALIDATION_SHARE,
) -> Corpus:  # fmt: skip
    """Make a corpus of the documents of a program.

    Args:
        documents: texts, or documents with names. A list, or another object that can be iterated again, is checked
            first; an iterator is read once.
        validation: documents for validation. None: split `documents` by their names; a text has its number as name.
        share: of the bytes, for validation.
    Raises:
        ValueError: as in `split_documents`.
    """
    if validation is None:
        return split_documents(_Texts(documents), share)
    return join_splits(_Texts(documents), _Texts(validation))


class _Texts:
    """Documents of a program as a source."""

    def __init__(self, documents: Iterable[Document | str]):
        self._documents, self.rereadable = documents, iter(documents) is not documents

    def __iter__(self) -> Iterator[Document]:
        for number, document in enumerate(self._documents, 1):
            yield Document.of(str(number), document) if isinstance(document, str) else document


def join_splits(train: Source, validation: Source) -> Corpus:
    """Make a corpus of training and validation documents that the user has split.

    Raises:
        ValueError: there is no text, or as the documents raise when they are read.
    """

    def parts() -> Iterator[tuple[str, Document]]:
        yield from (("train", document) for document in train)
        yield from (("validation", document) for document in validation)

    return Corpus(*(_surveyed(source) for source in (train, validation)), parts)


def _surveyed(source: Source) -> Part:
    if not source.rereadable:
        return Part(lambda: iter(source), None, None)
    survey = _survey(source, 0.0)
    return Part(lambda: iter(source), survey.documents, survey.size_bytes)


def _survey(documents: Iterable[Document], share: float) -> Survey:
    survey = Survey(share)
    for document in documents:
        survey.add(document.name, sum(len(block.encode()) for block in document.blocks()))
    if not survey.documents:
        raise ValueError("corpus: got no text, expected at least one document that is not empty")
    return survey


def _by_name(
    documents: Iterable[Document], split: HashSplit | NamedSplit,
    train: tuple[int | None, int | None], validation: tuple[int | None, int | None],
) -> Corpus:  # fmt: skip
    def parts() -> Iterator[tuple[str, Document]]:
        return ((STREAMS[split.is_validation(document.name)], document) for document in documents)

    def part(stream: str) -> Callable[[], Iterator[Document]]:
        return lambda: (document for name, document in parts() if name == stream)

    return Corpus(Part(part("train"), *train), Part(part("validation"), *validation), parts)


def _of_two(head: Document, tail: Document) -> Corpus:
    sizes = [sum(len(block.encode()) for block in document.blocks()) for document in (head, tail)]
    return Corpus(
        Part(lambda: iter([head]), 1, sizes[0]), Part(lambda: iter([tail]), 1, sizes[1]),
        lambda: iter(zip(STREAMS, (head, tail), strict=True)),
    )  # fmt: skip
