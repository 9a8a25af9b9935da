"""Page faults of a contender's own process are recorded for each turn."""

import pytest

from peakgpt.bench.contenders.time_contenders import time_contenders
from peakgpt.bench.contenders.worker_process import WorkerProcess
from peakgpt.bench.interleave import raise_failure
from peakgpt.bench.page_faults import read_faults

PAGES = 3000
WORK = f"""
import mmap

def make(request):
    def step():
        with mmap.mmap(-1, {PAGES} * mmap.PAGESIZE) as memory:
            memory.madvise(mmap.MADV_NOHUGEPAGE)
            for page in range({PAGES}):
                memory[page * mmap.PAGESIZE] = 1
        return 0.0
    return step
"""


def test_faults_of_a_worker_are_those_of_its_steps(tmp_path):
    """Fails if the faults of this process are recorded instead."""
    if read_faults() is None:
        pytest.skip("no /proc")
    (tmp_path / "faulting.py").write_text(WORK)
    request = {"make": "faulting:make", "threads": 1}
    found = time_contenders(
        [("worker", lambda: WorkerProcess("worker", request, {"PYTHONPATH": str(tmp_path)}))],
        lambda name, worker: worker.step(), lambda name, outputs: None, rounds=3, on_failure=raise_failure,
    )  # fmt: skip
    turns = found["worker"].timing.turns
    calls_and_faults = list(zip(turns.calls, turns.minor_faults, strict=True))
    assert len(calls_and_faults) == 3
    assert all(PAGES * calls <= faults < PAGES * calls + 2000 for calls, faults in calls_and_faults)
