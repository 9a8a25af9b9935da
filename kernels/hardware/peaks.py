"""Peaks that results are divided by: the datasheet's on a known GPU, measured ones on a CPU and on any other GPU.

    MFU = model FLOPs per second / peak FLOP/s of the dtype        MBU = bytes that must move per second / peak bytes/s

MFU: Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, section 4.1 and appendix B.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from peakgpt.kernels.hardware.datasheet import Peaks, datasheet
from peakgpt.kernels.hardware.device import describe, last_level_cache_bytes, resolve_device
from peakgpt.kernels.hardware.measured_peaks import measure, measure_flops, measure_flops_again

MAX_STREAMS = 4  # of reads or of writes, when a mix is rounded to whole streams


@dataclass(frozen=True)
class Peak:
    """The denominators of MFU and MBU for one dtype, and the measured peaks."""

    flops_s: float
    bandwidth_bytes_s: float
    source: str
    measured_flops_s: float | None  # None if only the datasheet has the dtype
    measured_bandwidth_bytes_s: float


def peak_for(device: torch.device | str | None, dtype: torch.dtype | str, measured: Peaks | None = None) -> Peak:
    """Return the denominators of MFU and MBU with their source.

    A known GPU has the peaks of its datasheet. A CPU and any other GPU are measured. A CPU without 16-bit arithmetic
    computes bfloat16 and float16 in float32; its peak is then that of float32, and the source says so.

    Args:
        device: "cpu" (default for None) or a CUDA device.
        dtype: torch.float32, torch.bfloat16, ...; or a key of Peaks.flops ("tf32" where matmul precision allows it).
        measured: measured peaks to use; the default are those that were measured first in this process.
    Raises:
        ValueError: the device has no peak for this dtype.
    """
    device = resolve_device(device)
    measured = measured or measure(device)
    peaks = rated_peaks(device) or measured
    name, source = dtype_name(dtype), peaks.source
    if device.type == "cpu" and name in ("bfloat16", "float16") and name not in peaks.flops:
        source = f"{source}; that of float32, in which {name} is computed here"
        name = "float32"
    if name not in peaks.flops:
        raise ValueError(f"expected a dtype with a peak on {device} ({', '.join(peaks.flops)}), got {name}")
    return Peak(
        flops_s=peaks.flops[name],
        bandwidth_bytes_s=peaks.bandwidth_bytes_s,
        source=source,
        measured_flops_s=measured.flops.get(name),
        measured_bandwidth_bytes_s=measured.bandwidth_bytes_s,
    )


def peak_flops_s(device: torch.device, dtype: torch.dtype, *, again: bool = False) -> float:
    """Return `flops_s` of `peak_for`, without measuring the bandwidth.

    That takes 8 times the last-level cache of memory: 4 GB on a server, which a process that keeps its pages never
    gives back.

    Args:
        again: measure once more, and return the better of both. It has no effect on a peak of a datasheet.
    Raises:
        ValueError: as in `peak_for`.
    """
    device = resolve_device(device)
    measured = measure_flops_again if again else measure_flops
    peaks = rated_peaks(device) or Peaks(measured(device), math.nan, "")
    return peak_for(device, dtype, peaks).flops_s


def rated_peaks(device: torch.device) -> Peaks | None:
    """Return the peaks of a GPU's datasheet; None for a CPU and for a GPU without one."""
    return datasheet(describe(device).name) if device.type == "cuda" else None


def dtype_name(dtype: torch.dtype | str) -> str:
    """Return the key of Peaks.flops for a dtype; it may be missing there."""
    return re.sub("^float8.*", "float8", str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Streams:
    """Streams of equal size that are read, written, or both (updated in place), with the proportions of an op.

    The bytes/s of a loop over them without arithmetic are the ceiling of a memory-bound op on a CPU. Reads and writes
    have different costs, and a cache is several times faster than memory. So neither the read peak nor the copy peak
    bounds an op.
    """

    reads: int
    writes: int
    updates: int  # streams that count as read and as written
    size_bytes: int  # of all streams together

    @classmethod
    def of(
        cls, read_bytes: float, written_bytes: float, touched_bytes: float, *, updated_bytes: float = 0
    ) -> Streams:
        """Return the streams that are nearest to the bytes of an op: at most 4 that are read and 4 that are written.

        Args:
            read_bytes, written_bytes: of one call of the op; only their ratio counts.
            touched_bytes: working set of repeated calls; it decides in which cache the streams fit.
            updated_bytes: bytes that are read and written in place.
        Raises:
            ValueError: no bytes, or more updated than read or written.
        """
        if min(read_bytes, written_bytes) < 0 or read_bytes + written_bytes <= 0:
            raise ValueError(f"expected bytes to read or write, got {read_bytes} and {written_bytes}")
        if not 0 <= updated_bytes <= min(read_bytes, written_bytes):
            raise ValueError(
                f"expected updates among {read_bytes} read and {written_bytes} written, got {updated_bytes}"
            )
        step = max(last_level_cache_bytes(), 8 << 20) // 16
        size = min(-(-int(touched_bytes) // step), 8 * 16) * step  # past 8 caches nothing changes
        return cls(*_mix(read_bytes, written_bytes, updated_bytes), size)

    @property
    def mix(self) -> tuple[int, int, int]:
        return self.reads, self.writes, self.updates

    @property
    def description(self) -> str:
        in_place = f", {self.updates} in place" if self.updates else ""
        return f"{self.reads} streams read and {self.writes} written{in_place}, {self.size_bytes >> 20} MiB"


def _mix(read: float, written: float, updated: float) -> tuple[int, int, int]:
    """Return the fewest whole streams (read, written, updated) whose shares are nearest to those of the bytes."""
    counts, total = range(MAX_STREAMS + 1), read + written

    def distance(mix: tuple[int, int, int]) -> tuple[float, int]:
        _, w, u = mix
        streams = mix[0] + w
        return round(abs(w / streams - written / total) + abs(u / streams - updated / total), 6), streams

    mixes = [(r, w, u) for r in counts for w in counts if r + w for u in range(min(r, w) + 1)]
    return min(mixes, key=distance)
