"""The linear layers of one GPT-2 124M pass with 16-, 8- and 4-bit weights, for few and many rows: `peakgpt bench gemm`.

Every layer is read once per pass, so caches help little: few rows are bound by reading the weights, many by arithmetic.
The head is included for few rows, as in decoding. It is left out for many rows, because a prompt needs only one row of
logits. The FLOP/s peak for 8- and 4-bit weights is that of int8 (vpdpbusd). Values are not compared here; the tests and
`bench ops` do that. Kernels are called as in a decoding step, with preallocated outputs: dispatch (10 to 20 us per op,
49 ops) would hide a third of the time to read 4-bit weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from peakgpt.bench.case import Case, expect_cpu, joined
from peakgpt.bench.contenders.contender import Contender
from peakgpt.bench.environment import keep_pages_note
from peakgpt.bench.interleave import OnFailure, interleave
from peakgpt.bench.peak_meter import PeakMeter
from peakgpt.bench.schema import Result
from peakgpt.kernels.command_line import integer
from peakgpt.kernels.ops.linear_grouped import linear_grouped

LAYERS = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12
HEAD = (50257, 768)
MAX_ROWS_WITH_HEAD = 16
Layer = tuple[Callable[[Tensor, Tensor], object], int]  # (function of x and output y, bytes of the weight)


@dataclass(frozen=True)
class GemmCase(Case):
    """One pass of every contender over its layers.

    Args:
        rows: rows of the inputs.
        dtype: of the inputs.
    """

    kind: ClassVar[str] = "gemm"
    rows: int
    dtype: str

    @property
    def name(self) -> str:
        return joined(self.kind, f"rows={self.rows}", self.dtype)

    def all_contenders(self, device: torch.device) -> list[str]:
        return list(GEMM_CONTENDERS)

    @torch.no_grad()
    def _measure(self, device: torch.device, on_failure: OnFailure) -> list[Result]:
        start, note, dtype = time.perf_counter(), keep_pages_note(device), getattr(torch, self.dtype)
        shapes = [*LAYERS, HEAD] if self.rows <= MAX_ROWS_WITH_HEAD else LAYERS
        names = self.contenders(device)
        layers_of = {name: [GEMM_CONTENDERS[name].build(n, k, dtype) for n, k in shapes] for name in names}
        inputs = {k: torch.randn(self.rows, k, dtype=dtype) for _, k in shapes}
        outputs = {n: torch.empty(self.rows, n, dtype=dtype) for n, _ in shapes}

        def run_pass(layers: list[Layer]) -> None:
            for (product, _), (n, k) in zip(layers, shapes, strict=True):
                product(inputs[k], outputs[n])

        contenders = {name: partial(run_pass, layers) for name, layers in layers_of.items()}
        timings = interleave(contenders, rounds=self.rounds, warmup=2, budget_s=self.left_s(start),
                             on_failure=on_failure,
                             peaks=PeakMeter(device, [dtype, torch.int8], memory=True))  # fmt: skip
        return [
            Result.of(
                timing.noted(note), bench="products", contender=name,
                backend="torch" if name.startswith("torch") else "cpu",
                device="cpu", dtype=self.dtype, case={"rows": self.rows},
                flops=2 * self.rows * sum(n * k for n, k in shapes), flops_kind="work",
                bytes=sum(size for _, size in layers_of[name]),
                peak_dtype="int8" if name.startswith("peakgpt, ") else None,
            )
            for name, timing in timings.items()
        ]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=integer(), action="append",
                        help="rows of the input; repeatable; default 1, 8 and 512")  # fmt: skip
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="dtype of the inputs")


def cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    expect_cpu("gemm", device)
    return [GemmCase(rows, args.dtype, rounds=50, seconds=25.0) for rows in args.rows or (1, 8, 512)]


def _plain(n: int, k: int, dtype: torch.dtype) -> Layer:
    from peakgpt.kernels.cpu.gemm import gemm

    w, b = torch.randn(n, k, dtype=dtype) * k**-0.5, torch.randn(n, dtype=dtype)
    return lambda x, y: gemm(x, w.t(), y, bias=b), w.nbytes


def _quantized(bits: int, group: int) -> Callable[[int, int, torch.dtype], Layer]:
    def make(n: int, k: int, dtype: torch.dtype) -> Layer:
        from peakgpt.kernels.cpu.linear_q8 import multiply

        _, w, scale, _, b, _ = linear_grouped.sample(rows=1, width=k, out=n, bits=bits, group=group, offset=False,
                                                     bf16_scales=True, dtype=dtype)  # fmt: skip
        return lambda x, y: multiply(bits, y, x, w, scale, b, group, "none"), w.nbytes + scale.nbytes

    return make


def _torch(n: int, k: int, dtype: torch.dtype) -> Layer:
    w, b = torch.randn(n, k, dtype=dtype) * k**-0.5, torch.randn(n, dtype=dtype)
    return lambda x, y: torch.addmm(b, x, w.t(), out=y), w.nbytes


def _torch_8(n: int, k: int, dtype: torch.dtype) -> Layer:
    """Weight-only int8 of torch (torch._weight_int8pack_mm, bfloat16 only): inputs are not quantized, no bias."""
    w, scale = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n).to(dtype)
    return lambda x, y: torch._weight_int8pack_mm(x, w, scale), w.nbytes + scale.nbytes


# build(n, k, dtype) -> Layer
GEMM_CONTENDERS = {
    "peakgpt": Contender(_plain, package="peakgpt"),
    "peakgpt, 8 bits": Contender(_quantized(8, 64), package="peakgpt"),
    "peakgpt, 4 bits by 64": Contender(_quantized(4, 64), package="peakgpt"),
    "peakgpt, 4 bits by 32": Contender(_quantized(4, 32), package="peakgpt"),
    "torch": Contender(_torch),
    "torch, 8 bits": Contender(_torch_8),
}
