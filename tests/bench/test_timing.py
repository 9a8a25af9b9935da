"""Timings, their quartiles, and ratios by round."""

import pytest

from peakgpt.bench import timing
from peakgpt.bench.timing import Ratio, Spread, Timing


def test_each_divides_samples_by_count():
    two = Timing((4.0, 6.0), dropped=1, note="n", calls=3)
    assert two.each(2) == Timing((2.0, 3.0), dropped=1, note="n", calls=6)


def test_ratio_pairs_samples_by_round():
    assert Spread.of((4.0,)) == Spread(4.0, 4.0, 4.0)
    assert Spread.of((1.0, 2.0, 3.0, 4.0, 100.0)) == Spread(3.0, 2.0, 4.0)
    # Pairs of one round: a round in which the machine is four times slower does not change the ratio.
    a, b = Timing((2.0, 8.0, 2.0)), Timing((1.0, 4.0, 1.0))
    assert timing.ratio(a, b) == Ratio(2.0, 2.0, 2.0, None)
    a = Timing((2.0, 9.0, 8.0))  # the ratio of the medians is 8
    assert timing.ratio(a, b).median == 2.25
    with pytest.raises(ValueError, match="3 and 1 samples"):
        timing.ratio(a, Timing((1.0,)))
    with pytest.raises(ValueError, match="got none"):
        Timing(())
