"""Write JSON lines: one object a line, in a new file that appears when it is complete."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from peakgpt.engine.data.documents import Document
from peakgpt.kernels.files import atomic_file


class JsonLines:
    """A file that is being written."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def write(self, row: Mapping[str, Any]) -> None:
        """Write an object."""
        self._file.write(f"{json.dumps(row, ensure_ascii=False)}\n".encode())

    def write_document(self, document: Document) -> None:
        """Write {"name": ..., "text": ...}, whose text may be longer than fits into memory."""
        self._file.write(f'{{"name": {json.dumps(document.name, ensure_ascii=False)}, "text": "'.encode())
        for block in document.blocks():
            self._file.write(json.dumps(block, ensure_ascii=False)[1:-1].encode())
        self._file.write(b'"}\n')


@contextmanager
def new_json_lines(path: Path) -> Iterator[JsonLines]:
    """Open a new file, which appears at the end of the block.

    Raises:
        ValueError: there is a file of that name, or its folder is missing.
    """
    if path.exists():
        raise ValueError(f"{path}: got an existing file, expected a new one")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: got no folder {path.parent}, expected one to write into")
    with atomic_file(path) as file:
        yield JsonLines(file)
