"""Values of settings: from TOML, from the text of a flag, and back to TOML.

A type ("kind") is int, float, str, bool, torch.dtype, None, `tuple[X, ...]`, `tuple[X, Y]`, `dict[str, Any]`, or a
union of these. TOML has neither None nor dtypes: they are the strings "none" and "float32". A flag of a tuple takes
several words; a flag of a dict takes a JSON object, in which null stands for an entry that is left out.
"""

from __future__ import annotations

import json
import types
import typing
from typing import Any

import torch

NONE = "none"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false", types.NoneType: NONE}


def members(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union, None first, as "none" could be text too; a type alone is its only member."""
    is_union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return tuple(sorted(typing.get_args(kind), key=lambda k: k is not types.NoneType)) if is_union else (kind,)


def tuple_kind(kind: Any) -> Any:
    """Return the tuple among the members of a type, or None."""
    return next((member for member in members(kind) if typing.get_origin(member) is tuple), None)


def from_toml(kind: Any, value: Any) -> Any:
    """Return a value of TOML as one of this type; a plain value stands for a tuple of one.

    Raises:
        ValueError: the value has another type.
    """
    return _first(kind, value, is_text=False)


def from_text(kind: Any, text: str | list[str]) -> Any:
    """Return the text of a flag, or the words of a flag that takes several, as a value of this type.

    Raises:
        ValueError: the text is not one of this type.
    """
    return _first(kind, text, is_text=True)


def _first(kind: Any, value: Any, *, is_text: bool) -> Any:
    for member in members(kind):
        try:
            return _convert(member, value, is_text=is_text)
        except (ValueError, TypeError):
            continue
    raise ValueError


def _convert(kind: Any, value: Any, *, is_text: bool) -> Any:
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(
            _first(item_kind, item, is_text=is_text)
            for item_kind, item in zip(_item_kinds(kind, len(items)), items, strict=True)
        )
    if typing.get_origin(kind) is dict:
        table = json.loads(value) if is_text else value
        return {k: v for k, v in table.items() if v is not None} if isinstance(table, dict) else _refuse()
    if isinstance(value, list):
        (value,) = value  # a flag that takes several words got one
    if kind is types.NoneType:
        return {NONE: None}[value] if value == NONE else _refuse()
    if kind is torch.dtype:
        return DTYPES[value] if value in DTYPES else _refuse()
    if kind is bool and is_text:
        return {"true": True, "false": False}[value] if value in ("true", "false") else _refuse()
    if kind in (int, float) and is_text:
        return kind(value)
    if kind is float and type(value) is int:
        return float(value)
    return value if type(value) is kind else _refuse()


def _refuse() -> typing.NoReturn:
    raise ValueError


def _item_kinds(kind: Any, count: int) -> tuple[Any, ...]:
    kinds = typing.get_args(kind)
    return (kinds[0],) * count if kinds[-1] is Ellipsis else kinds


def has_kind(kind: Any, value: Any) -> bool:
    """Return whether a Python value is of this type; an int is a float, True is no int."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return any(has_kind(member, value) for member in members(kind))
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = _item_kinds(kind, len(value))
        return len(kinds) == len(value) and all(map(has_kind, kinds, value))
    if typing.get_origin(kind) is dict:
        return isinstance(value, dict)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def expected_kind(kind: Any) -> str:
    """Describe a type in words: "an integer, or none"."""
    return " or ".join(
        [
            *(_words(member) for member in members(kind) if member is not types.NoneType),
            *([NONE] if types.NoneType in members(kind) else []),
        ]
    )


def _words(kind: Any) -> str:
    if kind is torch.dtype:
        return f"one of {', '.join(DTYPES)}"
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        item = expected_kind(kinds[0])
        return f"a list ({item} each)" if kinds[-1] is Ellipsis else f"a list of {len(kinds)} ({item} each)"
    if typing.get_origin(kind) is dict:
        return "a table of values"
    return WORDS[kind]


def show(value: Any, *, quoted: bool = True) -> str:
    """Return a value in TOML's spelling; without `quoted` text is bare, as on a command line."""
    if value is None:
        value = NONE
    if isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False) if quoted else value
    if isinstance(value, dict) and quoted:
        return "{" + ", ".join(f"{name} = {show(item)}" for name, item in value.items()) + "}"
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(show(item, quoted=quoted) for item in value) + "]"
    return repr(value)
