"""Report the machine, its peak rates, and the backend that each op uses on it, with reasons."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peakgpt.kernels.core.backends import module_names
from peakgpt.kernels.core.dispatch import BACKENDS, OPS
from peakgpt.kernels.hardware.cpu_threads import cpu_quota, threads
from peakgpt.kernels.hardware.datasheet import Peaks, datasheet
from peakgpt.kernels.hardware.device import Device, choose_device, describe
from peakgpt.kernels.hardware.measured_peaks import measure
from peakgpt.kernels.ops import catalogue

DTYPES = (torch.float32, torch.bfloat16)
# Ops whose eager function is one fused kernel of torch. The report names it.
TORCH_KERNELS = dict.fromkeys(
    ("attention", "attention_qkv", "attention_decode"), "torch's scaled_dot_product_attention"
)


@dataclass(frozen=True)
class Choice:
    """The backend that one op uses for its typical call, and the objections of the backends with higher priority."""

    op: str
    dtype: str
    backend: str
    objections: dict[str, str]


@dataclass(frozen=True)
class Diagnosis:
    """The report of `doctor`; `str` of it is the text.

    Attributes:
        device: name, kind, cores, memory and software versions.
        peaks: measured peak rates.
        sheet: published peak rates, None for an unknown device.
        unavailable: backends that support no op on this machine, with the reason.
        choices: the backend of each op and dtype.
        threads: number of threads of a kernel; None on a GPU.
        cpu_quota: number of CPUs whose time the process gets; None without a limit, and on a GPU.
    """

    device: Device
    peaks: Peaks
    sheet: Peaks | None
    unavailable: dict[str, str]
    choices: list[Choice]
    threads: int | None = None
    cpu_quota: float | None = None

    def __str__(self) -> str:
        return "\n".join((*self._machine(), "", *self._ops()))

    __repr__ = __str__

    def _machine(self) -> list[str]:
        device = self.device
        lines = [f"{device.name} ({device.kind}), {device.cores} {'SMs' if device.kind == 'cuda' else 'cores'}, "
                 f"{device.memory_bytes / 2**30:.0f} GiB, {device.arch}"]  # fmt: skip
        if self.threads is not None:
            quota = "none" if self.cpu_quota is None else f"{self.cpu_quota:g}"
            lines.append(f"threads of a kernel: {self.threads}, quota of CPUs: {quota}")
        lines += _peaks_lines(self.peaks) + (_peaks_lines(self.sheet) if self.sheet else [])
        lines.append(", ".join(f"{name} {version}" for name, version in device.versions.items()))
        return lines

    def _ops(self) -> list[str]:
        lines = [f"backends in order of priority: {', '.join(BACKENDS)}"]
        lines += [f"  {backend} is unavailable: {reason}" for backend, reason in self.unavailable.items()]
        for (op, backend, why), dtypes in self._grouped().items():
            lines.append(f"  {op:22}{backend:8}{', '.join(dtypes):20}{why}".rstrip())
        return lines

    def _grouped(self) -> dict[tuple[str, str, str], list[str]]:
        """Group the dtypes of one op that have the same backend and reasons."""
        rows: dict[tuple[str, str, str], list[str]] = {}
        for c in self.choices:
            why = [f"not {b}: {r}" for b, r in c.objections.items() if b not in self.unavailable]
            if c.backend == "eager" and c.op in TORCH_KERNELS:
                why.insert(0, f"runs {TORCH_KERNELS[c.op]}")
            rows.setdefault((c.op, c.backend, "; ".join(why)), []).append(c.dtype)
        return rows


def _peaks_lines(peaks: Peaks) -> list[str]:
    rates = ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in peaks.flops.items())
    return [f"peak: {rates}, memory {peaks.bandwidth_bytes_s / 1e9:.3g} GB/s ({peaks.source})"]


def doctor(device: torch.device | str | None = None) -> Diagnosis:
    """Report a device, its measured and published peak rates, and the backend of each op.

    Args:
        device: "cpu" or "cuda". Default: the CUDA device if the machine has one.
    Returns:
        A Diagnosis to print. The first measurement in a process takes one or two seconds.
    Raises:
        ValueError: the machine has no such device.
    """
    device = choose_device(device)
    described = describe(device)
    choices = [_choice(name, dtype, device) for name in sorted(catalogue.__all__) for dtype in DTYPES]
    unavailable = {}
    for backend in BACKENDS:
        reasons = {c.objections.get(backend) for c in choices if c.op in module_names(backend)}
        if len(reasons) == 1 and (reason := reasons.pop()):
            unavailable[backend] = reason
    limits = (threads(), cpu_quota()) if device.type == "cpu" else (None, None)
    return Diagnosis(described, measure(device), datasheet(described.name), unavailable, choices, *limits)


def _choice(name: str, dtype: torch.dtype, device: torch.device) -> Choice:
    op = OPS[name]
    with FakeTensorMode():  # an objection reads shapes, dtypes and strides only
        reasons = op.explain(*op.sample(dtype=dtype, device=device), **op.typical)
    backend = next(b for b, reason in reasons.items() if reason is None)
    names = list(reasons)
    objections = {b: reasons[b] for b in names[: names.index(backend)]}
    return Choice(name, str(dtype).removeprefix("torch."), backend, objections)
