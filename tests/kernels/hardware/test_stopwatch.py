"""The stopwatch."""

import pytest

from peakgpt.kernels.hardware import stopwatch


def test_stopwatch_devices():
    assert stopwatch.stopwatch()(lambda: None, calls=3) >= 0
    with pytest.raises(ValueError, match="cpu or cuda, got device 'meta'"):
        stopwatch.stopwatch("meta")
