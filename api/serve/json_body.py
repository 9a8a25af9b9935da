"""Read the JSON of a request: strict, and bounded before json.loads sees it."""

from __future__ import annotations

import json
import re
from typing import Any

from peakgpt.serve.errors import BadRequest
from peakgpt.serve.limits import Limits

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse(body: bytes, limits: Limits) -> dict[str, Any]:
    """Read the body of a request, a JSON object in UTF-8; see `load`.

    Raises:
        BadRequest: the body is something else.
    """
    try:
        data = load(body.decode(), limits)
    except (ValueError, RecursionError) as error:  # UnicodeError is a ValueError
        reason = "a lone surrogate" if isinstance(error, UnicodeEncodeError) else str(error)
        raise BadRequest(f"body: got {reason}, expected JSON in UTF-8", code="invalid_json") from None
    if not isinstance(data, dict):
        raise BadRequest(f"body: got {type(data).__name__}, expected a JSON object", code="invalid_json")
    return data


def load(text: str, limits: Limits) -> Any:
    """Read JSON without NaN, infinities, repeated keys, lone surrogates or deep nesting.

    Raises:
        ValueError, RecursionError: the text is something else.
    """
    _check_nesting(text, limits)
    data = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    if _SURROGATE.search(text):
        json.dumps(data, ensure_ascii=False).encode()
    return data


def _check_nesting(text: str, limits: Limits) -> None:
    """Count the brackets and keys outside of strings. json.loads needs half a second for a megabyte of them."""
    plain = "".join(text.replace("\\\\", "").replace('\\"', "").split('"')[::2])
    if (keys := plain.count(":")) > limits.json_keys:
        raise ValueError(f"{keys} keys, expected up to {limits.json_keys}")
    if max(map(plain.count, "[]{}")) > limits.json_containers:
        raise ValueError(f"more than {limits.json_containers} objects and lists or {limits.json_depth} levels")
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", plain):
        depth += 1 if bracket in "[{" else -1
        if depth > limits.json_depth:
            raise ValueError(f"more than {limits.json_depth} levels")


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(unique := dict(pairs)) < len(pairs):
        raise ValueError("a key twice in one object")
    return unique
