"""Time contenders round-robin, so that a slow second of the machine affects all of them.

per round r and contender c:    t[c, r] = seconds of n_c calls / n_c, with n_c so that one timing lasts >= 2 ms
ratio(a, b)                   = median over r of t[a, r] / t[b, r]
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from peakgpt.bench.cpu_load import MIN_KEPT, disturbance, keep_undisturbed, read_ticks
from peakgpt.bench.timing import Timing
from peakgpt.kernels.hardware.stopwatch import stopwatch

MIN_TIMING_S = 2e-3  # perf_counter and the wake-up of a thread pool take about 10 us, less than 1 % of this
MIN_BLOCK_S = 0.2  # /proc/stat counts in 10 ms ticks: 0.2 s on one CPU is 20 ticks, and 10 % of that is 2 ticks
REPORT_S = 10.0  # seconds between two lines on standard error
REST_S = 0.02  # libgomp's threads spin for 7 ms after a parallel region (2-core Zen 4, 2026-11)

OnFailure = Callable[[str, Exception], None]  # (contender, exception)


def raise_failure(contender: str, error: Exception) -> None:
    """Raise the exception of a contender: the default of `on_failure`."""
    raise error


def interleave(
    contenders: dict[str, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int = 1,
    device: torch.device | str | None = None,
    budget_s: float | None = None,
    workers: Sequence[int] = (),
    on_failure: OnFailure = raise_failure,
) -> dict[str, Timing]:
    """Time contenders round-robin; the order rotates by one each round.

    Args:
        contenders: name -> function without arguments, called any number of times.
        rounds: timings of each contender, before rounds are dropped.
        warmup: untimed calls of each contender first.
        device: "cpu" (default) or a CUDA device.
        budget_s: start no new round after this many seconds including the warm-up, but run at least three rounds.
        workers: process ids of running children that do the contenders' work. A rest then precedes each timing,
            because spinning threads of one process would take a core from the next.
        on_failure: called with a contender whose call raises. It is left out; the others are timed.
    Returns:
        name -> Timing. On Linux CPUs, rounds with more than 10 % foreign CPU or steal time are dropped for all
        contenders, see `keep_undisturbed`. The counters are too coarse for one short round, so consecutive rounds of
        at least 0.2 s are judged together.
    Raises:
        ValueError: no contender, rounds < 1, or warmup < 0.
    """
    if not contenders or rounds < 1 or warmup < 0:
        raise ValueError(
            f"expected contenders, rounds >= 1 and warmup >= 0, got {len(contenders)} contenders, "
            f"rounds={rounds}, warmup={warmup}"
        )
    seconds = _rest_before(stopwatch(device)) if workers else stopwatch(device)
    read_load = (lambda: read_ticks(workers)) if torch.device(device or "cpu").type == "cpu" else lambda: None
    start = time.perf_counter()
    calls = _of_each(contenders, lambda name: _warm_up(contenders[name], warmup, seconds), on_failure)

    names, timed, disturbances = list(calls), [], []
    report = _reporter(rounds)
    while names and len(timed) < rounds and not _budget_is_spent(start, budget_s, len(timed)):
        before, block, first = read_load(), time.perf_counter(), len(timed)
        while names and len(timed) < rounds and not _budget_is_spent(start, budget_s, len(timed)):
            offset = len(timed) % len(names)
            order = names[offset:] + names[:offset]
            timed.append(_of_each(order, lambda name: seconds(contenders[name], calls[name]), on_failure))
            names = [name for name in names if name in timed[-1]]
            report(len(timed))
            if time.perf_counter() - block >= MIN_BLOCK_S:
                break
        disturbances += [disturbance(before, read_load())] * (len(timed) - first)

    if not names:
        return {}
    kept, note = keep_undisturbed(disturbances)
    if len(timed) < rounds:
        note = "; ".join(filter(None, [f"{len(timed)} of {rounds} rounds fitted into {budget_s:g} s", note]))
    return {
        n: Timing(tuple(timed[i][n] for i in kept), dropped=len(timed) - len(kept), note=note, calls=calls[n])
        for n in names
    }


def _of_each(names: Iterable[str], value_of: Callable[[str], Any], on_failure: OnFailure) -> dict[str, Any]:
    """Return the value of each name whose call does not raise."""
    values = {}
    for name in names:
        try:
            values[name] = value_of(name)
        except Exception as error:  # a failing contender must not lose the timings of the others
            on_failure(name, error)
    return values


def _reporter(rounds: int) -> Callable[[int], None]:
    """Return a function that prints the number of finished rounds to standard error, at most every REPORT_S seconds."""
    last = time.perf_counter()

    def report(finished: int) -> None:
        nonlocal last
        if time.perf_counter() - last >= REPORT_S:
            last = time.perf_counter()
            print(f"round {finished} of {rounds}", file=sys.stderr, flush=True)

    return report


def _rest_before(seconds: Callable[..., float]) -> Callable[..., float]:
    def rest_and_time(fn: Callable[[], Any], calls: int = 1) -> float:
        time.sleep(REST_S)
        return seconds(fn, calls)

    return rest_and_time


def _warm_up(fn: Callable[[], Any], warmup: int, seconds: Callable[..., float]) -> int:
    """Warm fn up; return how many calls together last at least MIN_TIMING_S."""
    for _ in range(warmup):
        fn()
    calls = 1
    # The first calls may be cold, so take the fastest of three. One sample is enough far above the limit.
    while (elapsed_s := seconds(fn, calls) * calls) < 10 * MIN_TIMING_S:
        elapsed_s = min(elapsed_s, *(seconds(fn, calls) * calls for _ in range(2)))
        if elapsed_s >= MIN_TIMING_S:
            break
        calls = max(calls + 1, min(10 * calls, math.ceil(calls * MIN_TIMING_S / max(elapsed_s, 1e-9))))
    return calls


def _budget_is_spent(start: float, budget_s: float | None, done: int) -> bool:
    return budget_s is not None and done >= MIN_KEPT and time.perf_counter() - start > budget_s
