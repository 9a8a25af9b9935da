"""The share of its quiet speed that a contender keeps while the machine is busy.

    share = median over the rounds of (seconds per call, quiet) / (seconds per call, busy)

Both times are from the same round. Of copies that run at once, the seconds are those of all their calls together, so
the share is the sum of their speeds over the speed of one alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from peakgpt.bench.schema import Result, comparable
from peakgpt.bench.timing import Ratio, ratio

MACHINE = "machine"  # key of a case: what else the machine does; rows of a quiet machine lack it
QUIET = ""
NEIGHBOURS = {1: "1 busy neighbour", 2: "2 busy neighbours"}  # processes -> value of MACHINE
QUOTA = "quota of 1 CPU"
COPIES = "2 copies at once"
BUSY = (*NEIGHBOURS.values(), QUOTA, COPIES)


def is_quiet(row: Result) -> bool:
    return MACHINE not in row.case


def quiet_share(row: Result, rows: Sequence[Result], machine: str) -> Ratio | None:
    """Return the share of the speed of a quiet row that its contender keeps.

    Args:
        row: of the quiet machine.
        rows: of the same work, on the quiet and on the busy machine.
        machine: one of BUSY.
    Returns:
        The share, 1 is all of the speed; None if it was not measured.
    """
    busy = next((r for r in rows if r.contender == row.contender and r.case.get(MACHINE) == machine), None)
    return ratio(row.timing(), busy.timing()) if busy and comparable(row, busy) else None


def share_text(share: Ratio | None) -> str:
    """Return "62 % (60 to 64), 58 to 66": median, quartiles and 95 % interval; empty without a share."""
    if share is None:
        return ""
    text = f"{100 * share.median:.0f} % ({100 * share.q25:.0f} to {100 * share.q75:.0f})"
    if share.interval is None:
        return f"{text}, too few rounds for an interval"
    low, high = share.interval
    return f"{text}, {100 * low:.0f} to {100 * high:.0f}"
