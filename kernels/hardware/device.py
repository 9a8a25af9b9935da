"""What the machine is, and the peaks that its results are divided by.

    MFU = model FLOPs per second / peak FLOP/s of the dtype        MBU = bytes that must move per second / peak bytes/s

    of streams = bytes an op must move per second / bytes/s of streams with the same reads and writes (`stream_peak`)

MFU: Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, section 4.1 and appendix B. The peaks of a GPU are the dense ones
of its datasheet, shown beside the measured ones; those of a CPU, and of any device without a row here, are measured,
never guessed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from peakgpt.kernels.hardware.clock import stopwatch

try:
    from peakgpt.kernels.cpu.ext import _C

    isa, peak_loop, peak_stream = _C.isa, _C.peak_loop, _C.peak_stream
except ImportError:  # the extension is optional; `measure` says in its source when it is missing
    peak_loop = None

# ---- what it is


@dataclass(frozen=True)
class Device:
    """A device: `arch` is "sm_90", "gfx942", or a CPU's instruction sets; `cores` SMs of a GPU, usable CPUs else."""

    kind: str  # "cpu" or "cuda"
    name: str
    arch: str
    cores: int
    memory_bytes: int
    driver: str
    versions: dict[str, str]


# As the kernel names them, in the order in which they came; what a kernel of this project could use.
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni",
                "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "bf16", "i8mm", "sve", "sme")  # fmt: skip


def describe(device: torch.device | str | None = None) -> Device:
    """Say what a device is.

    Args:
        device: "cpu" (default) or a CUDA (also ROCm) device.
    Raises:
        ValueError: another kind of device, or CUDA where torch sees none.
    """
    return _describe(_resolve(device))


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
    """Return a GPU's clocks, power limit and temperature now, with units; empty where nvidia-smi does not answer."""
    fields = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
    return _nvidia_smi(_resolve(device), *fields)


def choose_device(name: torch.device | str | None = None) -> torch.device:
    """The device of that name; where none is given the CUDA device, or the CPU where there is none.

    Raises:
        ValueError: not a device of this machine.
    """
    device = _resolve(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(f"expected one of {torch.cuda.device_count()} CUDA devices, got {str(device)!r}")
    return device


def _resolve(device: torch.device | str | None) -> torch.device:
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
    which = f"GPU-{uuid}" if uuid else str(device.index)
    command = ["nvidia-smi", "-i", which, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, map(str.strip, answer.strip().split(",")), strict=False))


def _cpu_info() -> dict[str, str]:
    """Return the CPU's name and its instruction sets, from /proc/cpuinfo where there is one."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = (info.get("flags") or info.get("Features") or "").split()
    features = " ".join(f for f in CPU_FEATURES if f in flags) or torch.backends.cpu.get_cpu_capability().lower()
    return {"name": info.get("model name") or platform.processor() or platform.machine(), "features": features}


def _cpu_has_bfloat16() -> bool:
    return "bf16" in describe("cpu").arch  # avx512_bf16, amx_bf16, bf16


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _versions() -> dict[str, str]:
    """Versions by metadata: importing Triton to ask it costs 0.4 s."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda or torch.version.hip:
        versions["cuda" if torch.version.cuda else "hip"] = torch.version.cuda or torch.version.hip
    for name in ("triton", "numpy", "peakgpt"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


# ---- its peaks


@dataclass(frozen=True)
class Peaks:
    """Dense peaks. `flops` by dtype name, an FMA counting 2; keys float32, tf32, bfloat16, float16, float8, int8."""

    flops: dict[str, float]  # per second
    bandwidth_bytes_s: float  # reading main memory; on a GPU what the datasheet says, or a copy's bytes both ways
    source: str
    copy_bytes_s: float | None = None  # read + written


@dataclass(frozen=True)
class Peak:
    """The denominator of MFU and MBU for one dtype, and the measured one beside it."""

    flops_s: float
    bandwidth_bytes_s: float
    source: str
    measured_flops_s: float | None  # None where only the datasheet knows the dtype
    measured_bandwidth_bytes_s: float


def _sheet(source: str, gbs: float, *, float32: float, tf32: float, half: float,
           float8: float | None = None, int8: float | None = None) -> Peaks:  # fmt: skip
    """A row in TFLOP/s and GB/s. `half` is bfloat16 and float16 with float32 accumulation: equal on all of these."""
    row = {"float32": float32, "tf32": tf32, "bfloat16": half, "float16": half, "float8": float8, "int8": int8}
    return Peaks({name: tflops * 1e12 for name, tflops in row.items() if tflops}, gbs * 1e9, source)


_AMPERE = "NVIDIA Ampere GA102 architecture whitepaper, appendix A, without sparsity"
_ADA = "NVIDIA Ada architecture whitepaper, appendix A, without sparsity"
_HOPPER = "NVIDIA H100 architecture whitepaper, without sparsity"
_A100 = "NVIDIA A100 datasheet, without sparsity"

# Pattern of the name that torch gives -> dense peaks; the first match counts. Vendors print sparse figures too, twice
# as large: NVIDIA's H100 datasheet says 1,979 for bf16 "with sparsity", which is 989.4 dense. float8 and half are with
# float32 accumulation, which is what the GeForce cards halve. Patterns end where a weaker sibling's name goes on
# ("RTX 4090 Laptop GPU", "H200 NVL", "H100 NVL", "A10G"): a card that is not exactly here is measured.
# Not every figure has been read again in the document that its row names; check a row before quoting it.
PEAKS: dict[str, Peaks] = {
    # Bandwidth by model: 40 GB 1555, 80 GB PCIe 1935, 80 GB SXM 2039. One compute row in the datasheet.
    r"A100-(SXM4|PCIE)-40GB$": _sheet(_A100, 1555, float32=19.5, tf32=156, half=312, int8=624),
    r"A100 80GB PCIe$": _sheet(_A100, 1935, float32=19.5, tf32=156, half=312, int8=624),
    r"A100-SXM4-80GB$": _sheet(_A100, 2039, float32=19.5, tf32=156, half=312, int8=624),
    # Datasheet: tf32 62.5 | 125*, bf16 125 | 250*, int8 250 | 500* (* with sparsity).
    r"\bA10$": _sheet("NVIDIA A10 datasheet, without sparsity", 600, float32=31.2, tf32=62.5, half=125, int8=250),
    # Datasheet gives sparse only: tf32 120, bf16 242, fp8 485, int8 485; halved here.
    r"\bL4$": _sheet("NVIDIA L4 datasheet, halved to dense", 300,
                     float32=30.3, tf32=60, half=121, float8=242.5, int8=242.5),
    # Datasheet: tf32 183 | 366*, bf16 362.05 | 733*, fp8 733 | 1,466*, int8 733 | 1,466*.
    r"\bL40S$": _sheet("NVIDIA L40S datasheet, without sparsity", 864,
                       float32=91.6, tf32=183, half=362.05, float8=733, int8=733),
    # tf32 35.6 | 71, bf16 71 | 142 with float32 accumulation, int8 284 | 568.
    r"RTX 3090$": _sheet(_AMPERE, 936, float32=35.6, tf32=35.6, half=71, int8=284),
    # tf32 82.6, bf16 165.2, fp8 330.3 with float32 accumulation (660.6 with float16), int8 660.6.
    r"RTX 4090$": _sheet(_ADA, 1008, float32=82.6, tf32=82.6, half=165.2, float8=330.3, int8=660.6),
    # tf32 104.8, bf16 209.5, fp8 419 with float32 accumulation (838 with float16), int8 838.
    r"RTX 5090$": _sheet("NVIDIA RTX Blackwell architecture whitepaper, appendix A, without sparsity", 1792,
                         float32=104.8, tf32=104.8, half=209.5, float8=419, int8=838),
    # SXM5, HBM3: 66.9, 494.7, 989.4, 1978.9; 3,352 GB/s.
    r"H100 80GB HBM3$": _sheet(_HOPPER, 3352, float32=66.9, tf32=494.7, half=989.4, float8=1978.9, int8=1978.9),
    # PCIe, HBM2e: 51.2, 378, 756, 1513; 2,039 GB/s.
    r"H100 PCIe$": _sheet(_HOPPER, 2039, float32=51.2, tf32=378, half=756, float8=1513, int8=1513),
    # The die and clocks of H100 SXM (datasheet: 67, 989*, 1,979*, 3,958*, halved), 4.8 TB/s of HBM3e.
    r"H200$": _sheet("NVIDIA H200 datasheet, halved to dense", 4800,
                     float32=66.9, tf32=494.7, half=989.4, float8=1978.9, int8=1978.9),
    # HGX B200 at 1000 W, one GPU: fp32 75, sparse tf32 2,200, bf16 4,500, fp8 and int8 9,000, halved; 7.7 TB/s.
    r"\bB200$": _sheet("NVIDIA Blackwell datasheet (HGX B200), halved to dense", 7700,
                       float32=75, tf32=1100, half=2250, float8=4500, int8=4500),
    # Data sheet: fp32 163.4, tf32 653.7, bf16 1307.4, fp8 and int8 2614.9; 5.3 TB/s.
    r"MI300X$": _sheet("AMD Instinct MI300X data sheet, without sparsity", 5300,
                       float32=163.4, tf32=653.7, half=1307.4, float8=2614.9, int8=2614.9),
}  # fmt: skip


def datasheet(name: str) -> Peaks | None:
    """Return the row of PEAKS for a device name as torch gives it, or None."""
    return next((peaks for pattern, peaks in PEAKS.items() if re.search(pattern, name)), None)


def peak_for(device: torch.device | str | None, dtype: torch.dtype | str) -> Peak:
    """Return the denominator of MFU and MBU, and where it comes from.

    On a CPU and on an unknown GPU it is measured; on a known GPU it is the datasheet's. A CPU without 16-bit arithmetic
    computes such dtypes in float32, so float32's peak counts there, and the source says so.

    Args:
        device: "cpu" (default for None) or a CUDA device.
        dtype: torch.float32, torch.bfloat16, ...; or a key of Peaks.flops ("tf32" where matmul precision allows it).
    Raises:
        ValueError: no peak is known or measurable for this dtype on this device.
    """
    device = _resolve(device)
    measured = measure(device)
    peaks = (datasheet(describe(device).name) if device.type == "cuda" else None) or measured
    name = re.sub("^float8.*", "float8", str(dtype).removeprefix("torch."))
    source = peaks.source
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


# ---- measuring them

WINDOWS = 8  # of each kind, taken in turn, so that one bad moment of a shared machine spoils one window of each
WINDOW_S = 0.01
MM_SIZE = {"cpu": 1024, "cuda": 8192}  # square; the smallest at which the library is near its best
STREAM_GAP_BYTES = 17 * 64  # streams a power of two apart would fall into the same sets of a cache
MOST_STREAMS = 4  # of a kind, when a mix is rounded to whole streams
LOOPS = {"float32": 0, "bfloat16": 1, "int8": 2}  # csrc/ops/peaks.h
Work = tuple[Callable[[], Any], float]  # what to run, and how many operations or bytes it does


def measure(device: torch.device | str | None = None) -> Peaks:
    """Measure the peaks of a device; once per process and number of threads.

    A peak is a maximum: each figure is the best of several short windows, because a shared machine only ever makes one
    slower. On a CPU, with torch's number of threads, it is the better of a register-resident multiply-add loop and
    torch.mm (the only way to matrix units, which the loop does not use), and reading and copying far more than the
    last-level cache holds; on a GPU a large torch.mm on random data (zeros draw less power and clock higher) and a
    copy.

    Args:
        device: "cpu" (default) or a CUDA device.
    """
    device = _resolve(device)
    return _measure(device, torch.get_num_threads() if device.type == "cpu" else 0)


@functools.cache
def _measure(device: torch.device, threads: int) -> Peaks:
    if device.type == "cuda":
        rates = _best_rates(device, {**_mm_works(device), **_torch_memory_works(device, _gpu_buffer_bytes(device))})
        return _peaks(rates, "measured: torch.mm, copy")
    mm = _mm_works(device)
    memory_bytes = max(8 * _last_level_cache_bytes(), 64 << 20)
    if peak_loop is None:
        rates = _best_rates(device, {**mm, **_torch_memory_works(device, memory_bytes)})
        return _peaks(rates, f"measured: torch.mm, copy (no C++ extension), {threads} threads")
    works = {**mm, **_loop_works(threads), **_memory_works(memory_bytes, threads)}
    return _peaks(_best_rates(device, works), f"measured: multiply-add loop ({isa()}) or torch.mm, {threads} threads")


def stream_peak(
    device: torch.device | str | None, read_bytes: float, written_bytes: float, touched_bytes: float, *,
    updated_bytes: float = 0,
) -> tuple[float, str]:  # fmt: skip
    """Return the streaming ceiling of an op: bytes/s of a loop that only reads and writes, in the op's mix and place.

    Reads and writes do not cost the same, and a cache is several times faster than memory, so neither the peak of
    reading nor that of a copy bounds an op. On a CPU the better of ordinary and non-temporal stores counts, once per
    process, mix and size; the mix is rounded to at most 4 equal streams of a kind. On a GPU it is the bandwidth of
    `peak_for`, whatever the mix.

    Args:
        device: "cpu" (default for None) or a CUDA device.
        read_bytes, written_bytes: of one call of the op; only their ratio counts.
        touched_bytes: what calls touch again and again: it decides which cache the streams live in.
        updated_bytes: what is both read and written, in place.
    Returns:
        (bytes/s, read and written together; what it is).
    Raises:
        ValueError: no bytes, or more updated than read or written.
    """
    if min(read_bytes, written_bytes) < 0 or read_bytes + written_bytes <= 0:
        raise ValueError(f"expected bytes to read or write, got {read_bytes} and {written_bytes}")
    if not 0 <= updated_bytes <= min(read_bytes, written_bytes):
        raise ValueError(f"expected updates among {read_bytes} read and {written_bytes} written, got {updated_bytes}")
    device = _resolve(device)
    if device.type == "cuda" or peak_loop is None:
        peak = peak_for(device, torch.float32)
        return peak.bandwidth_bytes_s, peak.source
    step = max(_last_level_cache_bytes(), 8 << 20) // 16
    size = min(-(-int(touched_bytes) // step), 8 * 16) * step  # past 8 caches nothing changes
    mix = _mix(read_bytes, written_bytes, updated_bytes)
    reads, writes, updates = mix
    what = f"{reads} streams read and {writes} written{f', {updates} in place' if updates else ''}, {size >> 20} MiB"
    return _stream_rate(mix, size, torch.get_num_threads()), what


def _mix(read: float, written: float, updated: float) -> tuple[int, int, int]:
    """The fewest whole streams (read, written, updated) whose shares are nearest."""
    counts, total = range(MOST_STREAMS + 1), read + written

    def distance(mix: tuple[int, int, int]) -> tuple[float, int]:
        _, w, u = mix
        streams = mix[0] + w
        return round(abs(w / streams - written / total) + abs(u / streams - updated / total), 6), streams

    mixes = [(r, w, u) for r in counts for w in counts if r + w for u in range(min(r, w) + 1)]
    return min(mixes, key=distance)


@functools.cache
def _stream_rate(mix: tuple[int, int, int], size_bytes: int, threads: int) -> float:
    reads, writes, updates = mix
    stream_bytes = size_bytes // (reads + writes - updates)
    kinds = (False, True) if writes > updates else (False,)
    works = {("stream", f"past caches: {k}"): _stream_work(stream_bytes, *mix, threads, past_caches=k) for k in kinds}
    return max(_best_rates(torch.device("cpu"), {key: _repeated(*work) for key, work in works.items()}).values())


def _repeated(fn: Callable[[], Any], amount: float) -> Work:
    """The work as often as a window has room for."""
    fn()
    calls = max(1, round(WINDOW_S / stopwatch("cpu")(fn)))

    def run() -> None:
        for _ in range(calls):
            fn()

    return run, calls * amount


def _peaks(rates: dict[tuple[str, str], float], source: str) -> Peaks:
    """Take the better method for each dtype; reading, where it is not measured by itself, is a copy's rate."""
    flops: dict[str, float] = {}
    for (name, method), rate in rates.items():
        if method != "memory":
            flops[name] = max(rate, flops.get(name, 0.0))
    copy = rates["copy", "memory"]
    return Peaks(flops, rates.get(("read", "memory"), copy), source, copy)


def _best_rates(device: torch.device, works: dict[tuple[str, str], Work]) -> dict[tuple[str, str], float]:
    """Return operations or bytes per second in the best window of each; the first round warms up."""
    seconds = stopwatch(device)
    fastest = dict.fromkeys(works, float("inf"))
    for _ in range(WINDOWS):
        for key, (fn, _amount) in works.items():
            fastest[key] = min(fastest[key], seconds(fn))
    return {key: amount / fastest[key] for key, (_, amount) in works.items()}


def _mm_works(device: torch.device) -> dict[tuple[str, str], Work]:
    n = MM_SIZE[device.type]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    if device.type == "cpu":  # without the instruction torch's bfloat16 GEMM is no measure of anything, and slow
        dtypes = [torch.float32, torch.bfloat16] if _cpu_has_bfloat16() else [torch.float32]
    works = {}
    generator = torch.Generator(device).manual_seed(0)  # of its own: measuring must not move the caller's random state
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device, dtype=dtype, generator=generator) for _ in range(2))
        mm = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
        works[str(dtype).removeprefix("torch."), "mm"] = mm, 2.0 * n**3
        if device.type == "cuda" and dtype == torch.float32:
            works["float32", "mm"] = functools.partial(_with_precision, "ieee", mm), 2.0 * n**3
            works["tf32", "mm"] = functools.partial(_with_precision, "tf32", mm), 2.0 * n**3
    return works


def _with_precision(precision: str, fn: Callable[[], Any]) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        fn()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _torch_memory_works(device: torch.device, size_bytes: int) -> dict[tuple[str, str], Work]:
    source = torch.ones(size_bytes // 4, device=device)
    return {("copy", "memory"): (functools.partial(torch.empty_like(source).copy_, source), 2.0 * size_bytes)}


def _loop_works(threads: int) -> dict[tuple[str, str], Work]:
    works, seconds = {}, stopwatch("cpu")
    for name, loop in LOOPS.items():
        some = 100_000
        done = peak_loop(loop=loop, iterations=some, threads=threads)
        if done == 0 or (name == "bfloat16" and not _cpu_has_bfloat16()):  # computed in float32 there
            continue
        run = functools.partial(peak_loop, loop=loop, threads=threads)
        once_s = min(seconds(functools.partial(run, iterations=some)) for _ in range(3))
        iterations = max(1, round(some * WINDOW_S / once_s))
        works[name, "loop"] = functools.partial(run, iterations=iterations), done / some * iterations
    return works


def _memory_works(size_bytes: int, threads: int) -> dict[tuple[str, str], Work]:
    """Read one stream, and copy one to another past the caches."""
    return {
        ("read", "memory"): _stream_work(size_bytes, 1, 0, 0, threads),
        ("copy", "memory"): _stream_work(size_bytes // 2, 1, 1, 0, threads, past_caches=True),
    }


def _stream_work(
    stream_bytes: int, reads: int, writes: int, updates: int, threads: int, *, past_caches: bool = False
) -> Work:
    """Read and write streams of that many bytes each, some of them in place."""
    stream_bytes = max(256, stream_bytes // 256 * 256)
    stride = stream_bytes + STREAM_GAP_BYTES
    buffer = torch.ones((reads + writes - updates) * stride // 4 + 16)

    def stream() -> None:  # holds `buffer`: an address alone would let it be freed
        base = -(-buffer.data_ptr() // 64) * 64
        peak_stream(base=base, stride=stride, bytes=stream_bytes, reads=reads, writes=writes, updates=updates,
                    past_caches=past_caches, threads=threads)  # fmt: skip

    return stream, float((reads + writes) * stream_bytes)


def _gpu_buffer_bytes(device: torch.device) -> int:
    """1 GiB is 20 times the largest L2 here; an eighth of a small GPU's memory."""
    return min(1 << 30, torch.cuda.get_device_properties(device).total_memory // 8)


def _last_level_cache_bytes() -> int:
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(p.read_text().strip().removesuffix("K")) << 10 for p in sizes), default=0)
