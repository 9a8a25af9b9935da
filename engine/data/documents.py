"""Read documents from files: text, JSON lines, Parquet and FASTA, plain or compressed. The suffix decides how.

    notes.txt  main.rs.gz      any other suffix: one document a file
    web.jsonl  web.jsonl.zst   one JSON object a line; one of its fields is the text
    web.parquet                one row a document; one of its columns is the text
    proteins.fasta x.fa.gz     one sequence a document, with control tags in front of it, see fasta.py

Files are read in blocks or records, so memory does not grow with their size.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import importlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, cast

from peakgpt.engine.data import fasta
from peakgpt.engine.data.text_file import open_file
from peakgpt.engine.data.zstd_file import ZstdFile

BLOCK_BYTES = 1 << 20
PARQUET_ROWS = 256  # per batch: few calls, and little memory if a row is a book
ERRORS = ("strict", "replace")  # of invalid UTF-8, as in bytes.decode


@dataclass(frozen=True)
class Document:
    """A text with a name that is unique in its corpus.

    Args:
        name: decides the split, such as "guide/install.md", or "web.jsonl:17" for a line of a file.
        blocks: returns the text in blocks; each call begins again.
    """

    name: str
    blocks: Callable[[], Iterable[str]]

    @classmethod
    def of(cls, name: str, text: str) -> Document:
        return cls(name, lambda: (text,))

    @property
    def text(self) -> str:
        return "".join(self.blocks())


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How documents are read.

    Args:
        field: the JSON field or the Parquet column of the text.
        errors: "strict" refuses invalid UTF-8, "replace" writes U+FFFD for it.
        tags: annotations of FASTA headers that become control tags; texts of other files have none, and are refused.
    """

    field: str = "text"
    errors: str = "strict"
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.errors not in ERRORS:
            raise ValueError(f"errors: got {self.errors!r}, expected {' or '.join(ERRORS)}")


def read_documents(path: Path, name: str, options: ReadOptions) -> Iterator[Document]:
    """Yield the documents of a file in their order; empty ones are left out, but an empty file is refused.

    Args:
        path: a file.
        name: of the file in the corpus; the names of its documents begin with it.
    Raises:
        ValueError: the file is unreadable, not a regular file, truncated, or has other content than its suffix says.
            The message names the line, the row or the byte.
    """
    suffix = content_suffix(path)
    if suffix not in fasta.SUFFIXES:
        refuse_tags(f"text file {path}", options)
    return READERS.get(suffix, _read_text)(path, name, options)


def refuse_tags(place: str, options: ReadOptions) -> None:
    """Refuse control tags for a source that is not FASTA."""
    if options.tags:
        raise ValueError(f"{place}: got it with --tags {' '.join(options.tags)}, expected FASTA files "
                         f"({', '.join(fasta.SUFFIXES)}), whose headers have annotations")  # fmt: skip


def content_suffix(path: Path) -> str:
    """Return the suffix that says what the file contains, without the compression's."""
    return (path if compression(path) is None else path.with_suffix("")).suffix.lower()


def require(module: str, extra: str = "data") -> ModuleType:
    """Import an optional package.

    Args:
        extra: of peakgpt, that installs it.
    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ValueError(f"{package}: got no such package, expected `pip install peakgpt[{extra}]`") from None


# ---- text


def _read_text(path: Path, name: str, options: ReadOptions) -> Iterator[Document]:
    yield Document(name, lambda: _text_blocks(path, options.errors))


def _text_blocks(path: Path, errors: str) -> Iterator[str]:
    decoder, position = codecs.getincrementaldecoder("utf-8")(errors), 0
    with _open(path) as file:
        while True:
            block = file.read(BLOCK_BYTES)
            if b"\0" in block:
                at = position + block.index(0)
                raise ValueError(f"text file {path}: got a binary file (NUL at byte {at}), expected UTF-8 text")
            start = position - len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, start, error) from None
            if text:
                yield text
            position += len(block)
            if not block:
                break
    if not position:
        raise ValueError(f"text file {path}: got an empty file, expected UTF-8 text")


def _not_utf8(path: Path, start: int, error: UnicodeDecodeError) -> ValueError:
    got = f"byte 0x{error.object[error.start]:02x} at position {start + error.start}"
    return ValueError(f"text file {path}: got {got}, which is not UTF-8, expected UTF-8 text")


# ---- records, of JSON lines, Parquet and data sets


def _read_jsonl(path: Path, name: str, options: ReadOptions) -> Iterator[Document]:
    for number, row in json_records(path, options.errors):
        yield from record_documents(f"{path}:{number}", f"{name}:{number}", row, options)


def json_records(path: Path, errors: str = "strict") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number of its line, JSON object) of each line that is not blank.

    Args:
        path: of a file of JSON lines, plain or compressed.
        errors: of invalid UTF-8, one of ERRORS.
    Raises:
        ValueError: the file is unreadable or empty, or a line is not a JSON object; the message names the line.
    """
    position, number = 0, 0
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8", errors)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, position, error) from None
            position += len(line)
            if text.strip():
                yield number, _parse(path, number, text)
    if not number:
        raise ValueError(f"text file {path}: got an empty file, expected a JSON object a line")


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"text file {path}:{number}: got {error}, expected a JSON object a line") from None
    if not isinstance(row, dict):
        raise ValueError(f"text file {path}:{number}: got {type(row).__name__}, expected a JSON object a line")
    return row


def record_documents(place: str, name: str, row: dict[str, Any], options: ReadOptions) -> Iterator[Document]:
    """Yield the document of a record; none if its text is empty.

    Args:
        place: of the record, for the message.
        name: of the document.
        row: the fields.
    Raises:
        ValueError: the field is missing or is not text.
    """
    text = row.get(options.field)
    if not isinstance(text, str):
        got = f"fields {', '.join(row):.200}" if options.field not in row else f"{options.field}={text!r:.40}"
        raise ValueError(f"text file {place}: got {got}, expected text in the field {options.field!r} (--field)")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can hold "\ud800"
        if options.errors == "strict":
            got = f"the lone surrogate U+{ord(text[error.start]):04X}"
            raise ValueError(f"text file {place}: got {got}, expected text that UTF-8 can hold") from None
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if text:
        yield Document.of(name, text)


def _read_parquet(path: Path, name: str, options: ReadOptions) -> Iterator[Document]:
    if compression(path) is not None:
        raise ValueError(f"text file {path}: got a compressed Parquet file, expected .parquet, which compresses inside")
    parquet, arrow = require("pyarrow.parquet"), require("pyarrow")
    number = 0
    with open_text_file(path) as file:
        try:
            table = parquet.ParquetFile(file, buffer_size=BLOCK_BYTES, pre_buffer=False)
            if options.field not in (columns := table.schema_arrow.names):
                raise ValueError(f"text file {path}: got columns {', '.join(columns)}, expected {options.field!r} "
                                 "(--field)")  # fmt: skip
            for batch in table.iter_batches(PARQUET_ROWS, columns=[options.field], use_threads=False):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield from record_documents(f"{path}:{number}", f"{name}:{number}", {options.field: text}, options)
                arrow.default_memory_pool().release_unused()  # else the pool keeps several row groups
        except UnicodeDecodeError as error:
            got = f"byte 0x{error.object[error.start]:02x} in a text after row {number}, which is not UTF-8"
            raise ValueError(f"text file {path}: got {got}, expected UTF-8 text") from None
        except (arrow.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0][:200]
            raise ValueError(f"text file {path}: got {reason}, expected a complete Parquet file") from None
    if not number:
        raise ValueError(f"text file {path}: got no rows, expected at least 1")


# ---- FASTA


def _read_fasta(path: Path, name: str, options: ReadOptions) -> Iterator[Document]:
    missing, known = set(options.tags), set()
    for number, header, sequence in fasta.fasta_records(_lines(path, options.errors), f"text file {path}"):
        found = fasta.annotations(header)
        missing -= found.keys()
        known |= found.keys()
        yield Document.of(f"{name}:{number}", fasta.control_tags(header, options.tags) + sequence)
    if missing:
        raise ValueError(f"text file {path}: got no header with {min(missing)!r} of --tags, expected one of its "
                         f"annotations: {', '.join(sorted(known)) or 'none'}")  # fmt: skip


def _lines(path: Path, errors: str) -> Iterator[str]:
    """Yield the lines of a text, whose whole need not fit into memory."""
    rest = ""
    for block in _text_blocks(path, errors):
        *lines, rest = (rest + block).split("\n")
        yield from lines
    yield rest


# ---- tables

Reader = Callable[[Path, str, ReadOptions], Iterator[Document]]
READERS: dict[str, Reader] = {".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".parquet": _read_parquet,
                             **dict.fromkeys(fasta.SUFFIXES, _read_fasta)}  # fmt: skip
COMPRESSIONS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    ".gz": lambda file: cast("BinaryIO", gzip.GzipFile(fileobj=file)),
    ".zst": lambda file: ZstdFile.buffered(file, require("zstandard")),
}


def compression(path: Path) -> Callable[[BinaryIO], BinaryIO] | None:
    """Return what decompresses a file; None if its suffix is of no compression."""
    return COMPRESSIONS.get(path.suffix.lower())


def open_text_file(path: Path) -> BinaryIO:
    """Open a file of a corpus.

    Raises:
        ValueError: as `open_file`.
    """
    try:
        return open_file(path)
    except ValueError as error:
        raise ValueError(f"text file {error}") from None


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a file through its decompression; a failure while it is read is a ValueError."""
    with open_text_file(path) as raw:
        decompress = compression(path)
        try:
            yield raw if decompress is None else decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            expected = "a readable file" if decompress is None else f"a complete {path.suffix} file"
            raise ValueError(f"text file {path}: got {error}, expected {expected}") from None
