"""The flags of declared settings: --key-with-dashes, grouped by section in --help."""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable, Iterable
from typing import Any

from peakgpt.engine.settings.setting import Setting
from peakgpt.engine.settings.values import NONE, members, show, tuple_kind


def add_flags(parser: argparse.ArgumentParser, settings: Iterable[Setting]) -> None:
    """Add one flag for each setting. Flags have no default: `read_flags` returns those that were given."""
    groups: dict[str, Any] = {}
    for setting in settings:
        group = groups.setdefault(setting.section, None) or parser.add_argument_group(f"[{setting.section}]")
        groups[setting.section] = group
        group.add_argument(setting.flag, default=argparse.SUPPRESS, help=_help(setting), **_options(setting))


def read_flags(args: argparse.Namespace, settings: Iterable[Setting]) -> dict[str, Any]:
    """Return the values of the flags that were given, by name.

    Raises:
        ValueError: a value out of range, or of the wrong type.
    """
    given = {}
    for setting in settings:
        if hasattr(args, setting.name):
            try:
                given[setting.name] = setting.read(getattr(args, setting.name), is_text=True)
            except ValueError as error:
                raise ValueError(f"{setting.flag} {error}") from None
    return given


def _options(setting: Setting) -> dict[str, Any]:
    options: dict[str, Any] = {"metavar": setting.metavar or _metavar(setting)}
    if tuple_kind(setting.kind) is not None:
        return {**options, "nargs": "+"}
    if setting.choices:
        is_optional = types.NoneType in members(setting.kind)
        options["choices"] = (*setting.choices, *([NONE] if is_optional else []))  # shells complete them
    if bool in members(setting.kind):
        options |= {"nargs": "?", "const": "true", "choices": ("true", "false")}
    return {**options, "type": _checked(setting)}


def _checked(setting: Setting) -> Callable[[str], str]:
    """Return argparse's type of a flag: it refuses bad text and returns good text as it is."""

    def check(text: str) -> str:
        try:
            setting.read(text, is_text=True)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return check


def _metavar(setting: Setting) -> str:
    if setting.choices and len(setting.choices) <= 6:
        return "{" + ",".join(setting.choices) + "}"
    if bool in members(setting.kind) and tuple_kind(setting.kind) is None:
        return "{true,false}"
    return setting.name.rpartition("_")[2].upper()


def _help(setting: Setting) -> str:
    default = setting.automatic or show(setting.default, quoted=False)
    return f"{setting.help} (default: {default})".replace("%", "%%")
