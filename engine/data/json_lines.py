"""JSON lines: one object a line. A new file appears when it is complete."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from peakgpt.engine.data.documents import Document
from peakgpt.kernels.files import atomic_file


def parse_json(place: str, text: str) -> Any:
    """Parse JSON.

    Args:
        place: of the text, such as "qa.jsonl:3", for the message.
    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: got {error}, expected JSON") from None


class JsonLines:
    """A file that is being written."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._path = file, path

    def write(self, row: Mapping[str, Any]) -> None:
        """Write an object."""
        self._put(f"{json.dumps(row, ensure_ascii=False)}\n")

    def write_document(self, document: Document) -> None:
        """Write {"name": ..., "text": ...}, whose text may be longer than fits into memory."""
        self._put(f'{{"name": {json.dumps(document.name, ensure_ascii=False)}, "text": "')
        for block in document.blocks():
            self._put(json.dumps(block, ensure_ascii=False)[1:-1])
        self._put('"}\n')

    def _put(self, text: str) -> None:
        try:
            self._file.write(text.encode())
        except OSError as error:
            raise _not_written(self._path, error) from None


@contextmanager
def new_json_lines(path: Path) -> Iterator[JsonLines]:
    """Open a new file, which appears at the end of the block.

    Raises:
        ValueError: there is a file of that name, its folder is missing, or it cannot be written.
    """
    if path.exists():
        raise ValueError(f"{path}: got an existing file, expected a new one")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: got no folder {path.parent}, expected one to write into")
    try:
        with atomic_file(path) as file:
            yield JsonLines(file, path)
    except OSError as error:
        raise _not_written(path, error) from None


def _not_written(path: Path, error: OSError) -> ValueError:
    return ValueError(f"{path}: got {error.strerror or error}, expected a file that can be written")
