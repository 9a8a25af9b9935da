"""The rows of fine-tuning data: JSON objects that know their file and line, which every error names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peakgpt.engine.data.documents import json_records


@dataclass(frozen=True)
class Row:
    """An object of a file of JSON lines.

    Args:
        place: file and line, such as "reviews.jsonl:17".
        values: the fields.
    """

    place: str
    values: Mapping[str, Any]

    def error(self, problem: str) -> ValueError:
        """Return an error to raise; `problem` says what was got and expected."""
        return ValueError(f"{self.place}: {problem}")

    def text(self, name: str) -> str:
        """Return the text of a field.

        Raises:
            ValueError: the field is missing, is not text, or has a character that UTF-8 cannot hold.
        """
        value = self.values.get(name)
        if not isinstance(value, str):
            got = f"{name}={value!r:.40}" if name in self.values else f"fields {', '.join(self.values):.200}"
            raise self.error(f"got {got}, expected text in {name!r}")
        return self.checked(name, value)

    def checked(self, name: str, text: str) -> str:
        """Return a text that UTF-8 can hold.

        Raises:
            ValueError: a lone surrogate, which JSON can hold.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            got = f"the lone surrogate U+{ord(text[error.start]):04X} in {name!r}"
            raise self.error(f"got {got}, expected text that UTF-8 can hold") from None
        return text


def read_rows(paths: Iterable[str]) -> list[Row]:
    """Read files of JSON lines, plain or compressed.

    Raises:
        ValueError: a file is missing, empty or damaged, or a line is not a JSON object.
    """
    rows: list[Row] = []
    for path in paths:
        found = [Row(f"{path}:{number}", values) for number, values in json_records(Path(path))]
        if not found:
            raise ValueError(f"{path}: got blank lines alone, expected a JSON object a line")
        rows += found
    return rows
