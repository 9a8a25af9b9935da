"""What a benchmark run found: timings, checks against float64, and what failed, with its traceback."""

from __future__ import annotations

import dataclasses
import re
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peakgpt.bench.check import Check
from peakgpt.kernels.hardware.clock import Result

OURS = "peakgpt"  # contenders of ours have names that start so
ROOT = Path(__file__).parents[1]  # of the repository, or of the installed package


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Something that could not be measured: one contender, or a whole job of a part where `contender` is None."""

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
        """From an exception that was caught."""
        text = "".join(traceback.format_exception(error))
        return cls(message=f"{type(error).__name__}: {error}".splitlines()[0], traceback=text, contender=contender)

    @property
    def ours(self) -> bool:
        """Whether it is ours to mend: not what a peer can not do or has no memory for."""
        return self.contender is None or self.contender.startswith(OURS)


def without_folders(text: str) -> str:
    """The text with paths from this package's folder, or those that Python imports from: results are published."""
    folders = {ROOT, *(Path(p) for p in sys.path)}
    longest = sorted((str(f) for f in folders if f.is_absolute() and f != Path(f.root)), key=len, reverse=True)
    return re.sub(rf"(?<![\w/.-])({'|'.join(map(re.escape, longest))})/", "", text)


Row = Result | Check | Failure
KINDS = {"result": Result, "check": Check, "failure": Failure}


@dataclass
class Findings:
    """The rows of a run, by kind."""

    results: list[Result] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def add(self, row: Row) -> None:
        kept = {Result: self.results, Check: self.checks, Failure: self.failures}[type(row)]
        kept.append(row)

    @property
    def exit_code(self) -> int:
        """1 where a check or anything of ours failed, else 0."""
        return int(any(not c.passed for c in self.checks) or any(f.ours for f in self.failures))


def encode(row: Row) -> dict[str, Any]:
    """A row as one JSON value that says its kind."""
    return {"kind": type(row).__name__.lower(), "row": dataclasses.asdict(row)}


def decode(value: dict[str, Any]) -> Row:
    """The inverse of `encode`."""
    return KINDS[value["kind"]](**value["row"])


class NotTaken(Exception):
    """A peer raises it for a call that is not its kind: it is left out, and nothing has failed."""
