"""Rounds in which a contender would have been faster than its peak.

    share = flops / seconds / peak FLOP/s, or bytes / seconds / peak bytes/s;     share > 1 cannot be

Either the peak was measured in a slow moment or the clock of the round is wrong. Such a round is dropped for every
contender of its group, so that the rounds of all stay paired. If it happens in more than half of the rounds, the peak
is wrong and not the rounds: then the rows keep their times and lose this peak, and a note says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from peakgpt.bench.cpu_load import MIN_KEPT
from peakgpt.bench.schema import Result

PEAKS = {"flops": "peak_flops_s", "bytes": "peak_bytes_s"}  # work of a row -> what it is divided by


def drop_rounds_above_peak(group: Sequence[Result]) -> list[Result]:
    """Return the rows of one group without rounds above 100 % of a peak.

    Args:
        group: rows of one `interleave`; sample i of each is from the same round.
    """
    rows = list(group)
    for work, peak in PEAKS.items():
        above = {i for row in rows for i in _above(row, work, peak)}
        if not above:
            continue
        count = len(rows[0].samples_s)
        kept = [i for i in range(count) if i not in above]
        if len(kept) < max(MIN_KEPT, len(above)):
            note = f"no share of the peak: {len(above)} of {count} rounds were above the measured {peak}"
            rows = [replace(row, **{peak: None}).noted(note) for row in rows]
        else:
            note = f"{len(above)} of {count} rounds were above 100 % of {peak} and are dropped"
            rows = [row.without_rounds_above_peak(kept).noted(note) for row in rows]
    return rows


def _above(row: Result, work: str, peak: str) -> list[int]:
    amount, rate = getattr(row, work), getattr(row, peak)
    if amount is None or not rate:
        return []
    return [i for i, seconds in enumerate(row.samples_s) if amount / seconds > rate]
