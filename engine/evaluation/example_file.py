"""Read the examples of an evaluation file, to compare their texts with a training corpus.

    .jsonl .ndjson    one example a line, an object: one of its fields, or all its texts
    .json             a list of such objects, or a prompt file: its input, and each of its examples
    a task            the examples of task_file.py, without the fields of the task
    any other         one example a line
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peakgpt.engine.data.json_lines import parse_json
from peakgpt.engine.data.text_file import read_text
from peakgpt.engine.evaluation.task_file import is_header
from peakgpt.engine.inference.prompt_file import read_prompt_file


def read_examples(path: Path | str, field: str | None = None) -> list[tuple[str, str]]:
    """Read an evaluation file.

    Args:
        field: of an object, whose text is the example. None: all texts of the object, in their order.
    Returns:
        (name, text) pairs; a name is the path and the number of the line or the object.
    Raises:
        ValueError: the file cannot be read, is damaged, or an object lacks the field.
    """
    path = Path(path)
    try:
        text = read_text(path)
    except ValueError as error:
        raise ValueError(f"evaluation file {error}") from None
    if path.suffix in (".jsonl", ".ndjson"):
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [(number, parse_json(f"evaluation file {path}:{number}", line)) for number, line in lines]
        rows = rows[1:] if rows and isinstance(rows[0][1], dict) and is_header(rows[0][1]) else rows
        return [(f"{path}:{number}", _text(path, number, row, field)) for number, row in rows]
    if path.suffix == ".json":
        value = parse_json(f"evaluation file {path}:1", text)
        if isinstance(value, dict) and _are_objects(value.get("examples")):
            value = value["examples"]
        if isinstance(value, list):
            return [(f"{path}:{number}", _text(path, number, row, field)) for number, row in enumerate(value, 1)]
    if field is not None:
        raise ValueError(f"evaluation file {path}: got --eval-field {field!r}, expected it only for files of objects")
    if path.suffix == ".json":
        prompt = read_prompt_file(path)
        texts = ["\n".join(pair) for pair in prompt.examples]
        return [*((f"{path}:examples[{i}]", text) for i, text in enumerate(texts)), (f"{path}:input", prompt.input)]
    return [(f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _text(path: Path, number: int, row: Any, field: str | None) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"evaluation file {path}:{number}: got {type(row).__name__}, expected an object")
    if field is None:
        return all_texts(row)
    if not isinstance(row.get(field), str):
        raise ValueError(f"evaluation file {path}:{number}: got fields {', '.join(row)}, expected text in {field!r}")
    return row[field]


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def all_texts(row: Any) -> str:
    """Return all texts of a value of JSON, one a line."""
    return "\n".join(_texts(row))


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts of a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
