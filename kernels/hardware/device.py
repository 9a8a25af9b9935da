"""What the machine is: name, architecture, cores, memory, versions, and the choice of a device."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch


@dataclass(frozen=True)
class Device:
    """A CPU or a GPU."""

    kind: str  # "cpu" or "cuda"
    name: str
    arch: str  # "sm_90", "gfx942", or the instruction sets of a CPU
    cores: int  # streaming multiprocessors of a GPU; CPUs that this process may use
    memory_bytes: int
    driver: str
    versions: dict[str, str]


# Instruction sets that a kernel of this project could use, by their names in /proc/cpuinfo, in order of release.
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni",
                "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "bf16", "i8mm", "sve", "sme")  # fmt: skip


def describe(device: torch.device | str | None = None) -> Device:
    """Describe a device.

    Args:
        device: "cpu" (default) or a CUDA (also ROCm) device.
    Raises:
        ValueError: not a cpu or cuda device, or torch sees no CUDA device.
    """
    return _describe(resolve_device(device))


@functools.cache
def _describe(device: torch.device) -> Device:
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        arch = getattr(gpu, "gcnArchName", "").split(":")[0] if torch.version.hip else f"sm_{gpu.major}{gpu.minor}"
        driver = _nvidia_smi(device, "driver_version").get("driver_version", "")
        return Device("cuda", gpu.name, arch, gpu.multi_processor_count, gpu.total_memory, driver, _versions())
    info = _cpu_info()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", info["name"], info["features"], _usable_cpus(), memory_bytes, platform.release(), _versions())


def gpu_clocks(device: torch.device | str | None) -> dict[str, str]:
    """Return the current clocks, power limit and temperature of a GPU with units; empty if nvidia-smi fails."""
    fields = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
    return _nvidia_smi(resolve_device(device), *fields)


def choose_device(name: torch.device | str | None = None) -> torch.device:
    """Return the named device. None and "auto": the CUDA device if there is one, else the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = resolve_device(auto if name in (None, "", "auto") else name)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(f"expected one of {torch.cuda.device_count()} CUDA devices, got {str(device)!r}")
    return device


def resolve_device(device: torch.device | str | None) -> torch.device:
    """Return the device with its index; None means the CPU.

    Raises:
        ValueError: not a cpu or cuda device, or torch sees no CUDA device.
    """
    try:
        device = torch.device(device or "cpu")
    except RuntimeError:
        raise ValueError(f"expected a cpu or cuda device, got {device!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"expected a cpu or cuda device, got {str(device)!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"expected a device of this machine, got {str(device)!r}, and torch sees no CUDA device")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device.type, device.index) if device.type == "cuda" else torch.device("cpu")


def _nvidia_smi(device: torch.device, *fields: str) -> dict[str, str]:
    if device.type != "cuda" or torch.version.hip:
        return {}
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)  # indices differ under CUDA_VISIBLE_DEVICES
    gpu_id = f"GPU-{uuid}" if uuid else str(device.index)
    command = ["nvidia-smi", "-i", gpu_id, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, map(str.strip, output.strip().split(",")), strict=False))


def _cpu_info() -> dict[str, str]:
    """Return the name and the instruction sets of the CPU, from /proc/cpuinfo if it exists."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = (info.get("flags") or info.get("Features") or "").split()
    features = " ".join(f for f in CPU_FEATURES if f in flags) or torch.backends.cpu.get_cpu_capability().lower()
    return {"name": info.get("model name") or platform.processor() or platform.machine(), "features": features}


def cpu_has_bfloat16() -> bool:
    """Return whether the CPU has bfloat16 arithmetic."""
    return "bf16" in describe("cpu").arch  # avx512_bf16, amx_bf16, bf16


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _versions() -> dict[str, str]:
    """Return versions from package metadata, because importing Triton takes 0.4 s."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda or torch.version.hip:
        versions["cuda" if torch.version.cuda else "hip"] = torch.version.cuda or torch.version.hip
    for name in ("triton", "numpy", "peakgpt"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def last_level_cache_bytes() -> int:
    """Return the size of the largest CPU cache; 0 if the system does not report it."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(p.read_text().strip().removesuffix("K")) << 10 for p in sizes), default=0)
