"""95 % confidence intervals of the mean of a metric over examples, taken as independent.

    values 0 and 1    Wilson's interval of a proportion (Wilson 1927, J. Am. Stat. Assoc. 22, 209)
    other values      percentiles of RESAMPLES bootstrap means (Efron 1979, Ann. Stat. 7, 1)

Both are scipy's. Wilson's interval is never empty, also if all answers are right.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peakgpt.engine.data.documents import require

CONFIDENCE = 0.95
RESAMPLES = 1000
BATCH = 1 << 20  # values of the resamples that are in memory at once
EXTRA = "evaluate"  # of pyproject.toml: the packages of this folder


@dataclass(frozen=True)
class Estimate:
    """A score and its 95 % interval.

    Args:
        low, high: None where an interval needs more examples.
        method: "wilson", "bootstrap" or "stderr"; "" without an interval.
    """

    value: float
    low: float | None = None
    high: float | None = None
    method: str = ""


def mean_estimate(values: Sequence[float], seed: int) -> Estimate:
    """Return the mean and its interval.

    Args:
        values: one for each example, at least one.
        seed: of the bootstrap.
    """
    stats = require("scipy.stats", EXTRA)
    mean = math.fsum(values) / len(values)
    if set(values) <= {0.0, 1.0}:
        interval = stats.binomtest(int(sum(values)), len(values)).proportion_ci(CONFIDENCE, method="wilson")
        return Estimate(mean, float(interval.low), float(interval.high), "wilson")
    if len(values) < 2:
        return Estimate(mean)
    found = stats.bootstrap(
        (np.asarray(values),), np.mean, n_resamples=RESAMPLES, batch=max(BATCH // len(values), 1),
        confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Estimate(mean, float(found.low), float(found.high), "bootstrap")


def normal_estimate(value: float, error: float | None) -> Estimate:
    """Return a score with the interval of its standard error: value +- 1.96 error; None: without an interval."""
    if error is None or not math.isfinite(error):
        return Estimate(value)
    half = statistics.NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * error
    return Estimate(value, value - half, value + half, "stderr")
