"""Time contenders round-robin, so that a slow second of the machine affects all of them.

per round r and contender c:    t[c, r] = seconds of n_c calls / n_c, with n_c so that one turn lasts >= 2 ms
ratio(a, b)                   = median over r of t[a, r] / t[b, r]
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from peakgpt.bench.cpu_load import MAX_DISTURBANCE, disturbance, keep_undisturbed, read_ticks
from peakgpt.bench.intervals import MIN_ROUNDS
from peakgpt.bench.peak_meter import GroupPeaks, PeakMeter
from peakgpt.bench.timing import Timing
from peakgpt.bench.turns import (
    BLOCK_CALLS,
    PROBE_EVERY,
    PROBE_FIRST,
    Seconds,
    Turn,
    cold_note,
    log_of,
    samples,
    seems_cold,
    take_turn,
    usable_rounds,
)
from peakgpt.kernels.hardware.stopwatch import stopwatch

MIN_TIMING_S = 2e-3  # perf_counter and the wake-up of a thread pool take about 10 us, less than 1 % of this
MIN_BLOCK_S = 0.2  # /proc/stat counts in 10 ms ticks: 0.2 s on one CPU is 20 ticks, and 10 % of that is 2 ticks
REPORT_S = 10.0  # seconds between two lines on standard error
REST_S = 0.02  # libgomp's threads spin for 7 ms after a parallel region (2-core Zen 4, 2026-11)

OnFailure = Callable[[str, Exception], None]  # (contender, exception)
Beside = Mapping[str, Callable[[], AbstractContextManager]]


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
    least: int = MIN_ROUNDS,
    workers: Mapping[str, int] | None = None,
    beside: Beside | None = None,
    peaks: PeakMeter | None = None,
    one_call: bool = False,
    on_failure: OnFailure = raise_failure,
) -> dict[str, Timing]:
    """Time contenders round-robin; the order rotates by one each round.

    Args:
        contenders: name -> function without arguments, called any number of times.
        rounds: timings of each contender, before rounds are dropped.
        warmup: untimed calls of each contender first.
        device: "cpu" (default) or a CUDA device.
        budget_s: start no new round after this many seconds including the warm-up.
        least: rounds that run whatever the budget is, not counting those that cold memory spoils.
        workers: contender -> process id of the running child that does its work. A rest then precedes each turn,
            because spinning threads of one process would take a core from the next.
        beside: contender -> context of each of its turns, such as other processes that compute. It is entered before
            the rest. Such turns vary too much to show whether memory went cold.
        peaks: measured before the first and after the last round.
        one_call: whether a call that fills a turn is never repeated to see if memory went cold, because a call has
            effects that are counted.
        on_failure: called with a contender whose call raises. It is left out; the others are timed.
    Returns:
        name -> Timing. On Linux CPUs, rounds with more than 10 % foreign CPU or steal time are dropped for all
        contenders, see `keep_undisturbed`. The counters are too coarse for one short round, so consecutive rounds of
        at least 0.2 s are judged together. If memory went cold while others took their turns, no sample includes the
        first call of a turn; see `turns`.
    Raises:
        ValueError: no contender, rounds < 1, or warmup < 0.
    """
    if not contenders or rounds < 1 or warmup < 0:
        raise ValueError(
            f"expected contenders, rounds >= 1 and warmup >= 0, got {len(contenders)} contenders, "
            f"rounds={rounds}, warmup={warmup}"
        )
    workers, start = workers or {}, time.perf_counter()
    seconds, rest = stopwatch(device), _rest if workers else lambda: None
    calls = _of_each(contenders, lambda name: _warm_up(contenders[name], warmup, seconds, rest), on_failure)
    before = peaks.measure() if peaks and calls else {}

    on_cpu = torch.device(device or "cpu").type == "cpu"
    pids = tuple(dict.fromkeys(workers.values()))  # each once, because their times are added
    read_load = (lambda: read_ticks(pids)) if on_cpu else lambda: None
    session = _Rounds(contenders, calls, seconds, rest, workers, beside or {}, split=on_cpu,
                      probe=on_cpu and not one_call)  # fmt: skip
    report, disturbances = _reporter(rounds), []

    def goes_on() -> bool:
        done = len(session.taken)
        spent = budget_s is not None and len(session.usable()) >= least and time.perf_counter() - start > budget_s
        return bool(session.names) and done < rounds and not spent

    while goes_on():
        ticks, block_start, block_first = read_load(), time.perf_counter(), len(session.taken)
        while goes_on():
            session.take(on_failure, last=len(session.taken) == rounds - 1)
            report(len(session.taken))
            if time.perf_counter() - block_start >= MIN_BLOCK_S:
                break
        share = disturbance(ticks, read_load())
        disturbances += [share] * (len(session.taken) - len(disturbances))
        if share <= MAX_DISTURBANCE:
            session.look(block_first)
    if not session.names:
        return {}
    group = peaks.group(before, peaks.measure()) if peaks else None
    taken = len(session.taken)
    short = f"{taken} of {rounds} rounds fitted into {budget_s:g} s" if taken < rounds else ""
    return {name: timing.noted(short) for name, timing in session.timings(disturbances, group).items()}


class _Rounds:
    """The rounds of one group, and whether memory went cold in them."""

    def __init__(
        self, contenders: Mapping[str, Callable[[], Any]], calls: Mapping[str, int], seconds: Seconds,
        rest: Callable[[], None], workers: Mapping[str, int], beside: Beside, *, split: bool, probe: bool,
    ):  # fmt: skip
        """
        Args:
            contenders: name -> function.
            calls: name -> calls that fill a turn; contenders without an entry do not take part.
            seconds: see `stopwatch`.
            rest: called before each turn.
            workers, beside: see `interleave`.
            split: whether to time the first call of a turn apart.
            probe: whether to look if memory went cold.
        """
        self.contenders, self.calls, self.seconds, self.rest = contenders, calls, seconds, rest
        self.workers, self.beside, self.split, self.probe = workers, beside, split, probe
        self.names = list(calls)
        self.taken: list[dict[str, Turn]] = []  # name -> turn, in the order of the turns
        self.suspected = False  # the first call of a turn was slow when we looked last
        self.cold = False

    def take(self, on_failure: OnFailure, *, last: bool) -> None:
        """Give every contender a turn."""
        index = len(self.taken)
        second_call = self.probe and (index % PROBE_EVERY == PROBE_FIRST or last or self.suspected)
        offset = index % len(self.names)

        def turn(name: str) -> Turn:
            least = 1 + BLOCK_CALLS if self.cold else 2 if second_call and name not in self.beside else 1
            with self.beside.get(name, nullcontext)():
                self.rest()
                return take_turn(self.contenders[name], self.calls[name], self.seconds, least=least, split=self.split,
                                 pid=self.workers.get(name))  # fmt: skip

        self.taken.append(_of_each(self.names[offset:] + self.names[:offset], turn, on_failure))
        self.names = [name for name in self.names if name in self.taken[-1]]

    def look(self, first: int) -> None:
        """Look in the rounds from `first` on whether memory went cold. Other processes must not have disturbed them."""
        for turns in self.taken[first:]:
            steady = {name: turn for name, turn in turns.items() if name not in self.beside}
            if self.probe and any(turn.cold is not None for turn in steady.values()):
                suspected = seems_cold(steady)
                self.cold = self.cold or (suspected and self.suspected)
                self.suspected = suspected

    def usable(self) -> list[int]:
        """Return the rounds whose samples mean the same, for the contenders that are left."""
        return usable_rounds(self._turns(), cold=self.cold)

    def _turns(self) -> list[dict[str, Turn]]:
        """Return the turns of each round, without those of contenders that have failed."""
        return [{name: turn for name, turn in taken.items() if name in self.names} for taken in self.taken]

    def timings(self, disturbances: Sequence[float], group: GroupPeaks | None) -> dict[str, Timing]:
        """Choose the rounds to keep and return the timings of the contenders that took part in all of them."""
        turns, usable = self._turns(), self.usable()
        undisturbed, note = keep_undisturbed([disturbances[i] for i in usable])
        kept = [usable[i] for i in undisturbed]
        lost = cold_note(turns, len(turns) - len(usable)) if self.cold else ""
        return {
            name: Timing(
                samples([turns[i][name] for i in kept], cold=self.cold), dropped=len(turns) - len(kept),
                note="; ".join(filter(None, [note, lost])), calls=self.calls[name],
                turns=log_of(name, turns, disturbances, kept), first_call="apart" if self.cold else "timed",
                peaks=group,
            )
            for name in self.names
        }  # fmt: skip


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


def _rest() -> None:
    time.sleep(REST_S)


def _warm_up(fn: Callable[[], Any], warmup: int, seconds: Seconds, rest: Callable[[], None]) -> int:
    """Warm fn up; return how many calls together last at least MIN_TIMING_S."""
    rest()
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
