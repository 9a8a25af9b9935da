"""A 95 % interval for the median of ratios, one ratio for each round.

    d_1 <= ... <= d_n                          log ratios of the n kept rounds, sorted
    P(d_k < median < d_(n+1-k))  =  1 - 2 P(Binomial(n, 1/2) <= k - 1)      for any distribution of d

k is the largest rank with at least 95 %. This is the interval of the sign test (Conover 1999, "Practical Nonparametric
Statistics", section 3.2). Reasons to choose it:

- It holds for any distribution and needs no symmetry. Times have heavy tails, and contenders have different ones.
- It is an interval of the median, which is the figure that the tables show.
- From 9 rounds on, one bad round does not move it. A bootstrap of so few rounds covers less than it says.
- The rounds may be taken as independent: the ratios of consecutive rounds have a mean correlation of 0.07 (7 to 9
  rounds) and 0.015 (20 and more) over the 85 comparisons committed until 2026-11.

With fewer than 6 rounds no two of them enclose the median with 95 %, so there is no interval.

The rounds of one run share what is drawn once per process, such as the addresses of its memory. So two runs differ by
more than their rounds show. `RUN_TO_RUN` adds this:

    log bound = log median +- sqrt((log d_k - log median)^2 + (1.96 RUN_TO_RUN)^2)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95
MIN_ROUNDS = 6
Z = statistics.NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
# Standard deviation of a log ratio between two runs of one commit, beyond the spread of their rounds.
RUN_TO_RUN = 0.01


def rank_of_bound(count: int, confidence: float = CONFIDENCE) -> int:
    """Return k, so that the k-th smallest and k-th largest of `count` values enclose the median; 0 if none do."""
    outside, k = 0.0, 0
    while k < count // 2:
        outside += math.comb(count, k) / 2**count
        if 1 - 2 * outside < confidence:
            break
        k += 1
    return k


def median_interval(ratios: Sequence[float], run_to_run: float = RUN_TO_RUN) -> tuple[float, float] | None:
    """Return the 95 % interval of the median ratio of a run.

    Args:
        ratios: one positive ratio for each round.
        run_to_run: standard deviation of log ratios between runs, beyond that of their rounds.
    Returns:
        (low, high), or None with fewer than MIN_ROUNDS rounds.
    """
    k = rank_of_bound(len(ratios))
    if k == 0:
        return None
    logs = sorted(math.log(ratio) for ratio in ratios)
    median = statistics.median(logs)
    below, above = (math.hypot(logs[i] - median, Z * run_to_run) for i in (k - 1, -k))
    return math.exp(median - below), math.exp(median + above)
