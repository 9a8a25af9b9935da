"""Results of a benchmark run: timings, checks against float64, and failures with their tracebacks."""

from __future__ import annotations

import dataclasses
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peakgpt.bench.check import Check
from peakgpt.bench.schema import Result, result_of_json

OURS = "peakgpt"  # the names of our contenders begin with it
# The installed package; in an editable install the folder of links, and the repository that they point to.
ROOTS = {path.parents[1] for path in (Path(__file__), Path(__file__).resolve())}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A contender that was not measured, or a job that failed if `contender` is None."""

    message: str
    traceback: str = ""
    contender: str | None = None
    part: str = ""
    job: str = ""

    def __post_init__(self) -> None:
        for name in ("message", "traceback"):
            object.__setattr__(self, name, without_folders(getattr(self, name)))

    @classmethod
    def of(cls, error: BaseException, contender: str | None = None) -> Failure:
        """Make a failure from a caught exception."""
        text = "".join(traceback.format_exception(error))
        return cls(message=f"{type(error).__name__}: {error}".splitlines()[0], traceback=text, contender=contender)

    @property
    def ours(self) -> bool:
        """Whether peakgpt failed. A failure of a peer is not an error of the run."""
        return self.contender is None or self.contender.startswith(OURS)


def without_folders(text: str) -> str:
    """Make paths relative to the package or to Python's import folders, because results are published."""
    folders = {*ROOTS, *(Path(p) for p in sys.path)}
    longest = sorted((str(f) for f in folders if f.is_absolute() and f != Path(f.root)), key=len, reverse=True)
    return re.sub(rf"(?<![\w/.-])({'|'.join(map(re.escape, longest))})/", "", text)


Row = Result | Check | Failure
Emit = Callable[[Row], None]  # takes a finished row
KINDS = {"result": result_of_json, "check": lambda row: Check(**row), "failure": lambda row: Failure(**row)}


@dataclass
class RunResults:
    """The rows of a run, by kind."""

    results: list[Result] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Add a finished row."""
        rows = {Result: self.results, Check: self.checks, Failure: self.failures}[type(row)]
        rows.append(row)

    @property
    def exit_code(self) -> int:
        """1 if a check or one of our contenders failed, else 0."""
        return int(any(not c.passed for c in self.checks) or any(f.ours for f in self.failures))


def encode(row: Row) -> dict[str, Any]:
    """Return a row and its kind as a JSON value."""
    return {"kind": type(row).__name__.lower(), "row": dataclasses.asdict(row)}


def decode(value: dict[str, Any]) -> Row:
    """Return the row of an `encode` result."""
    return KINDS[value["kind"]](value["row"])


class Unsupported(Exception):
    """A peer does not implement the call. It is left out; this is not a failure."""
