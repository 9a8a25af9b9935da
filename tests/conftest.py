"""Fixtures of several test files. Importing process_setup configures the test process."""

import os

import process_setup  # noqa: F401  must come before the first import of Triton
import pytest
import torch

from peakgpt.kernels.hardware import measured_peaks


@pytest.fixture(scope="session", autouse=True)
def small_memory_streams():
    """Measure the bandwidth on 64 MB; 8 times the last-level cache of a server are 4 GB, which take 10 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured_peaks, "last_level_cache_bytes", lambda: 8 << 20)
        yield


def _isas() -> list[str]:
    try:
        from peakgpt._C import isas
    except ImportError:
        return []
    return isas


@pytest.fixture(params=_isas())
def isa(request):
    """Run the test once for each instruction set of the C++ kernels that this machine supports."""
    from peakgpt import _C

    torch.manual_seed(0)
    assert _C.set_isa_cap(request.param) == request.param
    yield request.param
    _C.set_isa_cap(None)


@pytest.fixture
def threads():
    """A function that sets torch's number of threads. The number is restored after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """Run torch on one thread: on a busy machine, threads of tiny operations wait longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_flush(monkeypatch):
    """Write files without fsync. test_run_checkpoints.py tests what is flushed, and in which order."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
