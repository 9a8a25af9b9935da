"""The peaks of a group: measured before and after it, the larger counts, and a datasheet wins."""

import pytest
import torch

from peakgpt.bench import peak_meter
from peakgpt.bench.peak_meter import PeakMeter
from peakgpt.bench.schema import Result
from peakgpt.bench.timing import Timing
from peakgpt.kernels.hardware import peaks
from peakgpt.kernels.hardware.datasheet import Peaks
from peakgpt.kernels.hardware.peaks import Streams


@pytest.fixture
def rates(monkeypatch):
    """Rates that each measurement returns, in turn."""
    found = {"flops": [2e11, 3e11], "read": [5e9, 4e9], "stream": [7e9, 6e9]}
    monkeypatch.setattr(peak_meter, "flops_now", lambda device, names: dict.fromkeys(names, found["flops"].pop(0)))
    monkeypatch.setattr(peak_meter, "bandwidth_now", lambda device: (found["read"].pop(0), 1.0))
    monkeypatch.setattr(peak_meter, "stream_rate_now", lambda mix, size, threads: found["stream"].pop(0))
    monkeypatch.setattr(peak_meter, "has_extension", lambda: True)
    return found


def row_of(meter, **fields):
    timing = Timing((1.0,), peaks=meter.group(meter.measure(), meter.measure()))
    return Result.of(timing, bench="op", case={}, contender="peakgpt", backend="", device=str(meter.device),
                     dtype="float32", **fields)  # fmt: skip


def test_row_has_the_larger_peak_and_both_measurements(rates):
    row = row_of(PeakMeter("cpu", [torch.float32], memory=True), flops=1e9, flops_kind="work", bytes=1e6)
    assert row.peak_flops_s == 3e11 and row.peak_bytes_s == 5e9
    assert row.peak_before == {"float32": 2e11, "bytes": 5e9} and row.peak_after == {"float32": 3e11, "bytes": 4e9}
    assert "before and after the rounds, the larger counts" in row.peak_source and 0 <= row.fresh_page_s < 1e-3


def test_streams_of_an_op_take_the_place_of_the_bandwidth(rates):
    row = row_of(PeakMeter("cpu", streams=Streams(2, 1, 0, 64 << 20)), bytes=1e6)
    assert row.peak_bytes_s == 7e9 and row.peak_flops_s is None
    assert row.peak_source == "bytes: 2 streams read and 1 written, 64 MiB" and rates["read"] == [5e9, 4e9]


def test_work_without_figures_needs_no_peak(rates):
    row = row_of(PeakMeter("cpu", [torch.float32], memory=True))
    assert row.peak_flops_s is row.peak_bytes_s is None and row.peak_source == ""


def test_bfloat16_without_instructions_has_the_peak_of_float32(rates, monkeypatch):
    monkeypatch.setattr(peak_meter, "flops_now", lambda device, names: {"float32": 2e11} if "float32" in names else {})
    row = row_of(PeakMeter("cpu", [torch.bfloat16]), flops=1e9, flops_kind="work", peak_dtype="bfloat16")
    assert row.peak_flops_s == 2e11 and "that of float32" in row.peak_source


def test_known_gpu_keeps_the_peak_of_its_datasheet(rates, monkeypatch):
    sheet = Peaks({"float32": 9e13}, 3e12, "NVIDIA datasheet")
    for module in (peak_meter, peaks):
        monkeypatch.setattr(module, "resolve_device", lambda device: torch.device("cuda"))
        monkeypatch.setattr(module, "rated_peaks", lambda device: sheet)
    row = row_of(PeakMeter("cuda", [torch.float32], memory=True), flops=1e9, flops_kind="work", bytes=1e6)
    assert row.peak_flops_s == 9e13 and row.peak_bytes_s == 3e12 and row.peak_before["float32"] == 2e11
    assert row.peak_source == "NVIDIA datasheet; bytes: NVIDIA datasheet" and row.fresh_page_s is None
