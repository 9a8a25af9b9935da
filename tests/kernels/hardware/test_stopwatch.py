"""The stopwatch: the devices that it can time."""

import pytest

from peakgpt.kernels.hardware import stopwatch


def test_stopwatch_times_the_cpu_and_rejects_other_devices():
    assert stopwatch.stopwatch()(lambda: None, calls=3) >= 0
    with pytest.raises(ValueError, match="cpu or cuda, got device 'meta'"):
        stopwatch.stopwatch("meta")
