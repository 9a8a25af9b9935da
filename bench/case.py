"""A case: contenders that take turns at the same work. All commands and the suite of pytest run the same cases.

A module of `cases.KINDS` has one subclass of Case and two functions: add_arguments(parser) adds the flags of
`peakgpt bench KIND`, and cases(args, device) returns the cases that the flags select. The defaults of the flags are the
cases of the suite.
"""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from peakgpt.bench.above_peak import drop_rounds_above_peak
from peakgpt.bench.interleave import OnFailure
from peakgpt.bench.run_results import Emit, Failure
from peakgpt.bench.schema import Result


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One comparison.

    Args:
        rounds: maximum number of timings of each contender.
        seconds: budget with the start and the check of the contenders; at least MIN_ROUNDS rounds run. None: no budget.
        only: contenders to time; None means all that can run on the device.
    """

    kind: ClassVar[str]
    rounds: int = 9
    seconds: float | None = None
    only: tuple[str, ...] | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """Unique and stable name, which begins with the kind: "train/gpt2/4x256/bfloat16"."""

    @abstractmethod
    def all_contenders(self, device: torch.device) -> Sequence[str]:
        """Return the names of all contenders that can run on the device; peers may be not installed."""

    @abstractmethod
    def _measure(self, device: torch.device, on_failure: OnFailure) -> list[Result]:
        """Check and time the contenders: `measure` without its last step."""

    def measure(self, device: torch.device, on_failure: OnFailure) -> list[Result]:
        """Check the contenders, then time them in turns. Rounds above 100 % of a peak are dropped for all of them.

        Args:
            device: where they run.
            on_failure: called with the name and the exception of a contender that raises, is not installed, is wrong or
                does not support the work. The others are timed.
        Returns:
            A result for each remaining contender, then further results of them, such as latencies.
        """
        return drop_rounds_above_peak(self._measure(device, on_failure))

    def contenders(self, device: torch.device) -> list[str]:
        """Return the names of the contenders to time."""
        return [name for name in self.all_contenders(device) if self.only is None or name in self.only]

    def left_s(self, start: float) -> float | None:
        """Return the rest of the budget in seconds; `start` is time.perf_counter() at the start of `measure`."""
        return None if self.seconds is None else max(0.0, self.seconds - (time.perf_counter() - start))


def run_case(case: Case, device: torch.device, emit: Emit) -> None:
    """Measure a case, and emit its results and failures; a failure names its case."""

    def failed(contender: str | None, error: Exception) -> None:
        emit(dataclasses.replace(Failure.of(error, contender), part=case.kind, job=case.name))

    try:
        for row in case.measure(device, failed):
            emit(row)
    except Exception as error:  # a failing case must not lose the others
        failed(None, error)


def limit(cases: Sequence[Case], device: torch.device, contenders: Sequence[str] | None = None, **limits: Any
          ) -> list[Case]:  # fmt: skip
    """Apply the flags that all kinds have.

    Args:
        cases: cases of a command.
        device: where they run.
        contenders: names to time. A case with none of them is left out.
        limits: `rounds` and `seconds`; None keeps those of the case.
    Raises:
        ValueError: a contender is in no case.
    """
    changes: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
    cases = [dataclasses.replace(case, **changes) for case in cases]
    if contenders is None:
        return cases
    known = {name: None for case in cases for name in case.all_contenders(device)}
    if unknown := [name for name in contenders if name not in known]:
        raise ValueError(f"--contenders: got {unknown[0]!r}, expected some of {', '.join(map(repr, known))}")
    chosen = [dataclasses.replace(case, only=tuple(contenders)) for case in cases]
    return [case for case in chosen if case.contenders(device)]


def sizes_text(sizes: dict[str, Any]) -> str:
    """Return sizes as a part of a case's name: "rows=8,width=16"; empty without sizes."""
    return ",".join(f"{name}={value}" for name, value in sizes.items())


def joined(*parts: str) -> str:
    """Return the name of a case from its parts; empty parts are left out."""
    return "/".join(filter(None, parts))


def expect_cpu(kind: str, device: torch.device) -> None:
    """
    Raises:
        ValueError: the device is not a CPU.
    """
    if device.type != "cpu":
        raise ValueError(f"bench {kind}: got device {device}, expected --device cpu")
