"""Samples of seconds per call, their spread, and ratios of interleaved contenders with their 95 % interval."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peakgpt.bench.intervals import median_interval
from peakgpt.bench.peak_meter import GroupPeaks

NOISY = 0.05  # a row whose interval is wider than +-5 % is marked


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    q25: float
    q75: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        q25, median, q75 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median, q25, q75)


@dataclass(frozen=True)
class Ratio(Spread):
    """Median and quartiles of the quotients of two contenders' times, and the 95 % interval of the median."""

    interval: tuple[float, float] | None  # None with too few rounds

    @classmethod
    def of(cls, values: Sequence[float]) -> Ratio:
        return cls(**dataclasses.asdict(Spread.of(values)), interval=median_interval(values))

    @property
    def tie(self) -> bool:
        """Whether the rounds do not show which contender is faster."""
        return self.interval is None or self.interval[0] <= 1 <= self.interval[1]

    @property
    def noisy(self) -> bool:
        """Whether the interval is wider than +-5 %, or missing."""
        if self.interval is None:
            return True
        low, high = self.interval
        return max(high / self.median - 1, 1 - low / self.median) > NOISY

    @property
    def text(self) -> str:
        """The ratio with its interval, and whether it is a tie or noisy."""
        if self.interval is None:
            return f"{self.median:.2f} x, too few rounds for an interval"
        low, high = self.interval
        figure = f"{self.median:.2f} x ({low:.2f} to {high:.2f})"
        return f"{'a tie: ' if self.tie else ''}{figure}{', noisy' if self.noisy else ''}"

    def overlaps(self, other: Ratio) -> bool:
        """Return whether the intervals have a common point; False if one is missing."""
        if self.interval is None or other.interval is None:
            return False
        return max(self.interval[0], other.interval[0]) <= min(self.interval[1], other.interval[1])


@dataclass(frozen=True, kw_only=True)
class Turns:
    """A contender's turns in the kept rounds. Each list has an item per kept round, or is empty if unknown."""

    rounds: list[int] = dataclasses.field(default_factory=list)  # numbers of the rounds, from 0
    positions: list[int] = dataclasses.field(default_factory=list)  # 0: this contender began the round
    calls: list[int] = dataclasses.field(default_factory=list)  # calls in the turn, the first one included
    first_s: list[float] = dataclasses.field(default_factory=list)  # seconds of the first call
    minor_faults: list[int] = dataclasses.field(default_factory=list)  # of the contender's process
    major_faults: list[int] = dataclasses.field(default_factory=list)
    foreign_cpu: list[float] = dataclasses.field(default_factory=list)  # share of our CPUs that others took, 0..1

    def items(self) -> dict[str, list[Any]]:
        """Return the lists by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def keep(self, kept: Sequence[int]) -> Turns:
        """Return the turns at some indices."""
        return Turns(**{name: [values[i] for i in kept] if values else [] for name, values in self.items().items()})


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one contender, one sample for each kept round.

    Sample i of every contender of one `interleave` comes from the same round.
    """

    samples_s: tuple[float, ...]
    dropped: int = 0  # dropped rounds
    note: str = ""
    calls: int = 1  # calls per sample
    turns: Turns = dataclasses.field(default_factory=Turns)
    first_call: str = "timed"  # "timed" as the others, or "apart": the samples are of the calls after it
    peaks: GroupPeaks | None = None  # measured before and after the rounds

    def __post_init__(self) -> None:
        if not self.samples_s:
            raise ValueError("expected at least one sample, got none")

    def noted(self, *notes: str) -> Timing:
        """Return this timing with more notes."""
        return dataclasses.replace(self, note="; ".join(filter(None, [self.note, *notes])))

    def each(self, count: int) -> Timing:
        """Return the timing of one of `count` equal parts of a call."""
        turns = dataclasses.replace(
            self.turns,
            first_s=[s / count for s in self.turns.first_s],
            calls=[count * calls for calls in self.turns.calls],
        )
        samples_s = tuple(s / count for s in self.samples_s)
        return dataclasses.replace(self, samples_s=samples_s, calls=count * self.calls, turns=turns)

    @property
    def kept(self) -> int:
        return len(self.samples_s)

    @property
    def median_s(self) -> float:
        return Spread.of(self.samples_s).median

    @property
    def q25_s(self) -> float:
        return Spread.of(self.samples_s).q25

    @property
    def q75_s(self) -> float:
        return Spread.of(self.samples_s).q75


def ratio(a: Timing, b: Timing) -> Ratio:
    """Return the time of a over the time of b, paired by round. Above 1, b is faster.

    Raises:
        ValueError: the timings are of different rounds.
    """
    if a.kept != b.kept:
        raise ValueError(f"expected timings from the same rounds, got {a.kept} and {b.kept} samples")
    if a.turns.rounds != b.turns.rounds:
        raise ValueError(f"expected timings from the same rounds, got rounds {a.turns.rounds} and {b.turns.rounds}")
    return Ratio.of(tuple(x / y for x, y in zip(a.samples_s, b.samples_s, strict=True)))
