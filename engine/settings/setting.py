"""Declare the settings of a run: `setting(default, help, section=...)` makes a field of a frozen dataclass.

    @dataclass(kw_only=True, frozen=True)
    class DataConfig:
        text: tuple[str, ...] | None = setting(None, "files to train on", section="data", metavar="FILE")

        def __post_init__(self) -> None:
            check_settings(self)

The field `text` is then the key `text` in the table [data] of a TOML file and the flag --text (flags.py, toml_file.py).
Types of fields: int, float, str, bool, torch.dtype, None, tuples and unions of these (values.py).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from peakgpt.engine.settings.values import expected_kind, from_text, from_toml, has_kind, show
from peakgpt.kernels.command_line import MAX_COUNT, MAX_NUMBER

METADATA = "setting"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One declared field.

    Args:
        name: of the field and of the TOML key; unique over all sections.
        kind: its type, resolved.
        default: its value if neither a file nor a flag gives one.
        help: one line, without the default.
        section: TOML table.
        at_least, above, at_most, below: range of a number, or of each number of a tuple.
        choices: allowed values, in TOML's spelling.
        metavar: stands for a value in the help.
        automatic: how a run chooses the value if none is given; it replaces `default` in the help.
        resumable: whether it may change when a run is resumed.
        only_with: name of another setting -> the values with which this one acts; None stands for any but 0 and none.
        is_path: whether a text is the path of a file or folder, which is made absolute.
        owner: name of the dataclass.
    """

    name: str
    kind: Any
    default: Any
    help: str
    section: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: Collection[str] | None = None
    metavar: str | None = None
    automatic: str | None = None
    resumable: bool = False
    only_with: Mapping[str, Collection[Any] | None] | None = None
    is_path: Callable[[str], bool] = lambda text: False
    owner: str = ""

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    def read(self, value: Any, *, is_text: bool = False) -> Any:
        """Return a value of TOML, or the text of a flag, as a value of the field.

        Raises:
            ValueError: wrong type, out of range, not a choice; the message "is 0, expected at least 1" has no name.
        """
        try:
            result = (from_text if is_text else from_toml)(self.kind, value)
        except ValueError:
            raise ValueError(f"is {_short(value)}, expected {self.expected}") from None
        self.check(result)
        return self._absolute(result)

    def check(self, value: Any) -> None:
        """Raise ValueError, with a message as in `read`, if the field cannot have this value."""
        if not has_kind(self.kind, value):
            raise ValueError(f"is {_short(value)}, expected {self.expected}")
        if self.choices is not None and value is not None and show(value, quoted=False) not in self.choices:
            raise ValueError(f"is {_short(value)}, expected {self.expected}")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                self._check_range(value, number)

    def obstacle(self, values: Mapping[str, Any]) -> tuple[str, str] | None:
        """Return which setting makes this one ignored, and what it should be; None if this one acts.

        Args:
            values: of all settings, by name.
        """
        for name, allowed in (self.only_with or {}).items():
            if not (values[name] if allowed is None else values[name] in allowed):
                return name, " or ".join(show(v, quoted=False) for v in allowed) if allowed else "set"
        return None

    @property
    def expected(self) -> str:
        """What the field can be, in words."""
        return f"one of {', '.join(self.choices)}" if self.choices else expected_kind(self.kind)

    def _absolute(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._absolute, value))
        is_path = isinstance(value, str) and self.is_path(value)
        return os.path.abspath(os.path.expanduser(value)) if is_path else value

    def _check_range(self, value: Any, number: float) -> None:
        if not math.isfinite(number):
            raise ValueError(f"is {number}, expected a finite number")
        at_most = self.at_most if self.at_most is not None else MAX_NUMBER if _has_float(self.kind) else MAX_COUNT
        bounds = (
            ("at least", self.at_least, lambda bound: number >= bound),
            ("more than", self.above, lambda bound: number > bound),
            ("below", self.below, lambda bound: number < bound),
            ("at most", at_most, lambda bound: number <= bound),
        )
        for words, bound, holds in bounds:
            if bound is not None and not holds(bound):
                raise ValueError(f"is {show(value, quoted=False)}, expected {words} {bound:.15g}")


def setting(default: Any, help: str, *, section: str, **options: Any) -> Any:  # noqa: A002 as in argparse
    """Declare a field of a frozen keyword-only dataclass.

    Args:
        default: of the field.
        help: one line for --help, config.toml and docs/training.md; without the default, which is added.
        section: table of the TOML file.
        options: the other arguments of `Setting`.
    """
    return dataclasses.field(default=default, metadata={METADATA: {"help": help, "section": section, **options}})


def is_data_path(text: str) -> bool:
    """Return whether the name of data is a path; hf:NAME is a data set of Hugging Face."""
    return not re.match(r"\w+:", text)


@functools.cache
def settings_of(config: type) -> tuple[Setting, ...]:
    """Return the declared settings of a dataclass, in its order."""
    kinds = typing.get_type_hints(config)
    return tuple(
        Setting(
            name=field.name, kind=kinds[field.name], default=field.default, owner=config.__name__,
            **field.metadata[METADATA],
        )
        for field in dataclasses.fields(config)
        if METADATA in field.metadata
    )  # fmt: skip


def check_settings(config: Any) -> None:
    """Check type, range and choice of each declared setting of a dataclass; call it in __post_init__.

    Raises:
        ValueError: "TrainConfig: batch is 0, expected at least 1".
    """
    for declared in settings_of(type(config)):
        try:
            declared.check(getattr(config, declared.name))
        except ValueError as error:
            raise ValueError(f"{declared.owner}: {declared.name} {error}") from None


def _has_float(kind: Any) -> bool:
    return kind is float or any(map(_has_float, typing.get_args(kind)))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
