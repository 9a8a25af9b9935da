"""What all command lines of peakgpt share: the parser, the types of numeric flags, and the refusal of ignored flags."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from typing import Any

MAX_COUNT = 2**31 - 1
MAX_SEED = 2**64 - 1
MAX_NUMBER = 1e9


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that accepts no abbreviated flag. Its subparsers are of the same class.

    Attributes:
        other_name: returns what is said about an unknown flag (its name without dashes) that is known elsewhere.
    """

    other_name: Callable[[str], str | None] | None = None

    def __init__(self, *args: Any, allow_abbrev: bool = False, **options: Any):
        super().__init__(*args, allow_abbrev=allow_abbrev, **options)


def integer(low: int = 1, high: int = MAX_COUNT) -> Callable[[str], int]:
    """Return the type of a flag that takes an integer from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text[:40]!r}, expected an integer") from None
        if not low <= value <= high:
            expected = f"at least {low}" if value < low else f"at most {high}"
            raise argparse.ArgumentTypeError(f"is {value}, expected {expected}")
        return value

    return parse


def number(above: float = 0.0, high: float = MAX_NUMBER, *, or_equal: bool = False) -> Callable[[str], float]:
    """Return the type of a flag that takes a finite number above `above`, or equal to it, and at most `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text[:40]!r}, expected a number") from None
        if math.isnan(value) or value < above or (value == above and not or_equal):
            raise argparse.ArgumentTypeError(
                f"is {value}, expected {'at least' if or_equal else 'more than'} {above:g}"
            )
        if value > high:
            raise argparse.ArgumentTypeError(f"is {value}, expected at most {high:g}")
        return value

    return parse


def refuse_ignored(args: argparse.Namespace, names: Iterable[str], reason: str) -> None:
    """Refuse flags that a mode of a command would ignore.

    Args:
        args: parsed flags; the default of each name is None.
        names: attributes of `args`, such as "top_k".
        reason: completes the sentence "--top-k: got it ...".
    Raises:
        ValueError: one of the flags was given.
    """
    for name in names:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: got it {reason}")
