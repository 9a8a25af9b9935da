"""Time contenders on a quiet machine and on one that others use too, in the same rounds.

Each round has a turn of every contender alone, beside busy neighbours, under a CPU quota, and of two copies at once. So
a quiet and a busy time of one round have the same minute of the machine. Neighbours begin before a turn and are ended
after it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from peakgpt.bench.busy_neighbours import busy_neighbours
from peakgpt.bench.contenders.worker_process import WorkerProcess
from peakgpt.bench.cpu_quota import CpuQuota
from peakgpt.bench.interleave import OnFailure, interleave
from peakgpt.bench.quiet_share import COPIES, NEIGHBOURS, QUIET, QUOTA
from peakgpt.bench.timing import Timing


@dataclass(frozen=True)
class _Condition:
    """What a contender does in a turn, and what the machine does besides.

    Args:
        machine: QUIET or one of BUSY.
        step: is timed.
        pid: of the process that makes the step; of copies, the one that makes no other turn.
        beside: context of the turn.
        copies: steps of the contender in one `step`.
    """

    machine: str
    step: Callable[[], Any]
    pid: int
    beside: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    copies: int = 1


def time_on_busy_machine(
    workers: Mapping[str, WorkerProcess], copies: Mapping[str, WorkerProcess], quota: CpuQuota | None, *,
    rounds: int, budget_s: float | None, on_failure: OnFailure,
) -> dict[tuple[str, str], Timing]:  # fmt: skip
    """Time contenders in every condition.

    Args:
        workers: contender -> its process.
        copies: contender -> a second process of it; may lack some.
        quota: None leaves this condition out.
        rounds, budget_s: see `interleave`.
        on_failure: called with a contender, and with the condition if it is not quiet. The others are timed.
    Returns:
        (contender, QUIET or one of BUSY) -> Timing, for each contender QUIET first. A contender without a quiet time
        has no others. All are of the same rounds. The seconds of copies are those of one step: half of the seconds
        until both have made one.
    """
    conditions = {
        (name, condition.machine): condition
        for name, worker in workers.items()
        for condition in _conditions(worker, copies.get(name), quota)
    }
    key_of = {key: ", ".join(filter(None, key)) for key in conditions}
    timings = interleave(
        {key_of[key]: c.step for key, c in conditions.items()}, rounds=rounds, warmup=0, budget_s=budget_s,
        workers={key_of[key]: c.pid for key, c in conditions.items()},
        beside={key_of[key]: c.beside for key, c in conditions.items() if c.machine != QUIET}, on_failure=on_failure,
    )  # fmt: skip
    return {
        (name, machine): timings[key_of[name, machine]].each(condition.copies)
        for (name, machine), condition in conditions.items()
        if key_of[name, machine] in timings and key_of[name, QUIET] in timings
    }


def _conditions(worker: WorkerProcess, copy: WorkerProcess | None, quota: CpuQuota | None) -> Iterator[_Condition]:
    yield _Condition(QUIET, worker.step, worker.pid)
    for count, machine in NEIGHBOURS.items():
        yield _Condition(machine, worker.step, worker.pid, partial(busy_neighbours, count))
    if quota:
        yield _Condition(QUOTA, worker.step, worker.pid, partial(quota.limits, worker.pid))
    if copy:
        both = (worker, copy)
        yield _Condition(COPIES, partial(_step_at_once, both), copy.pid, copies=len(both))


def _step_at_once(workers: Sequence[WorkerProcess]) -> None:
    """Let every process make one step, all at the same time, and wait for all of them."""
    for worker in workers:
        worker.begin()
    for worker in workers:
        worker.finish()
