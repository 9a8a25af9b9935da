"""Contenders that hold something while they are compared: each is started and checked, those that are right are timed
round-robin, and all are closed, whatever becomes of one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from peakgpt.bench.ops import OnFailure
from peakgpt.kernels.hardware.clock import Timing, interleave


class Stepper(Protocol):
    """A worker, or what has its interface in this process; `pid` is then None."""

    pid: int | None
    base_bytes: int | None
    note: str

    def step(self) -> Any: ...
    def memory_bytes(self) -> int | None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Measured:
    """What is known of a contender after the last round: its timing, and what it says of itself."""

    timing: Timing
    memory_bytes: int | None
    base_bytes: int | None
    note: str


def measure(
    starts: Iterable[tuple[str, Callable[[], Stepper]]],
    first: Callable[[str, Stepper], Any],
    judge: Callable[[str, dict[str, Any]], None],
    *,
    rounds: int,
    warmup: int = 1,
    device: torch.device | None = None,
    budget_s: float | None = None,
    on_failure: OnFailure,
) -> dict[str, Measured]:
    """Time what steppers do, once it is right.

    Args:
        starts: (name, what starts it), taken one after the other.
        first: makes first steps and returns what they are judged by.
        judge: (name, what `first` returned by name) raises where that contender is wrong.
        rounds, warmup, device: see clock.interleave.
        budget_s: seconds, the start and the check included.
        on_failure: told of a contender that raises or is wrong; it is closed, the others are timed.
    Returns:
        By name, those that were right.
    """
    begin, steppers = time.perf_counter(), {}
    try:
        values = _first_steps(starts, first, steppers, on_failure)
        for name in values:
            with _told(name, steppers, on_failure):
                judge(name, values)
        if not steppers:
            return {}
        left_s = None if budget_s is None else max(0.0, budget_s - (time.perf_counter() - begin))
        timings = interleave({n: s.step for n, s in steppers.items()}, rounds=rounds, warmup=warmup, device=device,
                             budget_s=left_s, workers=[s.pid for s in steppers.values() if s.pid])  # fmt: skip
        return {n: Measured(timings[n], s.memory_bytes(), s.base_bytes, s.note) for n, s in steppers.items()}
    finally:
        for stepper in steppers.values():
            stepper.close()


def _first_steps(starts, first, steppers: dict[str, Stepper], on_failure: OnFailure) -> dict[str, Any]:
    """Fill `steppers`, so that the caller closes what was started; what they were started from is let go on return."""
    values: dict[str, Any] = {}
    for name, start in starts:
        with _told(name, steppers, on_failure):
            steppers[name] = start()
            values[name] = first(name, steppers[name])
    return values


@contextlib.contextmanager
def _told(name: str, steppers: dict[str, Stepper], on_failure: OnFailure) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a contender does must not keep the others from being timed
        if name in steppers:
            steppers.pop(name).close()
        on_failure(name, error)
