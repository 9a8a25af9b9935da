"""Text to train on: the running Python's standard library, or the user's files, split into train and validation.

Whole files go to one side or the other, so that no line of validation text was seen next to its neighbours in
training. The order is a hash of each file's name: the same files give the same split on every machine.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

TEXT_SUFFIXES = (".py", ".txt", ".rst", ".md")  # looked for in folders; a file named outright may have any suffix
# Tests and character tables are data more than text; site-packages differs from machine to machine.
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "encodings", "test", "tests", "idle_test"}
SKIPPED_PREFIXES = (".", "_sysconfigdata")  # the second holds the machine's own build paths
VALIDATION_SHARE = 0.07  # of all bytes; files are taken while they fit under it
MAX_VALIDATION_FILE = 0.01  # of all bytes: validation is many files rather than one long one


@dataclass(frozen=True)
class Document:
    """One file (or one side of a file that was split): its name relative to the corpus, and its text."""

    name: str
    text: str

    @cached_property
    def size_bytes(self) -> int:
        return len(self.text.encode())


@dataclass(frozen=True)
class Corpus:
    """Documents sorted by name; `digest` is the sha256 (hex) over all names and contents."""

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
        files: UTF-8 files, or folders searched for TEXT_SUFFIXES (empty files in them are passed over);
            None takes the standard library of the running Python, about 11 MB.
    Returns:
        Corpus; a single file is split by position, at a line boundary where there is one.
    Raises:
        ValueError: no file, an empty one, or one that is unreadable, binary or not UTF-8.
    """
    documents = _standard_library() if files is None else _user_documents([Path(file) for file in files])
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.name.encode(), document.text.encode()):
            digest.update(len(part).to_bytes(8, "little") + part)  # the length keeps ("ab", "c") apart from ("a", "bc")
    train, validation = _split_text(documents[0]) if len(documents) == 1 else _split_files(documents)
    return Corpus(train, validation, digest.hexdigest())


def _standard_library() -> list[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in _walk(root, SKIPPED_FOLDERS):
        try:
            documents.append(Document(path.relative_to(root).as_posix(), _read(path)))
        except ValueError:
            continue  # an empty __init__.py, or what a distributor added: not the user's mistake
    if not documents:
        raise ValueError(f"standard library {root}: got no source files, expected some; name text files of your own")
    return sorted(documents, key=lambda document: document.name)


def _user_documents(given: list[Path]) -> list[Document]:
    paths = set()
    for path in given:
        found = [p for p in _walk(path, {"__pycache__"}) if p.stat().st_size] if path.is_dir() else [path]
        if not found:
            raise ValueError(f"folder {path}: got no text in it, expected files ending in {', '.join(TEXT_SUFFIXES)}")
        paths.update(Path(os.path.abspath(p)) for p in found)
    if not paths:
        raise ValueError("corpus: got no files, expected at least one text file or folder")
    root = os.path.commonpath([path.parent for path in paths])
    return [Document(path.relative_to(root).as_posix(), _read(path)) for path in sorted(paths)]


def _walk(root: Path, skipped: set[str]) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        found += [
            Path(folder, name)
            for name in names
            if name.endswith(TEXT_SUFFIXES) and not name.startswith(SKIPPED_PREFIXES)
        ]
    return found


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"text file {path}: got {error.strerror or error}, expected a readable file") from None
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
    """Walk the files in the order of their names' hashes and keep for validation what fits under its share."""
    total = sum(document.size_bytes for document in documents)
    chosen, held = set(), 0
    for document in sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest()):
        if (
            document.size_bytes <= MAX_VALIDATION_FILE * total
            and held + document.size_bytes <= VALIDATION_SHARE * total
        ):
            chosen.add(document.name)
            held += document.size_bytes
    if not chosen:  # few files, each a large part of the whole
        chosen.add(min(documents, key=lambda d: (d.size_bytes, d.name)).name)
    return [d for d in documents if d.name not in chosen], [d for d in documents if d.name in chosen]


def _split_text(document: Document) -> tuple[list[Document], list[Document]]:
    """Cut one text at the last line end before the validation share, else the first after it, else a blank, else there.

    Line ends in the first half do not count: a title above one endless line would leave nothing to train on.
    """
    text = document.text
    if len(text) < 2:
        raise ValueError(f"text file {document.name}: got {len(text)} character, expected at least 2 to split")
    cut = max(1, int(len(text) * (1 - VALIDATION_SHARE)))
    for mark in ("\n", " "):
        at = text.rfind(mark, len(text) // 2, cut)
        at = at if at >= 0 else text.find(mark, cut, len(text) - 1)
        if at >= 0:
            cut = at + 1
            break
    return [Document(document.name, text[:cut])], [Document(document.name, text[cut:])]
