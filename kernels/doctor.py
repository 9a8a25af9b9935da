"""Say what the machine is, what it can do at most, and which backend each op takes and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peakgpt.kernels.core.dispatch import OPS, PRIORITY
from peakgpt.kernels.hardware.datasheet import Peaks, datasheet
from peakgpt.kernels.hardware.device import Device, choose_device, describe
from peakgpt.kernels.hardware.measured_peaks import measure
from peakgpt.kernels.ops import catalogue

DTYPES = (torch.float32, torch.bfloat16)
# Ops whose eager function is a fused kernel of torch's: what runs there is to be named, for it is not ours.
SDPA = "torch's scaled_dot_product_attention"
TORCHS = dict.fromkeys(("attention", "attention_qkv", "attention_decode"), SDPA)


@dataclass(frozen=True)
class Choice:
    """The backend that one op takes for its typical call, and what those of higher priority say against it."""

    op: str
    dtype: str
    backend: str
    objections: dict[str, str]


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found; print it. `absent` are the backends that this machine rules out for every op, and why."""

    device: Device
    peaks: Peaks
    sheet: Peaks | None
    absent: dict[str, str]
    choices: list[Choice]

    def __str__(self) -> str:
        return "\n".join((*self._machine(), "", *self._ops()))

    __repr__ = __str__

    def _machine(self) -> list[str]:
        device = self.device
        lines = [f"{device.name} ({device.kind}), {device.cores} {'SMs' if device.kind == 'cuda' else 'cores'}, "
                 f"{device.memory_bytes / 2**30:.0f} GiB, {device.arch}"]  # fmt: skip
        lines += _peaks_lines(self.peaks) + (_peaks_lines(self.sheet) if self.sheet else [])
        lines.append(", ".join(f"{name} {version}" for name, version in device.versions.items()))
        return lines

    def _ops(self) -> list[str]:
        lines = [f"backends in order: {', '.join(PRIORITY)}"]
        lines += [f"  {backend} is out: {reason}" for backend, reason in self.absent.items()]
        for (op, backend, why), dtypes in self._grouped().items():
            lines.append(f"  {op:22}{backend:8}{', '.join(dtypes):20}{why}".rstrip())
        return lines

    def _grouped(self) -> dict[tuple[str, str, str], list[str]]:
        """Dtypes of one op with the same answer, together."""
        rows: dict[tuple[str, str, str], list[str]] = {}
        for c in self.choices:
            why = [f"not {b}: {r}" for b, r in c.objections.items() if b not in self.absent]
            if c.backend == "eager" and c.op in TORCHS:
                why.insert(0, f"that is {TORCHS[c.op]}")
            rows.setdefault((c.op, c.backend, "; ".join(why)), []).append(c.dtype)
        return rows


def _peaks_lines(peaks: Peaks) -> list[str]:
    rates = ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in peaks.flops.items())
    return [f"peak: {rates}, memory {peaks.bandwidth_bytes_s / 1e9:.3g} GB/s ({peaks.source})"]


def doctor(device: torch.device | str | None = None) -> Diagnosis:
    """Diagnose a device: what it is, its measured and published peaks, and each op's backend.

    Args:
        device: "cpu" or "cuda"; the CUDA device where there is one by default.
    Returns:
        A Diagnosis; printing it shows everything. Measuring takes a second or two, once a process.
    Raises:
        ValueError: a device that is not there.
    """
    device = choose_device(device)
    described = describe(device)
    choices = [_choice(name, dtype, device) for name in sorted(catalogue.__all__) for dtype in DTYPES]
    everywhere = {b: r for b in PRIORITY[:-1] for r in {c.objections.get(b) for c in choices} if r}
    absent = {b: r for b, r in everywhere.items() if all(c.objections.get(b) == r for c in choices)}
    return Diagnosis(described, measure(device), datasheet(described.name), absent, choices)


def _choice(name: str, dtype: torch.dtype, device: torch.device) -> Choice:
    op = OPS[name]
    with FakeTensorMode():  # shapes and strides are all that an objection may look at
        reasons = op.explain(*op.sample(dtype=dtype, device=device), **op.typical)
    backend = next(b for b, reason in reasons.items() if reason is None)
    ahead = list(reasons)[: list(reasons).index(backend)]
    return Choice(name, str(dtype).removeprefix("torch."), backend, {b: reasons[b] for b in ahead})
