"""Text to train on: the running Python's standard library, or the user's files, split into train and validation.

A file belongs to one of the two splits, so that no line of validation text has neighboring lines in the training text.
Files are chosen by a hash of their names: the same files give the same split on every machine.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from peakgpt.engine.data.text_file import read_bytes

TEXT_SUFFIXES = (".py", ".txt", ".rst", ".md")  # in folders; a file that the user names may have any suffix
# Tests and character tables contain data rather than text; site-packages differs between machines.
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "encodings", "test", "tests", "idle_test"}
SKIPPED_PREFIXES = (".", "_sysconfigdata")  # _sysconfigdata contains build paths of this machine
VALIDATION_SHARE = 0.07  # maximum share of all bytes
MAX_VALIDATION_FILE = 0.01  # of all bytes, so that validation has many files instead of a long one


@dataclass(frozen=True)
class Document:
    """One file, or one split of a single file: its name relative to the corpus, and its text."""

    name: str
    text: str

    @cached_property
    def size_bytes(self) -> int:
        return len(self.text.encode())


@dataclass(frozen=True)
class Corpus:
    """The documents of both splits, sorted by name; `digest` is the SHA-256 (hex) of all names and contents."""

    train: Sequence[Document]
    validation: Sequence[Document]
    digest: str

    @cached_property
    def train_bytes(self) -> int:
        return sum(document.size_bytes for document in self.train)

    @cached_property
    def validation_bytes(self) -> int:
        return sum(document.size_bytes for document in self.validation)

    def __str__(self) -> str:
        total = self.train_bytes + self.validation_bytes
        return (
            f"{len(self.train)} training and {len(self.validation)} validation texts, {total / 1e6:.2f} MB, "
            f"{self.validation_bytes / total:.1%} for validation, digest {self.digest[:12]}"
        )


def load_corpus(files: Iterable[Path | str] | None = None) -> Corpus:
    """Read text and split it.

    Args:
        files: UTF-8 files, and folders, which are searched for non-empty files with one of TEXT_SUFFIXES. None: the
            standard library of the running Python, about 11 MB.
    Returns:
        The corpus. A single file is split by position, at the end of a line if there is one.
    Raises:
        ValueError: there is no file, or a file is empty, unreadable, binary or not UTF-8.
    """
    documents = _standard_library() if files is None else _user_documents([Path(file) for file in files])
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.name.encode(), document.text.encode()):
            digest.update(len(part).to_bytes(8, "little") + part)  # the length separates ("ab", "c") from ("a", "bc")
    train, validation = _split_text(documents[0]) if len(documents) == 1 else _split_files(documents)
    return Corpus(train, validation, digest.hexdigest())


def _standard_library() -> list[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in _walk(root, SKIPPED_FOLDERS):
        try:
            documents.append(Document(path.relative_to(root).as_posix(), _read(path)))
        except ValueError:
            continue  # an empty __init__.py, or a file that a distributor added: not the user's mistake
    if not documents:
        raise ValueError(f"standard library {root}: got no source files, expected some; pass text files of your own")
    return sorted(documents, key=lambda document: document.name)


def _user_documents(files_and_folders: list[Path]) -> list[Document]:
    paths = set()
    for path in files_and_folders:
        files = [p for p in _walk(path, {"__pycache__"}) if p.stat().st_size] if path.is_dir() else [path]
        if not files:
            raise ValueError(f"folder {path}: got no text in it, expected files ending in {', '.join(TEXT_SUFFIXES)}")
        paths.update(Path(os.path.abspath(p)) for p in files)
    if not paths:
        raise ValueError("corpus: got no files, expected at least one text file or folder")
    root = os.path.commonpath([path.parent for path in paths])
    return [Document(path.relative_to(root).as_posix(), _read(path)) for path in sorted(paths)]


def _walk(root: Path, skipped: set[str]) -> list[Path]:
    """Return the text files below a folder, except in hidden and skipped folders."""
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        paths += [
            Path(folder, name)
            for name in names
            if name.endswith(TEXT_SUFFIXES) and not name.startswith(SKIPPED_PREFIXES)
        ]
    return paths


def _read(path: Path) -> str:
    try:
        data = read_bytes(path)
    except ValueError as error:
        raise ValueError(f"text file {error}") from None
    if not data:
        raise ValueError(f"text file {path}: got an empty file, expected UTF-8 text")
    if b"\0" in data:
        raise ValueError(f"text file {path}: got a binary file (NUL at byte {data.index(0)}), expected UTF-8 text")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        got = f"byte 0x{data[error.start]:02x} at position {error.start}"
        raise ValueError(f"text file {path}: got {got}, which is not UTF-8, expected UTF-8 text") from None


def _split_files(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Visit the files in the order of their names' hashes; small ones become validation text up to its share."""
    total = sum(document.size_bytes for document in documents)
    validation, validation_bytes = set(), 0
    for document in sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest()):
        size = document.size_bytes
        if size <= MAX_VALIDATION_FILE * total and validation_bytes + size <= VALIDATION_SHARE * total:
            validation.add(document.name)
            validation_bytes += size
    if not validation:  # few files, each a large part of the corpus
        validation.add(min(documents, key=lambda d: (d.size_bytes, d.name)).name)
    return [d for d in documents if d.name not in validation], [d for d in documents if d.name in validation]


def _split_text(document: Document) -> tuple[list[Document], list[Document]]:
    """Cut one text near the start of its validation share.

    The cut is after the last line end before that position, else after the first line end after it. Without line ends
    the same rule applies to spaces, else the cut is at the position itself. Line ends in the first half of the text do
    not count: if the text were a title and one endless line, almost nothing would be left to train on.
    """
    text = document.text
    if len(text) < 2:
        raise ValueError(f"text file {document.name}: got {len(text)} character, expected at least 2 to split")
    cut = max(1, int(len(text) * (1 - VALIDATION_SHARE)))
    for mark in ("\n", " "):
        position = text.rfind(mark, len(text) // 2, cut)
        position = position if position >= 0 else text.find(mark, cut, len(text) - 1)
        if position >= 0:
            cut = position + 1
            break
    return [Document(document.name, text[:cut])], [Document(document.name, text[cut:])]
