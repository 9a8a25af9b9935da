"""Samples of seconds per call, their median and quartiles, and ratios of interleaved contenders."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


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
class Timing:
    """Seconds per call of one contender, one sample for each kept round.

    Sample i of every contender of one `interleave` comes from the same round.
    """

    samples_s: tuple[float, ...]
    dropped: int = 0  # dropped rounds
    note: str = ""
    calls: int = 1  # calls per sample

    def __post_init__(self) -> None:
        if not self.samples_s:
            raise ValueError("expected at least one sample, got none")

    def noted(self, *notes: str) -> Timing:
        """Return this timing with more notes."""
        return dataclasses.replace(self, note="; ".join(filter(None, [self.note, *notes])))

    def each(self, count: int) -> Timing:
        """Return the timing of one of `count` equal parts of a call."""
        return dataclasses.replace(self, samples_s=tuple(s / count for s in self.samples_s), calls=count * self.calls)

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


def ratio(a: Timing, b: Timing) -> Spread:
    """Return median and quartiles of the time of a over the time of b in each round. Above 1, b is faster.

    Raises:
        ValueError: the timings have different numbers of rounds.
    """
    if a.kept != b.kept:
        raise ValueError(f"expected timings from the same rounds, got {a.kept} and {b.kept} samples")
    return Spread.of(tuple(x / y for x, y in zip(a.samples_s, b.samples_s, strict=True)))
