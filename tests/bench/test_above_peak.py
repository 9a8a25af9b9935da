"""A round above 100 % of a peak is dropped for every contender; a peak that most rounds exceed is removed."""

from peakgpt.bench.above_peak import drop_rounds_above_peak
from peakgpt.bench.schema import Result
from peakgpt.bench.timing import Timing, Turns, ratio


def row(contender, samples, **fields):
    timing = Timing(tuple(samples), dropped=1, turns=Turns(rounds=list(range(len(samples)))))
    return Result.of(timing, bench="op", case={}, contender=contender, backend="", device="cpu", dtype="float32",
                     **{"flops": 10.0, "flops_kind": "work", "peak_flops_s": 10.0, **fields})  # fmt: skip


def test_round_above_the_peak_is_dropped_for_every_contender():
    """Fails if the round stays, or is dropped for the contender above the peak only."""
    ours, eager = drop_rounds_above_peak([row("peakgpt", [1.5, 0.9, 1.6, 1.7]), row("eager", [2.0, 2.1, 2.2, 2.3])])
    assert ours.samples_s == [1.5, 1.6, 1.7] and eager.samples_s == [2.0, 2.2, 2.3]
    assert ours.turns.rounds == eager.turns.rounds == [0, 2, 3]
    assert ours.median_s == 1.6 and (ours.rounds, ours.dropped, ours.above_peak) == (3, 2, 1)
    assert all("1 of 4 rounds were above 100 % of peak_flops_s" in r.note for r in (ours, eager))
    assert all(s * 10 >= r.flops for r in (ours, eager) for s in r.samples_s)
    ratio(eager.timing(), ours.timing())  # still of the same rounds


def test_bytes_count_as_flops_do():
    (only,) = drop_rounds_above_peak([row("peakgpt", [4.0, 4.0, 4.0, 1.0], bytes=8.0, peak_bytes_s=4.0)])
    assert only.samples_s == [4.0] * 3 and only.above_peak == 1


def test_peak_that_most_rounds_exceed_is_removed():
    """Then the peak is wrong. The times stay, because their ratio needs no peak."""
    ours, eager = drop_rounds_above_peak([row("peakgpt", [0.9, 0.9, 0.9, 1.7]), row("eager", [2.0] * 4)])
    assert ours.peak_flops_s is eager.peak_flops_s is None and ours.flops_fraction is None
    assert ours.samples_s == [0.9, 0.9, 0.9, 1.7] and "3 of 4 rounds were above the measured peak_flops_s" in ours.note


def test_rows_below_their_peak_and_without_one_stay_as_they_are():
    rows = [row("peakgpt", [1.0, 1.5]), row("eager", [0.1, 0.1], peak_flops_s=None)]
    assert drop_rounds_above_peak(rows) == rows and drop_rounds_above_peak([]) == []
