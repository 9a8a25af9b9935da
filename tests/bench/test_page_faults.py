"""Page faults of a process, and the cost of a fresh page."""

import mmap

import pytest

from peakgpt.bench import page_faults

STAT = "42 (a (b) c) R 1 1 1 0 -1 4194304 1021 5 7 9 11 22 33 44 20 0 1 0 64767 3133440 416\n"


def test_faults_are_read_behind_the_name():
    assert page_faults.parse_faults(STAT) == (1021, 7)


def test_faults_of_this_process_grow_with_fresh_pages():
    before = page_faults.read_faults()
    if before is None:
        pytest.skip("no /proc")
    pages = 64
    with mmap.mmap(-1, pages * mmap.PAGESIZE) as memory:
        if hasattr(memory, "madvise") and hasattr(mmap, "MADV_NOHUGEPAGE"):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        for page in range(pages):
            memory[page * mmap.PAGESIZE] = 1
    assert page_faults.read_faults()[0] - before[0] >= pages
    assert page_faults.read_faults(2**22 + 1) is None  # above the largest process id


def test_cost_of_a_fresh_page_is_the_difference_of_two_writes(monkeypatch):
    count = page_faults.FRESH_BYTES // mmap.PAGESIZE
    seconds = iter([3.0 * count, 1.0 * count] * page_faults.FRESH_REPEATS)
    monkeypatch.setattr(page_faults, "_write_s", lambda pages: next(seconds))
    assert page_faults.fresh_page_s() == 2.0
    monkeypatch.undo()
    assert 0 <= page_faults.fresh_page_s() < 1e-3
