"""Measured peaks of a device: FLOP/s by dtype, memory bandwidth, and streams of given reads and writes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch

from peakgpt.kernels.hardware.cpu_threads import threads, torch_threads
from peakgpt.kernels.hardware.datasheet import Peaks
from peakgpt.kernels.hardware.device import cpu_has_bfloat16, last_level_cache_bytes, resolve_device
from peakgpt.kernels.hardware.stopwatch import stopwatch

try:
    from peakgpt.kernels.cpu.ext import _C

    isa, peak_loop, peak_stream = _C.isa, _C.peak_loop, _C.peak_stream
except ImportError:  # the extension is optional; `measure` names its absence in the source
    peak_loop = None

WINDOWS = 8  # per method, interleaved: a short disturbance of a shared machine spoils one window of each
WINDOW_S = 0.01
MM_SIZE = {"cpu": 1024, "cuda": 8192}  # of square matrices; the smallest size at which the library is near its peak
STREAM_GAP_BYTES = 17 * 64  # at distances of a power of two streams would share the same cache sets
LOOPS = {"float32": 0, "bfloat16": 1, "int8": 2}  # csrc/ops/peaks.h
Work = tuple[Callable[[], Any], float]  # a function, and the operations or bytes of one call


def has_extension() -> bool:
    """Return whether the C++ loops are available."""
    return peak_loop is not None


def measure(device: torch.device | str | None = None) -> Peaks:
    """Measure the peaks of a device; once per process and number of threads.

    A peak is a maximum, so each figure is the best of several short windows: other work on a shared machine only makes
    a window slower. On a CPU, with the number of threads of a kernel, FLOP/s is the better of a register-resident
    multiply-add loop and torch.mm (which uses matrix units; the loop does not). Bandwidth is measured on far more
    memory than the last-level cache holds. On a GPU it is a large torch.mm on random data, because zeros draw less
    power and allow higher clocks, and a copy.

    Args:
        device: "cpu" (default) or a CUDA device.
    """
    device = resolve_device(device)
    return _measure(device, threads() if device.type == "cpu" else 0)


@functools.cache
def _measure(device: torch.device, threads: int) -> Peaks:
    read, copy = bandwidth_now(device)
    return Peaks(_flops(device, threads), read, measurement_source(device), copy)


def measure_flops(device: torch.device) -> dict[str, float]:
    """Return the FLOP/s by dtype of `measure`, without measuring the bandwidth."""
    return _flops(device, threads() if device.type == "cpu" else 0)


def measure_flops_again(device: torch.device) -> dict[str, float]:
    """Measure FLOP/s once more and return the better of both measurements, which `measure` returns from now on.

    For a program that is faster than the peak: other work took a part of the machine while it was measured.
    """
    known = measure_flops(device)
    known |= {name: max(rate, known.get(name, 0.0)) for name, rate in flops_now(device).items()}
    return known


@functools.cache
def _flops(device: torch.device, threads: int) -> dict[str, float]:
    return flops_now(device)


def measurement_source(device: torch.device) -> str:
    """Describe how the peaks of a device are measured."""
    if device.type == "cuda":
        return "measured: torch.mm, copy"
    if peak_loop is None:
        return f"measured: torch.mm, copy (no C++ extension), {threads()} threads"
    return f"measured: multiply-add loop ({isa()}) or torch.mm, {threads()} threads"


def flops_now(device: torch.device, dtypes: Collection[str] | None = None) -> dict[str, float]:
    """Measure FLOP/s by dtype anew: the better method of each dtype, in about 0.1 s per method.

    Args:
        device: "cpu" or a CUDA device.
        dtypes: names such as "bfloat16"; None means all. A dtype that the device cannot measure is left out.
    """
    works = _mm_works(device)
    if device.type == "cpu" and peak_loop is not None:
        works |= _loop_works(threads())
    chosen = {key: work for key, work in works.items() if dtypes is None or key[0] in dtypes}
    flops: dict[str, float] = {}
    for (name, _method), rate in _best_rates(device, chosen).items():
        flops[name] = max(rate, flops.get(name, 0.0))
    return flops


def bandwidth_now(device: torch.device) -> tuple[float, float]:
    """Measure the bytes/s of main memory anew: (reading, read and written by a copy).

    The rate of reading is measured by the C++ loop only; without it the rate of the copy stands for both.
    """
    if device.type == "cuda":
        works = _torch_memory_works(device, _gpu_buffer_bytes(device))
    else:
        memory_bytes = max(8 * last_level_cache_bytes(), 64 << 20)
        works = (_torch_memory_works(device, memory_bytes) if peak_loop is None
                 else _memory_works(memory_bytes, threads()))  # fmt: skip
    rates = _best_rates(device, works)
    copy = rates["copy", "memory"]
    return rates.get(("read", "memory"), copy), copy


def stream_rate_now(mix: tuple[int, int, int], size_bytes: int, threads: int) -> float:
    """Measure bytes/s of streams anew, with the faster kind of store.

    Args:
        mix: number of streams (read, written, updated in place).
        size_bytes: total size of the streams.
        threads: number of threads that run the loop.
    """
    reads, writes, updates = mix
    stream_bytes = size_bytes // (reads + writes - updates)
    kinds = (False, True) if writes > updates else (False,)
    works = {("stream", f"past caches: {k}"): _stream_work(stream_bytes, *mix, threads, past_caches=k) for k in kinds}
    return max(_best_rates(torch.device("cpu"), {key: _repeated(*work) for key, work in works.items()}).values())


def _repeated(fn: Callable[[], Any], amount: float) -> Work:
    """Repeat a call until it fills a window of WINDOW_S."""
    fn()
    calls = max(1, round(WINDOW_S / stopwatch("cpu")(fn)))

    def run() -> None:
        for _ in range(calls):
            fn()

    return run, calls * amount


def _best_rates(device: torch.device, works: dict[tuple[str, str], Work]) -> dict[tuple[str, str], float]:
    """Return operations or bytes per second in the best window of each work; the first window warms up."""
    seconds = stopwatch(device)
    fastest = dict.fromkeys(works, float("inf"))
    with torch_threads(threads()):
        for _ in range(WINDOWS):
            for key, (fn, _amount) in works.items():
                fastest[key] = min(fastest[key], seconds(fn))
    return {key: amount / fastest[key] for key, (_, amount) in works.items()}


def _mm_works(device: torch.device) -> dict[tuple[str, str], Work]:
    n = MM_SIZE[device.type]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    if device.type == "cpu":  # without bfloat16 instructions torch's bfloat16 GEMM is slow and shows no peak
        dtypes = [torch.float32, torch.bfloat16] if cpu_has_bfloat16() else [torch.float32]
    works = {}
    generator = torch.Generator(device).manual_seed(0)  # measuring must not change the caller's random state
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
        trial_iterations = 100_000
        operations = peak_loop(loop=loop, iterations=trial_iterations, threads=threads)
        if operations == 0 or (name == "bfloat16" and not cpu_has_bfloat16()):  # this CPU computes it in float32
            continue
        run = functools.partial(peak_loop, loop=loop, threads=threads)
        once_s = min(seconds(functools.partial(run, iterations=trial_iterations)) for _ in range(3))
        iterations = max(1, round(trial_iterations * WINDOW_S / once_s))
        works[name, "loop"] = functools.partial(run, iterations=iterations), operations / trial_iterations * iterations
    return works


def _memory_works(size_bytes: int, threads: int) -> dict[tuple[str, str], Work]:
    """Read one stream; copy one stream to another with non-temporal stores."""
    return {
        ("read", "memory"): _stream_work(size_bytes, 1, 0, 0, threads),
        ("copy", "memory"): _stream_work(size_bytes // 2, 1, 1, 0, threads, past_caches=True),
    }


def _stream_work(
    stream_bytes: int, reads: int, writes: int, updates: int, threads: int, *, past_caches: bool = False
) -> Work:
    """Return a loop over streams of `stream_bytes` each, some of them updated in place."""
    stream_bytes = max(256, stream_bytes // 256 * 256)
    stride = stream_bytes + STREAM_GAP_BYTES
    buffer = torch.ones((reads + writes - updates) * stride // 4 + 16)

    def stream() -> None:  # refers to `buffer`, so that it is not freed
        base = -(-buffer.data_ptr() // 64) * 64
        peak_stream(base=base, stride=stride, bytes=stream_bytes, reads=reads, writes=writes, updates=updates,
                    past_caches=past_caches, threads=threads)  # fmt: skip

    return stream, float((reads + writes) * stream_bytes)


def _gpu_buffer_bytes(device: torch.device) -> int:
    """Return 1 GiB, 20 times the largest L2 of PEAKS, or an eighth of a small GPU's memory."""
    return min(1 << 30, torch.cuda.get_device_properties(device).total_memory // 8)
