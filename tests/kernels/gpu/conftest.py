"""Fixtures of the tests of Triton ops."""

import pytest
import torch


@pytest.fixture
def poison(monkeypatch):
    """Fill torch.empty with NaN, so that a test fails if a kernel does not write an element."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
