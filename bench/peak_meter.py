"""The peaks that rows are divided by, measured directly before and after the rounds of a group.

A shared CPU is slower in one minute than in the next, and a peak is a maximum. So the peak of a group is the larger of
both measurements. A GPU with a datasheet keeps the peak of the datasheet; the measured rates are recorded beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peakgpt.bench.page_faults import fresh_page_s
from peakgpt.kernels.hardware.cpu_threads import threads
from peakgpt.kernels.hardware.datasheet import Peaks
from peakgpt.kernels.hardware.device import resolve_device
from peakgpt.kernels.hardware.measured_peaks import (
    bandwidth_now,
    flops_now,
    has_extension,
    measurement_source,
    stream_rate_now,
)
from peakgpt.kernels.hardware.peaks import Streams, dtype_name, peak_for, rated_peaks

BYTES = "bytes"  # the key of the bandwidth beside the dtypes


@dataclass(frozen=True)
class GroupPeaks:
    """Peaks of one group.

    Args:
        device: of the rows.
        before, after: measured FLOP/s by dtype, and under "bytes" the bytes/s of the memory or of the op's streams.
        streams: description of the streams; empty if the bytes/s are those of reading main memory.
        fresh_page_s: seconds of the first write to a page; None on a GPU.
    """

    device: torch.device
    before: dict[str, float]
    after: dict[str, float]
    streams: str = ""
    fresh_page_s: float | None = None

    def fields(self, dtype: str, *, flops: bool, moved: bool) -> dict[str, Any]:
        """Return the fields of a Result that hold the peaks.

        Args:
            dtype: dtype whose FLOP/s count.
            flops, moved: whether the row has FLOPs, and bytes.
        """
        best = {name: max(rate, self.after.get(name, 0.0)) for name, rate in self.before.items()}
        sources, fields = [], {"peak_before": self.before, "peak_after": self.after, "fresh_page_s": self.fresh_page_s}
        source = f"{measurement_source(self.device)}, before and after the rounds, the larger counts"
        measured = Peaks(best, best.get(BYTES, 0.0), source)
        if flops:
            peak = peak_for(self.device, dtype, measured)
            fields["peak_flops_s"], sources = peak.flops_s, [peak.source]
        if moved:
            rated = None if self.streams else rated_peaks(self.device)
            fields["peak_bytes_s"] = rated.bandwidth_bytes_s if rated else best[BYTES]
            sources.append(f"bytes: {self.streams or (rated or measured).source}")
        return {**fields, "peak_source": "; ".join(sources)}


class PeakMeter:
    """Measures what a group is divided by. One measurement takes a fraction of a second per dtype, and per kind."""

    def __init__(
        self, device: torch.device | str, dtypes: Sequence[torch.dtype | str] = (), *,
        memory: bool = False, streams: Streams | None = None,
    ):  # fmt: skip
        """
        Args:
            device: "cpu" or a CUDA device.
            dtypes: dtypes whose FLOP/s are needed.
            memory: whether the bandwidth of main memory is needed.
            streams: the streams of an op, in place of the bandwidth.
        """
        self.device = resolve_device(device)
        names = {dtype_name(dtype) for dtype in dtypes}
        # A CPU without 16-bit arithmetic computes these dtypes in float32: see `peak_for`.
        self.names = names | ({"float32"} if self.device.type == "cpu" and names & {"bfloat16", "float16"} else set())
        self.streams = streams if self.device.type == "cpu" and has_extension() else None
        self.memory = memory or (streams is not None and self.streams is None)

    def measure(self) -> dict[str, float]:
        """Return the rates of this moment: FLOP/s by dtype, and bytes/s under "bytes"."""
        rates = flops_now(self.device, self.names) if self.names else {}
        if self.streams:
            rates[BYTES] = stream_rate_now(self.streams.mix, self.streams.size_bytes, threads())
        elif self.memory:
            rates[BYTES] = bandwidth_now(self.device)[0]
        return rates

    def group(self, before: dict[str, float], after: dict[str, float]) -> GroupPeaks:
        """Return the peaks of a group from the measurements before and after it."""
        page_s = fresh_page_s() if self.device.type == "cpu" else None
        return GroupPeaks(self.device, before, after, self.streams.description if self.streams else "", page_s)
