"""Checks of the values of a request: (value, limits) -> parsed value, or ValueError with the expected value."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from peakgpt.engine.inference.sampling_params import MIN_TEMPERATURE
from peakgpt.serve.limits import Limits

Check = Callable[[Any, Limits], Any]


class Unsupported(ValueError):
    """OpenAI knows the field or value, this server does not support it."""


def expected(description: str) -> Any:
    """Refuse a value."""
    raise ValueError(description)


def unsupported(reason: str) -> Check:
    """Refuse every value."""

    def check(value, limits):
        raise Unsupported(f"nothing: {reason}")

    return check


def number(low: float, high: float) -> Check:
    def check(value, limits):
        good = type(value) in (int, float) and low <= value <= high
        return float(value) if good else expected(f"a number from {low} to {high}")

    return check


def temperature(value: Any, limits: Limits) -> float:
    """Check a temperature. 0 is greedy; much less than 0.001 overflows the logits."""
    parsed = number(0, 2)(value, limits)
    description = f"0, or a number from {MIN_TEMPERATURE} to 2"
    return parsed if parsed == 0 or parsed >= MIN_TEMPERATURE else expected(description)


def integer(low: int, high: int | str) -> Check:
    def check(value, limits):
        most = getattr(limits, high) if isinstance(high, str) else high
        return value if type(value) is int and low <= value <= most else expected(f"an integer from {low} to {most}")

    return check


def boolean(value: Any, limits: Limits) -> bool:
    return value if type(value) is bool else expected("true or false")


def text(value: Any, limits: Limits) -> str:
    return value if isinstance(value, str) else expected("a string")


def strings(count: str, chars: str) -> Check:
    def check(value, limits):
        values = [value] if isinstance(value, str) else value
        most, longest = getattr(limits, count), getattr(limits, chars)
        good = isinstance(values, list) and len(values) <= most
        if not good or not all(isinstance(s, str) and 0 < len(s) <= longest for s in values):
            expected(f"up to {most} strings of 1 to {longest} characters")
        return tuple(values)

    return check


def bias(value: Any, limits: Limits) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > limits.bias:
        expected(f"an object of up to {limits.bias} token ids")
    if not all(re.fullmatch(r"[0-9]{1,9}", key) for key in value):
        expected("token ids as keys")
    biases = {int(key): number(-100, 100)(bias, limits) for key, bias in value.items()}
    return biases if len(biases) == len(value) else expected("each token id once")


def prompts(value: Any, limits: Limits) -> list[str | list[int]]:
    """Check one or many prompts, each a string or a list of ids."""
    many = value if isinstance(value, list) and value and not isinstance(value[0], int) else [value]
    if not 0 < len(many) <= limits.prompts:
        expected(f"up to {limits.prompts} prompts")
    for prompt in many:
        in_limit = isinstance(prompt, list) and 0 < len(prompt) <= limits.prompt_tokens
        if not isinstance(prompt, str) and not (in_limit and all(type(i) is int for i in prompt)):
            expected(f"strings, or lists of 1 to {limits.prompt_tokens} token ids")
    return many


def stream_options(value: Any, limits: Limits) -> bool:
    good = isinstance(value, dict) and value.keys() <= {"include_usage"}
    return boolean(value.get("include_usage", False), limits) if good else expected("an object of include_usage")
