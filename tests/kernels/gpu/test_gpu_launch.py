"""The chips and the versions of Triton that the Triton kernels support."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from peakgpt.kernels.gpu import launch


@pytest.fixture
def chip(monkeypatch):
    """A function that returns the objection of launch for a simulated device of the given compute capability."""

    def objection(*capability):
        monkeypatch.setattr(launch, "interpreted", lambda: False)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a chip")
        launch._arch.cache_clear()
        return launch.objection(SimpleNamespace(dtype=torch.float32, device=SimpleNamespace(index=0)))

    yield objection
    launch._arch.cache_clear()


def test_chips_before_ampere_are_refused(chip):
    assert chip(7, 5) == chip(6, 1) == "needs sm_80 or newer, got a chip"
    assert all(chip(*newer) is None for newer in ((8, 0), (8, 9), (9, 0), (10, 3), (12, 0)))


def test_an_older_triton_is_refused():
    for good in ("3.6.0", "3.10.0+gitabc", "4.0"):
        launch.expect_version(good)
    with pytest.raises(ImportError, match=r"needs Triton 3\.6 or newer, got 3\.5\.1"):
        launch.expect_version("3.5.1")
