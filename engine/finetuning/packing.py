"""Best-fit decreasing packing: put examples of different lengths into as few rows of a given size as it finds.

The longest example comes first. Each goes into the row with the least free space that still holds it, or into a new
row. Johnson et al. 1974, "Worst-case performance bounds for simple one-dimensional packing algorithms", SIAM J. Comput.
3, 299-325: at most 11/9 of the fewest rows, plus 4. TRL calls it "bfd".
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Pack examples into rows.

    Args:
        lengths: of the examples, 1 to `size` each.
        size: of a row.
    Returns:
        The numbers of the examples of each row.
    """
    rows: list[list[int]] = []
    free: dict[int, list[int]] = {}  # space -> rows with so much of it
    spaces: list[int] = []  # the keys of `free`, in order: few, as lengths are integers up to `size`
    for example in sorted(range(len(lengths)), key=lambda example: -lengths[example]):
        length = lengths[example]
        place = bisect_left(spaces, length)
        if place == len(spaces):
            row, space = len(rows), size
            rows.append([])
        else:
            space = spaces[place]
            row = free[space].pop()
            if not free[space]:
                del free[space], spaces[place]
        rows[row].append(example)
        left = space - length
        if left and left not in free:
            insort(spaces, left)
        if left:
            free.setdefault(left, []).append(row)
    return rows
