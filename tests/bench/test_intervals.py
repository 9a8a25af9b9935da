"""The 95 % interval of a ratio: ranks, coverage by simulation with heavy tails and weak correlation, two runs."""

import math

import numpy as np
import pytest

from peakgpt.bench.intervals import MIN_ROUNDS, RUN_TO_RUN, median_interval, rank_of_bound
from peakgpt.bench.timing import Ratio, Timing, Turns, ratio

RUNS = 2000
ROUNDS = [MIN_ROUNDS, 7, 9, 15, 30]


def correlated(rng, shape):
    """Log ratios with a correlation of 0.07 from round to round, the mean over the committed results."""
    noise = rng.normal(size=shape)
    for i in range(1, shape[1]):
        noise[:, i] = 0.07 * noise[:, i - 1] + math.sqrt(1 - 0.07**2) * noise[:, i]
    return noise


# Log ratios around a median of 0.
NOISES = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "Cauchy": lambda rng, shape: rng.standard_cauchy(shape).clip(-1000, 1000),
    "one round in ten is 8 sigma slower for one contender": lambda rng, shape: (
        rng.normal(size=shape) + 8 * (rng.random(shape) < 0.1) * rng.choice((-1, 1), shape)
    ),
    "one-sided tail": lambda rng, shape: rng.exponential(size=shape) ** 2 - math.log(2) ** 2,
    "correlated": correlated,
}


@pytest.mark.parametrize("count", ROUNDS)
@pytest.mark.parametrize("noise", NOISES)
def test_interval_covers_the_true_ratio_in_95_percent_of_the_runs(noise, count):
    """Up to three standard errors below 95 %. Fails if the ranks are one too narrow, except at 30 rounds."""
    rng, true = np.random.default_rng(count), 1.25
    logs = 0.05 * NOISES[noise](rng, (RUNS, count))
    intervals = [median_interval([true * math.exp(d) for d in row], run_to_run=0.0) for row in logs.tolist()]
    covered = sum(low <= true <= high for low, high in intervals) / RUNS
    assert covered >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / RUNS)


def test_ranks_are_those_of_the_sign_test():
    """Table of Conover 1999, A3 (Binomial with p = 1/2): the widest ranks with at least 95 %."""
    assert [rank_of_bound(n) for n in (5, 6, 7, 8, 9, 12, 15, 20, 30)] == [0, 1, 1, 1, 2, 3, 4, 6, 10]
    assert median_interval([1.0] * (MIN_ROUNDS - 1)) is None and median_interval([1.0] * MIN_ROUNDS) is not None


def test_one_bad_round_of_nine_does_not_move_the_interval():
    ratios = [1.0, 1.01, 1.02, 1.03, 1.04, 1.05, 1.06, 1.07, 1.08]
    assert median_interval([*ratios[:-1], 50.0]) == median_interval(ratios)


def test_intervals_of_two_runs_overlap_if_runs_differ_by_more_than_their_rounds():
    """Each run has its own shift. Fails without RUN_TO_RUN: 30 quiet rounds would promise more than a run can keep."""
    rng, rounds = np.random.default_rng(0), 30

    def run(run_to_run):
        shift = rng.normal(scale=RUN_TO_RUN)
        return median_interval(np.exp(rng.normal(shift, 0.002, rounds)).tolist(), run_to_run)

    def overlaps(run_to_run):
        (low, high), (other_low, other_high) = run(run_to_run), run(run_to_run)
        return max(low, other_low) <= min(high, other_high)

    assert sum(overlaps(RUN_TO_RUN) for _ in range(500)) >= 0.95 * 500
    assert sum(overlaps(0.0) for _ in range(500)) < 0.5 * 500


def timing(samples, rounds=()):
    return Timing(tuple(samples), turns=Turns(rounds=list(rounds)))


def test_interval_is_that_of_paired_rounds():
    """The machine is half as fast in every second round. Unpaired, the interval would be from 0.55 to 2.2."""
    ours = [1.0, 2.0] * 5
    other = [1.1, 2.2] * 5
    found = ratio(timing(other), timing(ours))
    assert found.median == pytest.approx(1.1) and not found.noisy and not found.tie
    assert found.interval == pytest.approx((1.1 * math.exp(-0.0196), 1.1 * math.exp(0.0196)), rel=1e-4)


def test_ratio_of_different_rounds_is_refused():
    """A round that is dropped for one contender only would pair round 2 of one with round 3 of the other."""
    with pytest.raises(ValueError, match=r"rounds \[0, 1, 3\] and \[0, 2, 3\]"):
        ratio(timing([1.0, 2.0, 3.0], [0, 1, 3]), timing([1.0, 2.0, 3.0], [0, 2, 3]))


def spread(low, median, high):
    return Ratio(median, low, high, (low, high))


def test_ties_noisy_rows_and_overlaps():
    faster, tie, noisy = spread(1.02, 1.04, 1.06), spread(0.98, 1.01, 1.04), spread(1.1, 1.2, 1.3)
    assert [r.tie for r in (faster, tie, noisy)] == [False, True, False]
    assert [r.noisy for r in (faster, tie, noisy)] == [False, False, True]
    assert faster.text == "1.04 x (1.02 to 1.06)" and tie.text == "a tie: 1.01 x (0.98 to 1.04)"
    assert noisy.text == "1.20 x (1.10 to 1.30), noisy" and faster.overlaps(tie) and not tie.overlaps(noisy)
    none = Ratio.of([1.5] * 5)
    assert none.tie and none.noisy and not none.overlaps(none) and "too few rounds" in none.text
