"""Start contenders, check them, time the correct ones round-robin, and close all of them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from peakgpt.bench.contenders.contender import Contender
from peakgpt.bench.fidelity import Fidelity
from peakgpt.bench.interleave import OnFailure, interleave
from peakgpt.bench.peak_meter import PeakMeter
from peakgpt.bench.timing import Timing


class RunningContender(Protocol):
    """A contender that is ready to step: a WorkerProcess, or an object in this process, whose `pid` is None."""

    pid: int | None
    base_bytes: int | None
    note: str

    def step(self) -> Any: ...
    def memory_bytes(self) -> int | None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Work:
    """What the contenders of a case do on a CPU: how one starts, and how it is checked.

    Args:
        contenders: by name.
        start: name -> a new process of this contender.
        first_output: (name, process) -> output of its first steps.
        expect_correct: (name, outputs by name) -> a note, or None. It raises if that contender's output is wrong.
        weight_bits: name -> bits per quantized weight.
        fidelity: name -> how near its logits are to those of float32, of a contender that has run.
    """

    contenders: Mapping[str, Contender]
    start: Callable[[str], Any]
    first_output: Callable[[str, Any], Any]
    expect_correct: Callable[[str, Mapping[str, Any]], str | None]
    weight_bits: Callable[[str], float | None] = lambda name: None
    fidelity: Callable[[str], Fidelity | None] = lambda name: None


@dataclass(frozen=True)
class MeasuredContender:
    """The timing of a contender, and its memory and note after the last round."""

    timing: Timing
    memory_bytes: int | None
    base_bytes: int | None
    note: str


def time_contenders(
    starts: Iterable[tuple[str, Callable[[], RunningContender]]],
    first_output: Callable[[str, RunningContender], Any],
    expect_correct: Callable[[str, dict[str, Any]], object],
    *,
    rounds: int,
    warmup: int = 1,
    device: torch.device | None = None,
    budget_s: float | None = None,
    peaks: PeakMeter | None = None,
    on_failure: OnFailure,
) -> dict[str, MeasuredContender]:
    """Start, check and time contenders.

    Args:
        starts, first_output, expect_correct: see `checked_contenders`.
        rounds, warmup, device, peaks: see `interleave`.
        budget_s: seconds, including start and check.
        on_failure: called with a contender that raises or is wrong. It is closed; the others are timed.
    Returns:
        name -> measurement of each correct contender.
    """
    begin = time.perf_counter()
    with checked_contenders(starts, first_output, expect_correct, on_failure) as running:
        if not running:
            return {}
        left_s = None if budget_s is None else max(0.0, budget_s - (time.perf_counter() - begin))
        timings = interleave({n: c.step for n, c in running.items()}, rounds=rounds, warmup=warmup, device=device,
                             budget_s=left_s, workers={n: c.pid for n, c in running.items() if c.pid},
                             peaks=peaks, on_failure=on_failure)  # fmt: skip
        return {
            n: MeasuredContender(timing, running[n].memory_bytes(), running[n].base_bytes, running[n].note)
            for n, timing in timings.items()
        }


@contextlib.contextmanager
def checked_contenders(
    starts: Iterable[tuple[str, Callable[[], RunningContender]]],
    first_output: Callable[[str, RunningContender], Any],
    expect_correct: Callable[[str, dict[str, Any]], object],
    on_failure: OnFailure,
) -> Iterator[dict[str, RunningContender]]:
    """Start and check contenders; yield the correct ones by name, and close them when the context ends.

    Args:
        starts: (name, function that starts the contender).
        first_output: (name, contender) -> output of the first steps, which is checked.
        expect_correct: (name, outputs by name) raises if that contender's output is wrong.
        on_failure: called with a contender that raises or is wrong. It is closed.
    """
    running: dict[str, RunningContender] = {}
    try:
        outputs = _start_all(starts, first_output, running, on_failure)
        for name in outputs:
            with _closed_on_failure(name, running, on_failure):
                expect_correct(name, outputs)
        yield running
    finally:
        for contender in running.values():
            contender.close()


def _start_all(starts, first_output, running: dict[str, RunningContender], on_failure: OnFailure) -> dict[str, Any]:
    """Start the contenders and return their outputs.

    Processes build their models side by side: most of that uses one core. `running` is filled in place, so that the
    caller can close its contenders after an error. Tensors that only `starts` refers to are freed on return.
    """
    outputs: dict[str, Any] = {}
    for name, start in starts:
        with _closed_on_failure(name, running, on_failure):
            running[name] = start()
    for name in list(running):
        with _closed_on_failure(name, running, on_failure):
            outputs[name] = first_output(name, running[name])
            print(f"ready: {name}", file=sys.stderr, flush=True)
    return outputs


@contextlib.contextmanager
def _closed_on_failure(name: str, running: dict[str, RunningContender], on_failure: OnFailure) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a failing contender must not prevent the timing of the others
        if name in running:
            running.pop(name).close()
        on_failure(name, error)
