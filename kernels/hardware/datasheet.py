"""Published peaks of GPUs: dense, without sparsity, from each vendor's datasheet."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Peaks:
    """Dense peaks of a device."""

    flops: dict[str, float]  # per second, an FMA counts 2; float32, tf32, bfloat16, float16, float8, int8
    bandwidth_bytes_s: float  # reading main memory; measured on a GPU: bytes read and written by a copy
    source: str
    copy_bytes_s: float | None = None  # read + written


def _sheet(source: str, gbs: float, *, float32: float, tf32: float, half: float,
           float8: float | None = None, int8: float | None = None) -> Peaks:  # fmt: skip
    """Return a row from TFLOP/s and GB/s. `half` is bfloat16 and float16 with float32 accumulation (always equal)."""
    row = {"float32": float32, "tf32": tf32, "bfloat16": half, "float16": half, "float8": float8, "int8": int8}
    return Peaks({name: tflops * 1e12 for name, tflops in row.items() if tflops}, gbs * 1e9, source)


_AMPERE = "NVIDIA Ampere GA102 architecture whitepaper, appendix A, without sparsity"
_ADA = "NVIDIA Ada architecture whitepaper, appendix A, without sparsity"
_HOPPER = "NVIDIA H100 architecture whitepaper, without sparsity"
_A100 = "NVIDIA A100 datasheet, without sparsity"

# Pattern of torch's device name -> dense peaks. The first match is used. Vendors also print sparse figures, twice as
# large: NVIDIA's H100 datasheet says 1,979 for bf16 "with sparsity", which is 989.4 dense. float8 and half use float32
# accumulation; GeForce cards run it at half rate. A pattern excludes weaker cards with similar names ("RTX 4090
# Laptop GPU", "H200 NVL", "H100 NVL", "A10G"): a card without a row is measured.
# Not every figure has been checked again in the document that its row names. Check a row before you quote it.
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
    """Return the row of PEAKS for torch's name of a device, or None."""
    return next((peaks for pattern, peaks in PEAKS.items() if re.search(pattern, name)), None)
