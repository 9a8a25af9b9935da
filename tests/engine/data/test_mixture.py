"""The mixture of sources is exact to one window at every step."""

import random
from fractions import Fraction

import pytest

from peakgpt.engine.data.mixture import Mixture

GPT3 = [60, 22, 8, 8, 3]  # percent, table 2.2 of arXiv:2005.14165; they sum to 101


def largest_error(weights, steps):
    mixture, counts = Mixture(weights), [0] * len(weights)
    shares = [Fraction(str(weight)) / sum(Fraction(str(w)) for w in weights) for weight in weights]
    worst = Fraction(0)
    for n in range(1, steps + 1):
        counts[next(mixture)] += 1
        worst = max(worst, *(abs(count - n * share) for count, share in zip(counts, shares, strict=True)))
    assert mixture.counts == counts
    return worst


def test_no_source_is_ever_a_whole_window_off():
    """The largest deficit first, which is simpler, is off by more than one window for some weights."""
    rng = random.Random(0)
    cases = [GPT3, [1], [1, 1], [0.999, 0.001], [1e-6, 1, 1e6], [1] * 9]
    cases += [[round(10 ** rng.uniform(-3, 2), 4) for _ in range(rng.randint(2, 9))] for _ in range(150)]
    assert max(largest_error(weights, 250) for weights in cases) < 1


def test_a_period_has_exactly_the_weights():
    mixture = Mixture(GPT3)
    taken = [next(mixture) for _ in range(3 * 101)]
    assert [taken.count(source) for source in range(5)] == [3 * weight for weight in GPT3]
    assert taken[:101] == taken[101:202] == taken[202:]


def test_it_goes_on_from_its_counts():
    whole = Mixture([0.5, 0.3, 0.2])
    expected = [next(whole) for _ in range(100)]
    half = Mixture([0.5, 0.3, 0.2])
    half.go_to([expected[:37].count(source) for source in range(3)])
    assert [next(half) for _ in range(63)] == expected[37:] and half.windows == 100
    for counts in ([10, 0, 0], [1, 1], [5, 3, -2]):
        with pytest.raises(ValueError, match="expected them in its proportions"):
            half.go_to(counts)
    assert half.counts == whole.counts


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan"), "1"])
def test_bad_weights_are_refused(weight):
    with pytest.raises(ValueError, match=r"weights: got .*, expected finite numbers above 0"):
        Mixture([1, weight])
