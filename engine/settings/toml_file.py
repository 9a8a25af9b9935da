"""TOML files of settings: one table for each section, one key for each setting."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from peakgpt.engine.settings.setting import Setting
from peakgpt.engine.settings.values import show

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(
    path: Path, text: str, settings: Mapping[str, Setting], other_name: Callable[[str], str | None] = lambda name: None
) -> dict[str, Any]:
    """Read the values of some settings.

    Args:
        path: of the file, which errors name.
        text: of the file.
        settings: the known ones, by name.
        other_name: what is said about an unknown key that another library has.
    Returns:
        The values by name, converted and checked one by one.
    Raises:
        ValueError: not TOML, an unknown table or key, a key in another table than its own, or a bad value.
    """
    values = {}
    for section, table in _tables(path, text).items():
        if section not in {setting.section for setting in settings.values()}:
            raise ValueError(f"{path}: {_unknown(section, settings, other_name)}")
        if not isinstance(table, dict):
            raise ValueError(f"{path}: {section} is {table!r}, expected a table [{section}]")
        for name, value in table.items():
            if name not in settings:
                raise ValueError(f"{path}: [{section}] {_unknown(name, settings, other_name)}")
            if settings[name].section != section:
                raise ValueError(f"{path}: got {name} in [{section}], expected it in [{settings[name].section}]")
            try:
                values[name] = settings[name].read(value)
            except ValueError as error:
                raise ValueError(f"{path}: [{section}] {name} {error}") from None
    return values


def write_toml(values: Mapping[str, Any], settings: Iterable[Setting], comments: Mapping[str, str]) -> str:
    """Return the text of a file that `read_toml` reads.

    Args:
        values: by name; a setting without a value is left out.
        settings: in the order of the file.
        comments: name -> text behind a value.
    """
    lines: list[str] = []
    section = None
    for setting in settings:
        if setting.name not in values:
            continue
        if setting.section != section:
            section = setting.section
            lines += ["", f"[{section}]"]
        comment = f"  # {comments[setting.name]}" if setting.name in comments else ""
        lines.append(f"{setting.name} = {show(values[setting.name])}{comment}")
    return "\n".join(lines[1:]) + "\n"


def unknown_name(name: str, known: Iterable[str], other_name: Callable[[str], str | None]) -> str:
    """Return what to use instead of an unknown name: our name of another library's, or the nearest known one."""
    if (ours := other_name(name)) is not None:
        return ours
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"expected {nearest[0]}" if nearest else "expected a key of docs/training.md"


def _unknown(name: str, settings: Mapping[str, Setting], other_name: Callable[[str], str | None]) -> str:
    if name in settings:
        return f"got {name} outside of a table, expected it in [{settings[name].section}]"
    known = [*settings, *(setting.section for setting in settings.values())]
    return f"got unknown {name}, {unknown_name(name, known, other_name)}"


def _tables(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}, expected a TOML file") from None
