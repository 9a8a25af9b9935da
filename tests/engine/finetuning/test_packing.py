"""Best-fit decreasing packing."""

from hypothesis import given
from hypothesis import strategies as st

from peakgpt.engine.finetuning.packing import best_fit


def plain(lengths, size):
    """The definition: each example, the longest first, into the fullest row that holds it."""
    rows = []
    for example in sorted(range(len(lengths)), key=lambda example: -lengths[example]):
        fitting = [row for row in rows if sum(lengths[i] for i in row) + lengths[example] <= size]
        if not fitting:
            rows.append(fitting := [])
            fitting.append(example)
        else:
            max(fitting, key=lambda row: sum(lengths[i] for i in row)).append(example)
    return rows


@given(st.lists(st.integers(1, 20), max_size=60))
def test_rows_hold_each_example_once_and_are_as_full_as_by_the_definition(lengths):
    rows = best_fit(lengths, 20)
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    used = sorted(sum(lengths[i] for i in row) for row in rows)
    assert used == sorted(sum(lengths[i] for i in row) for row in plain(lengths, 20)) and max(used, default=1) <= 20
