"""Settings that must stand before torch's and Triton's first use, and fixtures that several files share."""

import importlib.util
import os

import interpreter
import pytest
import torch

# Two threads: parallel code runs for real, and a shared machine is not oversubscribed.
torch.set_num_threads(2)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before any test module is imported
    if importlib.util.find_spec("triton"):
        interpreter.patch()  # imports Triton, 0.2 s, once a run


def _isas() -> list[str]:
    try:
        from peakgpt._C import isas
    except ImportError:
        return []
    return isas


@pytest.fixture(params=_isas())
def isa(request):
    """Each instruction set of the C++ kernels that this machine runs, as the widest one allowed."""
    from peakgpt import _C

    torch.manual_seed(0)
    assert _C.set_isa_cap(request.param) == request.param
    yield request.param
    _C.set_isa_cap(None)


@pytest.fixture
def threads():
    """Sets torch's number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
