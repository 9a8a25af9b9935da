"""Fixtures that several test files share, and the settings of the process."""

import process_setup  # noqa: F401  must come before the first import of Triton
import pytest
import torch


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
