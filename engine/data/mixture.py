"""Mix several sources in given proportions, exactly: which source each window of a run comes from.

After n windows, source i with weight w_i (the weights sum to 1) has given c_i of them, and for every n

    |c_i - n w_i| < 1

Step n chooses, of the sources with c_i < n w_i, the one whose next window is due first: c_i + 1 windows must be given
by step (c_i + 1) / w_i. With two sources this alternates as evenly as possible. A random choice would be off by about
sqrt(n w_i (1 - w_i)) windows.

The proportions are of the tokens seen, not of the sources' sizes: Brown et al. 2020, arXiv:2005.14165, table 2.2.
Tijdeman 1980, "The chairman assignment problem", Discrete Mathematics 32, 323-330; Balinski, Young 1975, "The quota
method of apportionment", American Mathematical Monthly 82, 701-730.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


class Mixture:
    """An endless iterator over the numbers of sources.

    Args:
        weights: of the sources, above 0; only their ratios count. A float counts as the decimal number that it prints.
    Raises:
        ValueError: a weight is not a finite number above 0.
    """

    def __init__(self, weights: Sequence[float]):
        for weight in weights:
            if not (isinstance(weight, int | float) and 0 < weight < math.inf):
                raise ValueError(f"weights: got {weight!r}, expected finite numbers above 0")
        exact = [Fraction(str(weight)) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        self._shares = [int(weight * scale) for weight in exact]  # integers, so that nothing is rounded
        self._total = sum(self._shares)
        self.counts = [0] * len(exact)
        self.windows = 0

    def __iter__(self) -> Mixture:
        return self

    def __next__(self) -> int:
        """Return the source of the next window."""
        self.windows += 1
        open_sources = (
            source for source, (count, share) in enumerate(zip(self.counts, self._shares, strict=True))
            if count * self._total < self.windows * share
        )  # fmt: skip
        chosen = min(open_sources, key=self._due)
        self.counts[chosen] += 1
        return chosen

    def _due(self, source: int) -> int:
        """Return the last step by which the next window of a source must be given."""
        return (self.counts[source] + 1) * self._total // self._shares[source]

    def go_to(self, counts: Sequence[int]) -> None:
        """Continue after this many windows of each source.

        Raises:
            ValueError: no step of this mixture has these counts; nothing changes.
        """
        windows = sum(counts)
        if len(counts) != len(self.counts) or any(
            abs(count * self._total - windows * share) >= self._total
            for count, share in zip(counts, self._shares, strict=True)
        ):
            raise ValueError(f"mixture: got {list(counts)} windows of its sources, expected them in its proportions")
        self.counts, self.windows = list(counts), windows
