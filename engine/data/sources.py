"""The sources of a corpus that a user names: files, folders, and data sets of Hugging Face.

    a file       any regular file; its suffix says how it is read, see documents.py
    a folder     its files with a known suffix, and those of its folders; not hidden ones, not empty ones
    hf:NAME      a data set by name or folder, also hf:NAME:CONFIG and hf:NAME:CONFIG:SPLIT (default split: train)

A source can be iterated more than once, and yields the same documents in the same order each time.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from peakgpt.engine.data.documents import READERS, Document, ReadOptions, content_suffix, read_documents
from peakgpt.engine.data.hugging_face import PREFIX, HuggingFaceDataset

PROSE_SUFFIXES = (".py", ".txt", ".rst", ".md")
CODE_SUFFIXES = (".bash", ".c", ".cc", ".cl", ".cpp", ".cs", ".cu", ".cuh", ".cxx", ".f90", ".go", ".h", ".hpp", ".hs",
                 ".java", ".jl", ".js", ".jsx", ".kt", ".lua", ".m", ".ml", ".php", ".pl", ".pyi", ".pyx", ".r", ".rb",
                 ".rs", ".scala", ".sh", ".sql", ".swift", ".tex", ".ts", ".tsx", ".zig")  # fmt: skip
FOLDER_SUFFIXES = (*PROSE_SUFFIXES, *CODE_SUFFIXES, *READERS)  # each also with a suffix of COMPRESSIONS
# Tests and character tables contain data rather than text; site-packages differs between machines.
SKIPPED_IN_LIBRARY = {"__pycache__", "site-packages", "dist-packages", "encodings", "test", "tests", "idle_test"}
SKIPPED_PREFIXES = (".", "_sysconfigdata")  # _sysconfigdata contains build paths of this machine


class Source(Protocol):
    """Documents in a fixed order."""

    rereadable: bool  # whether reading twice is cheap and gives the same documents
    places: Collection[str]  # files, behind links too, or other places that the documents come from

    def __iter__(self) -> Iterator[Document]: ...


@dataclass(frozen=True)
class FileSource:
    """The documents of files.

    Args:
        files: (path, name in the corpus), in the order of their names.
        options: how they are read.
    """

    files: Sequence[tuple[Path, str]]
    options: ReadOptions
    rereadable = True

    @property
    def places(self) -> list[str]:
        return [os.path.realpath(path) for path, _ in self.files]

    def __iter__(self) -> Iterator[Document]:
        for path, name in self.files:
            yield from read_documents(path, name, self.options)


def open_sources(names: Iterable[Path | str], options: ReadOptions) -> list[Source]:
    """Find the files of sources. Files come first, sorted by their names; then data sets in the given order.

    Raises:
        ValueError: there is no source, a folder has no text, or a file or data set is named twice.
    """
    names = [str(name) for name in names]
    files = find_files([Path(name) for name in names if not name.startswith(PREFIX)])
    datasets = [name for name in names if name.startswith(PREFIX)]
    if twice := sorted({name for name in datasets if datasets.count(name) > 1}):
        raise ValueError(f"corpus: got {twice[0]} twice, expected each source once")
    sources: list[Source] = [FileSource(files, options)] if files else []
    sources += [HuggingFaceDataset(name, options) for name in datasets]
    if not sources:
        raise ValueError("corpus: got no files, expected at least one text file or folder")
    return sources


def find_files(files_and_folders: Sequence[Path]) -> list[tuple[Path, str]]:
    """Return (path, name) of the files of a corpus; a name is relative to the folder that all files share.

    Raises:
        ValueError: a folder has no text or cannot be read, or a file is named twice.
    """
    paths: set[Path] = set()
    for path in files_and_folders:
        found = [p for p in walk(path, {"__pycache__"}) if _size(p)] if path.is_dir() else [path]
        if not found:
            raise ValueError(f"folder {path}: got no text in it, expected files ending in {', '.join(PROSE_SUFFIXES)}, "
                             f"of program code, or in {', '.join(READERS)}")  # fmt: skip
        absolute = {Path(os.path.abspath(p)) for p in found}
        if twice := sorted(absolute & paths):
            raise ValueError(f"corpus: got {twice[0]} twice, expected each source once")
        paths |= absolute
    if not paths:
        return []
    root = os.path.commonpath([path.parent for path in paths])
    # A name that is not UTF-8, such as b"caf\xe9.txt", is written with escapes, because names are hashed and saved.
    names = {path: os.fsencode(path.relative_to(root)).decode("utf-8", "backslashreplace") for path in paths}
    return [(path, names[path]) for path in sorted(paths)]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:  # such as a link to a file that was deleted
        raise ValueError(f"text file {path}: got {error.strerror}, expected a file") from None


def walk(root: Path, skipped: set[str], suffixes: Sequence[str] = FOLDER_SUFFIXES) -> list[Path]:
    """Return the text files below a folder, except in hidden and skipped folders. Links to folders are not followed.

    Raises:
        ValueError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"folder {error.filename}: got {error.strerror}, expected a folder to read") from None

    paths = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        paths += [
            Path(folder, name)
            for name in names
            if content_suffix(Path(name)) in suffixes and not name.startswith(SKIPPED_PREFIXES)
        ]
    return paths


@dataclass(frozen=True)
class StandardLibrary:
    """The source of the running Python's standard library, about 11 MB of code and prose."""

    rereadable = True
    places = ("the standard library",)

    def __iter__(self) -> Iterator[Document]:
        """
        Raises:
            ValueError: there are no source files, as in some minimal installations.
        """
        root, found = Path(sysconfig.get_path("stdlib")), False
        paths = {path.relative_to(root).as_posix(): path for path in walk(root, SKIPPED_IN_LIBRARY, PROSE_SUFFIXES)}
        for name in sorted(paths):
            try:
                [document] = read_documents(paths[name], name, ReadOptions())
                text = document.text
            except ValueError:
                continue  # an empty __init__.py, or a file that a distributor added: not the user's mistake
            found = True
            yield Document.of(name, text)
        if not found:
            raise ValueError(f"standard library {root}: got no source files, expected some; pass files of your own")


