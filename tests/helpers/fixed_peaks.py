"""Peaks of a machine that needs no measurement: peaks of this one take seconds for each process and each case."""

from peakgpt.bench import peak_meter
from peakgpt.kernels.hardware import measured_peaks
from peakgpt.kernels.hardware.datasheet import Peaks

RATES = {"float32": 1e12, "bfloat16": 2e12, "int8": 4e12, "bytes": 1e11}


def peaks(device, threads):
    flops = {name: rate for name, rate in RATES.items() if name != "bytes"}
    return Peaks(flops, RATES["bytes"], "fixed", RATES["bytes"])


def use(monkeypatch=None):
    """Replace the measurement of peaks, for one test if its monkeypatch is given."""
    changes = [
        (measured_peaks, "_measure", peaks),
        (peak_meter.PeakMeter, "measure", lambda self: dict(RATES)),
        (peak_meter, "fresh_page_s", lambda: 1e-6),
    ]
    for target, name, value in changes:
        (monkeypatch.setattr if monkeypatch else setattr)(target, name, value)
