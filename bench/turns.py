"""One contender's turn in a round, and whether its memory went cold while others took theirs.

    n calls are planned for a turn, the first one takes f seconds, those after it l seconds on average
    cold = (f + (n - 1) l) / (n l)      how many times as long a sample takes because of the first call

A hypervisor that reclaims the pages of idle guests makes the first call of a turn slow (5 times was seen with GPT-2
124M trainers), and no counter in the guest shows it. Other reasons for a slow first call are the caches, which the
other contenders filled, and page faults, which are recorded. So the first call is compared with the others of its turn:
in every turn of fast calls, and in every PROBE_EVERY-th round of slow calls, one of which fills a turn, from the third
round on. Rounds that other processes disturbed do not count. If a contender is over COLD in two looks, one after the
other, memory goes cold. From then on every turn has calls after the first one, and only these are timed, for every
contender. To keep idle contenders warm instead, something would have to touch their memory, which takes time and cache
from the others.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peakgpt.bench.page_faults import read_faults
from peakgpt.bench.timing import Turns

COLD = 1.2
PROBE_EVERY, PROBE_FIRST = 4, 2  # one look in six rounds, the least that have an interval
BLOCK_CALLS = 2  # timed calls of a turn after the first one, if memory goes cold
Seconds = Callable[..., float]  # (fn, calls=1) -> seconds per call


@dataclass(frozen=True)
class Turn:
    """What one contender did in one round."""

    planned: int  # calls that fill a turn
    calls: int  # calls of this turn
    mean_s: float  # of all calls
    first_s: float | None  # the first call; None if it was not timed apart
    later_s: float | None  # mean of the other calls; None if there was none
    minor_faults: int | None
    major_faults: int | None

    @property
    def cold(self) -> float | None:
        """How many times as long a sample takes because of the first call; None if unknown."""
        if self.later_s is None:
            return None
        return (self.first_s / self.later_s + self.planned - 1) / self.planned


def take_turn(
    fn: Callable[[], Any], planned: int, seconds: Seconds, *, least: int, split: bool, pid: int | None = None
) -> Turn:
    """Call fn and time it.

    Args:
        fn: the contender.
        planned: number of calls that fill a turn.
        least: make at least so many calls.
        seconds: see `stopwatch`.
        split: whether to time the first call apart.
        pid: process of the contender; None means this one.
    """
    calls, before = max(planned, least), read_faults(pid)
    if split:
        first_s = seconds(fn, 1)
        later_s = seconds(fn, calls - 1) if calls > 1 else None
        mean_s = first_s if later_s is None else (first_s + (calls - 1) * later_s) / calls
    else:
        mean_s, first_s, later_s = seconds(fn, calls), None, None
    after = read_faults(pid)
    faults = (None, None) if before is None or after is None else (after[0] - before[0], after[1] - before[1])
    return Turn(planned, calls, mean_s, first_s, later_s, *faults)


def seems_cold(turns: Mapping[str, Turn]) -> bool:
    """Return whether the first call of a contender was slow in this round."""
    return any(turn.cold is not None and turn.cold > COLD for turn in turns.values())


def usable_rounds(rounds: Sequence[Mapping[str, Turn]], *, cold: bool) -> list[int]:
    """Return the rounds whose samples mean the same: with cold memory those that have calls after the first one."""
    return [i for i, turns in enumerate(rounds) if not cold or all(t.later_s is not None for t in turns.values())]


def samples(turns: Sequence[Turn], *, cold: bool) -> tuple[float, ...]:
    """Return seconds per call of each turn, without its first call if memory went cold."""
    return tuple(turn.later_s if cold else turn.mean_s for turn in turns)


def log_of(
    name: str, rounds: Sequence[Mapping[str, Turn]], disturbances: Sequence[float], kept: Sequence[int]
) -> Turns:
    """Return what was recorded of a contender in the kept rounds."""
    turns = [rounds[i][name] for i in kept]
    columns = {
        "rounds": list(kept),
        "positions": [list(rounds[i]).index(name) for i in kept],
        "calls": [turn.calls for turn in turns],
        "first_s": [turn.first_s for turn in turns],
        "minor_faults": [turn.minor_faults for turn in turns],
        "major_faults": [turn.major_faults for turn in turns],
        "foreign_cpu": [round(disturbances[i], 4) for i in kept],
    }
    return Turns(**{key: [] if None in values else values for key, values in columns.items()})


def cold_note(rounds: Sequence[Mapping[str, Turn]], unusable: int) -> str:
    """Say that memory went cold, by how much, and what was done."""
    worst = {}
    for turns in rounds:
        for name, turn in turns.items():
            if turn.later_s is not None:
                worst.setdefault(name, []).append(turn.first_s / turn.later_s)
    name, factor = max(((n, statistics.median(factors)) for n, factors in worst.items()), key=lambda pair: pair[1])
    lost = f", {unusable} rounds before without such calls dropped" if unusable else ""
    return (
        f"memory went cold between turns: the first call took up to {factor:.1f} x as long as the next ones ({name}), "
        f"so turns have {1 + BLOCK_CALLS} calls and more, and the first one is not timed{lost}"
    )
