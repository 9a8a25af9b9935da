"""The device and its peaks: the datasheet table, the choice of the denominators, and plausible measured peaks."""

import functools
import itertools
import types

import pytest
import torch

from peakgpt.kernels.hardware import datasheet, device, measured_peaks, peaks
from peakgpt.kernels.hardware.datasheet import PEAKS, Peaks
from peakgpt.kernels.hardware.peaks import Streams

DENSE_BF16_TFLOPS = {
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A10": 125,
    "NVIDIA L4": 121,
    "NVIDIA L40S": 362.05,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989.4,
    "NVIDIA B200": 2250,
    "AMD Instinct MI300X": 1307.4,
}
# Weaker or different cards with similar names. They have no row, so they are measured.
SIMILAR_NAMES = ("NVIDIA A10G", "NVIDIA L40", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 Laptop GPU",
           "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 5090 D", "NVIDIA H100 NVL", "NVIDIA H200 NVL",
           "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GB200", "NVIDIA GH200 480GB", "Tesla T4")  # fmt: skip


@pytest.mark.parametrize("name", DENSE_BF16_TFLOPS)
def test_device_name_selects_its_datasheet_row(name):
    assert datasheet.datasheet(name).flops["bfloat16"] == DENSE_BF16_TFLOPS[name] * 1e12


def test_every_datasheet_row_is_tested():
    assert {id(datasheet.datasheet(name)) for name in DENSE_BF16_TFLOPS} == {id(row) for row in PEAKS.values()}


@pytest.mark.parametrize("name", SIMILAR_NAMES)
def test_similar_device_name_selects_no_row(name):
    assert datasheet.datasheet(name) is None


def test_h100_sxm_and_pcie_have_different_peaks():
    sxm, pcie = datasheet.datasheet("NVIDIA H100 80GB HBM3"), datasheet.datasheet("NVIDIA H100 PCIe")
    assert sxm.flops["float8"] > pcie.flops["float8"] and sxm.bandwidth_bytes_s > pcie.bandwidth_bytes_s


@pytest.mark.parametrize("row", PEAKS.values(), ids=PEAKS.keys())
def test_datasheet_row_is_dense_and_consistent(row):
    """A narrower dtype is never slower, and tensor cores run twice as fast at half the width. A sparse figure fails."""
    flops = row.flops
    rates = [flops[k] for k in ("float32", "tf32", "bfloat16", "float8") if k in flops]
    assert all(wide <= narrow for wide, narrow in itertools.pairwise(rates))
    assert flops["float16"] == flops["bfloat16"] <= flops["int8"]
    assert flops["bfloat16"] / flops["tf32"] == pytest.approx(2, rel=0.05)
    if "float8" in flops:
        assert flops["float8"] / flops["bfloat16"] == pytest.approx(2, rel=0.05)
    assert 1e11 < row.bandwidth_bytes_s < 1e13 and row.source


def test_describe_returns_the_cpu_by_default():
    cpu = device.describe()
    assert cpu == device.describe("cpu") and cpu.kind == "cpu"
    assert cpu.name and cpu.arch and cpu.cores >= 1 and cpu.memory_bytes > 1 << 28
    assert cpu.versions["torch"] == torch.__version__


def test_describe_unknown_device_raises():
    with pytest.raises(ValueError, match="cpu or cuda device, got 'meta'"):
        device.describe("meta")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="got 'cuda', and torch sees no CUDA device"):
            device.describe("cuda")


@pytest.fixture
def set_measured_peaks(monkeypatch):
    """Replace the measurement by given peaks of a given device."""

    def replace(flops, kind="cpu", name="AMD EPYC"):
        measured = Peaks(flops, 30e9, "measured: here", 40e9)
        monkeypatch.setattr(peaks, "resolve_device", lambda d: torch.device(kind))
        monkeypatch.setattr(peaks, "measure", lambda d: measured)
        monkeypatch.setattr(peaks, "describe", lambda d: device.Device(kind, name, "", 1, 1, "", {}))

    return replace


def test_peak_for_cpu_is_measured(set_measured_peaks):
    set_measured_peaks({"float32": 2e11, "bfloat16": 4e11})
    peak = peaks.peak_for("cpu", torch.bfloat16)
    assert (peak.flops_s, peak.measured_flops_s, peak.source) == (4e11, 4e11, "measured: here")
    assert peak.bandwidth_bytes_s == 30e9
    assert peaks.peak_for("cpu", "float32").flops_s == 2e11


def test_peak_for_cpu_without_bfloat16_says_float32(set_measured_peaks):
    set_measured_peaks({"float32": 2e11})
    peak = peaks.peak_for("cpu", torch.bfloat16)
    assert peak.flops_s == 2e11 and "that of float32" in peak.source


def test_peak_for_known_gpu_has_datasheet_and_measured_peaks(set_measured_peaks):
    set_measured_peaks({"float32": 5e13, "bfloat16": 7e14}, "cuda", "NVIDIA H100 80GB HBM3")
    peak = peaks.peak_for("cuda", torch.bfloat16)
    assert (peak.flops_s, peak.measured_flops_s) == (989.4e12, 7e14)
    assert (peak.bandwidth_bytes_s, peak.measured_bandwidth_bytes_s) == (3352e9, 30e9)
    assert "H100" in peak.source and "without sparsity" in peak.source
    eight_bits = peaks.peak_for("cuda", torch.float8_e4m3fn)
    assert eight_bits.flops_s == 1978.9e12 and eight_bits.measured_flops_s is None


def test_peak_for_unknown_gpu_is_measured(set_measured_peaks):
    set_measured_peaks({"float32": 5e13, "bfloat16": 6e13}, "cuda", "NVIDIA H100 NVL")
    peak = peaks.peak_for("cuda", torch.bfloat16)
    assert (peak.flops_s, peak.source) == (6e13, "measured: here")
    with pytest.raises(ValueError, match=r"\(float32, bfloat16\), got float8"):
        peaks.peak_for("cuda", torch.float8_e5m2)


def test_best_rates_interleaves_works_and_takes_the_best_window_of_each(monkeypatch):
    order = []

    def seconds(fn):
        return fn()

    def work(name, windows):
        windows = iter(windows)

        def run():
            order.append(name)
            return next(windows)

        return run

    monkeypatch.setattr(measured_peaks, "stopwatch", lambda d: seconds)
    monkeypatch.setattr(measured_peaks, "WINDOWS", 3)
    works = {
        ("float32", "mm"): (work("a", [4.0, 2.0, 8.0]), 6.0),
        ("copy", "memory"): (work("b", [1.0, 2.0, 3.0]), 5.0),
    }
    assert measured_peaks._best_rates(torch.device("cpu"), works) == {("float32", "mm"): 3.0, ("copy", "memory"): 5.0}
    assert "".join(order) == "ababab"


def test_measured_peak_is_that_of_the_faster_method(monkeypatch):
    rates = {("float32", "mm"): 3.0, ("float32", "loop"): 4.0, ("bfloat16", "mm"): 9.0, ("bfloat16", "loop"): 8.0}
    works = dict.fromkeys(rates, (None, 1.0))
    monkeypatch.setattr(measured_peaks, "_mm_works", lambda device: {k: w for k, w in works.items() if "mm" in k})
    monkeypatch.setattr(measured_peaks, "_loop_works", lambda threads: {k: w for k, w in works.items() if "loop" in k})
    monkeypatch.setattr(measured_peaks, "_best_rates", lambda device, works: {key: rates[key] for key in works})
    monkeypatch.setattr(measured_peaks, "peak_loop", print)
    cpu = torch.device("cpu")
    assert measured_peaks.flops_now(cpu) == {"float32": 4.0, "bfloat16": 9.0}
    assert measured_peaks.flops_now(cpu, ["bfloat16"]) == {"bfloat16": 9.0}


def test_rate_of_a_copy_stands_for_reading_without_the_extension(monkeypatch):
    rates = {("copy", "memory"): 5.0}
    monkeypatch.setattr(measured_peaks, "_torch_memory_works", lambda device, size: {})
    monkeypatch.setattr(measured_peaks, "_memory_works", lambda size, threads: {})
    monkeypatch.setattr(measured_peaks, "_best_rates", lambda device, works: rates)
    assert measured_peaks.bandwidth_now(torch.device("cpu")) == (5.0, 5.0)
    rates["read", "memory"] = 2.0
    assert measured_peaks.bandwidth_now(torch.device("cpu")) == (2.0, 5.0)


@pytest.mark.parametrize("extension", [None, print])
def test_bandwidth_is_measured_on_8_times_the_last_level_cache(extension, monkeypatch):
    sizes = []
    monkeypatch.setattr(measured_peaks, "peak_loop", extension)
    monkeypatch.setattr(measured_peaks, "last_level_cache_bytes", lambda: 100 << 20)
    monkeypatch.setattr(measured_peaks, "_torch_memory_works", lambda device, size: sizes.append(size))
    monkeypatch.setattr(measured_peaks, "_memory_works", lambda size, threads: sizes.append(size))
    monkeypatch.setattr(measured_peaks, "_best_rates", lambda device, works: {("copy", "memory"): 5.0})
    measured_peaks.bandwidth_now(torch.device("cpu"))
    assert sizes == [800 << 20]


@functools.cache
def measured():
    return measured_peaks.measure("cpu")


def test_measured_cpu_peak_is_plausible():
    """1 GFLOP/s is a core of the nineties. No CPU reaches 100 TFLOP/s or 10 TB/s, but an optimized-away loop would."""
    cpu_peaks = measured()
    assert all(1e9 < rate < 1e14 for rate in cpu_peaks.flops.values()) and "float32" in cpu_peaks.flops
    assert 1e8 < cpu_peaks.bandwidth_bytes_s < 1e13 and 1e8 < cpu_peaks.copy_bytes_s < 1e13
    assert "measured" in cpu_peaks.source and measured_peaks.measure("cpu") is cpu_peaks


def test_measuring_without_the_extension_keeps_the_random_state(monkeypatch):
    monkeypatch.setattr(measured_peaks, "peak_loop", None)
    state = torch.get_rng_state()
    peaks = measured_peaks._measure.__wrapped__(torch.device("cpu"), torch.get_num_threads())
    assert torch.equal(torch.get_rng_state(), state)  # else computing the MFU would change a run
    assert "no C++ extension" in peaks.source and 1e9 < peaks.flops["float32"] < 1e14


needs_extension = pytest.mark.skipif(measured_peaks.peak_loop is None, reason="no C++ extension")


@needs_extension
@pytest.mark.parametrize("loop", measured_peaks.LOOPS.values(), ids=measured_peaks.LOOPS.keys())
def test_loop_counts_every_thread_and_iteration(loop):
    once = measured_peaks.peak_loop(loop=loop, iterations=1, threads=1)
    # One iteration: 12 independent multiply-adds (2 operations) of 1 to 16 lanes with 1, 2 or 4 products each.
    assert once in {2 * 12 * lanes * 2**loop for lanes in (1, 4, 8, 16)} or (
        once == 0 and loop == measured_peaks.LOOPS["int8"]
    )
    assert measured_peaks.peak_loop(loop=loop, iterations=1000, threads=3) == 3000 * once


@needs_extension
@pytest.mark.parametrize("units", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("past_caches", [False, True])
@pytest.mark.parametrize(
    ("reads", "writes", "updates"), [(1, 0, 0), (0, 1, 0), (1, 1, 0), (3, 2, 0), (3, 2, 1), (2, 2, 2)]
)
def test_streams_read_and_write_every_element_once(reads, writes, updates, units, threads, past_caches):
    """For any number of threads, each written element is 1 plus the sum of the elements read, and the gap stays."""
    n, gap = units * 64, 64
    initial = torch.arange(float((reads + writes - updates) * (n + gap))).view(-1, n + gap)
    streams, expected = aligned(initial), initial.clone()
    expected[reads - updates :, :n] = 1 + initial[:reads, :n].sum(0)
    measured_peaks.peak_stream(
        base=streams.data_ptr(), stride=4 * (n + gap), bytes=4 * n, reads=reads, writes=writes, updates=updates,
        past_caches=past_caches, threads=threads,
    )  # fmt: skip
    assert torch.equal(streams, expected)


def aligned(tensor):
    """A copy with the 64-byte alignment that non-temporal stores need."""
    buffer = torch.empty(tensor.numel() + 16)
    return buffer[-buffer.data_ptr() % 64 // 4 :][: tensor.numel()].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize(
    ("read", "written", "updated", "mix"),
    [(10, 0, 0, (1, 0, 0)), (0, 3, 0, (0, 1, 0)), (8, 8, 0, (1, 1, 0)), (64, 32, 0, (2, 1, 0)),
     (3e6, 3.01e6, 0, (1, 1, 0)), (5e6, 1e8, 0, (0, 1, 0)), (16, 12, 12, (4, 3, 3)), (8, 8, 4, (2, 2, 1))],
)  # fmt: skip
def test_mix_rounds_to_the_nearest_whole_streams(read, written, updated, mix):
    assert peaks._mix(read, written, updated) == mix


@needs_extension
@pytest.mark.parametrize("in_place", [False, True])
def test_streams_are_measured_with_both_kinds_of_store(in_place, monkeypatch):
    """Bytes are reads plus writes. The faster kind of store counts; streams in place have ordinary stores only."""
    stream_calls = []

    def stream(**arguments):
        mix = tuple(arguments[key] for key in ("reads", "writes", "updates"))
        stream_calls.append((arguments["bytes"], mix, arguments["past_caches"]))

    def seconds(fn, calls=1):
        fn()
        return 0.005 if stream_calls[-1][-1] else 0.01

    monkeypatch.setattr(measured_peaks, "peak_stream", stream)
    monkeypatch.setattr(measured_peaks, "stopwatch", lambda d: seconds)
    mix, size = (2, 1, int(in_place)), (3 << 20) // (2 if in_place else 3)
    rate = measured_peaks.stream_rate_now(mix, 3 << 20, threads=2)
    assert {call[:2] for call in stream_calls} == {(size, mix)}
    assert {past_caches for *_, past_caches in stream_calls} == {False, not in_place}
    # A window is 10 ms. The slower kind of store runs once in it; the faster one runs twice and takes 5 ms here.
    assert rate == (3 * size / 0.01 if in_place else 2 * 3 * size / 0.005)


@needs_extension
def test_measured_rate_of_streams_is_plausible():
    """That a cache is faster than memory is not tested: on a shared machine it is not true for seconds at a time."""
    assert all(1e8 < measured_peaks.stream_rate_now((1, 1, 0), size, 2) < 1e13 for size in (2 << 20, 128 << 20))


@pytest.mark.parametrize("updated", [0, 32])
def test_streams_describe_their_mix_and_size(updated, monkeypatch):
    monkeypatch.setattr(peaks, "last_level_cache_bytes", lambda: 8 << 20)
    streams = Streams.of(64, 32, 3 << 20, updated_bytes=updated)
    in_place = ", 1 in place" if updated else ""
    assert streams.mix == (2, 1, int(bool(updated)))
    assert streams.description == f"2 streams read and 1 written{in_place}, 3 MiB"
    assert Streams.of(640, 320, (3 << 20) - 5, updated_bytes=10 * updated) == streams, "one size class"
    assert Streams.of(64, 32, 1 << 40).description.endswith(" 64 MiB")


@pytest.mark.parametrize("cache", [0, 32 << 20, 260 << 20])
def test_stream_size_follows_the_working_set(cache, monkeypatch):
    """Streams have the size of the working set, in steps of 1/16 of the last-level cache, up to 8 times the cache."""
    monkeypatch.setattr(peaks, "last_level_cache_bytes", lambda: cache)
    step = max(cache, 8 << 20) // 16
    sizes = [Streams.of(1, 1, size).size_bytes for size in (1, 3 * step, 3 * step + 1, 1 << 40)]
    assert sizes == [step, 3 * step, 4 * step, 128 * step]


def test_streams_of_invalid_bytes_raise():
    for read, written in ((0, 0), (-1, 5)):
        with pytest.raises(ValueError, match=f"expected bytes to read or write, got {read} and {written}"):
            Streams.of(read, written, 1)
    with pytest.raises(ValueError, match="expected updates among 1 read and 2 written, got 2"):
        Streams.of(1, 2, 1, updated_bytes=2)


def test_float32_matmul_precision_is_restored_after_error():
    before, inside = torch.backends.cuda.matmul.fp32_precision, []

    def fail():
        inside.append(torch.backends.cuda.matmul.fp32_precision)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measured_peaks._with_precision("tf32", fail)
    assert inside == ["tf32"] and torch.backends.cuda.matmul.fp32_precision == before


def test_nvidia_smi_uses_uuid_and_may_fail(monkeypatch):
    """Under CUDA_VISIBLE_DEVICES nvidia-smi and torch number the GPUs differently."""
    commands = []

    def run(command, **_):
        commands.append(command)
        return types.SimpleNamespace(stdout="1980 MHz, 700.00 W\n")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: types.SimpleNamespace(uuid="12ab"))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(device.subprocess, "run", run)
    gpu = torch.device("cuda", 1)
    assert device._nvidia_smi(gpu, "clocks.sm", "power.limit") == {"clocks.sm": "1980 MHz", "power.limit": "700.00 W"}
    assert commands[0][:3] == ["nvidia-smi", "-i", "GPU-12ab"]

    def missing(command, **_):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(device.subprocess, "run", missing)
    assert device._nvidia_smi(gpu, "clocks.sm") == {}
    assert device.gpu_clocks("cpu") == {}


def test_measuring_again_keeps_the_better_of_both(monkeypatch):
    cpu, rates = torch.device("cpu"), {"float32": 2.0, "bfloat16": 5.0}
    monkeypatch.setattr(measured_peaks, "_flops", lambda device, threads: rates)
    monkeypatch.setattr(measured_peaks, "flops_now", lambda device: {"float32": 3.0, "bfloat16": 4.0})
    assert peaks.peak_flops_s(cpu, torch.float32) == 2.0
    assert peaks.peak_flops_s(cpu, torch.float32, again=True) == 3.0
    assert measured_peaks.measure_flops(cpu) == {"float32": 3.0, "bfloat16": 5.0}
