"""The products of one pass of GPT-2 124M, one after the other, with weights of 16, 8 and 4 bits, for few rows and many.

No layer is read twice before all the others were, so a caches' worth of weights helps little: few rows are bound by the
reading of the weights, many by arithmetic. The head is one of the products where rows are few, as in decoding; a
prompt's needs one row of it, and it is left out. Peaks are those of bytes (vpdpbusd) for 8 and 4 bits. Values are not
compared here: the tests and `bench ops` do. Kernels are called as a decode step calls them, results in memory that is
there: what an op costs to call (10 to 20 us, 49 times) would hide a third of the reading of 4 bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from peakgpt.bench.findings import Findings
from peakgpt.kernels.cpu.memory import keep_pages
from peakgpt.kernels.hardware.clock import Result, interleave
from peakgpt.kernels.hardware.device import peak_for
from peakgpt.kernels.ops.linear_quantized import linear_q4, linear_q8
from peakgpt.kernels.ops.quantize import BLOCK

LAYERS = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12
HEAD = (50257, 768)
FEW = 16  # rows up to which the head is a part
Layer = tuple[Callable[[Tensor, Tensor], object], int]  # the product of x, into y; the bytes of its weight


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, action="append", help="repeatable; default 1, 8 and 512")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of the inputs")
    parser.add_argument("--seconds", type=float, default=25.0, help="for each number of rows (default 25)")


def run(args: argparse.Namespace, device: torch.device) -> Findings:
    if device.type != "cpu":
        raise ValueError(f"bench products: got device {device}, expected cpu")
    reason = keep_pages()
    found, dtype = Findings(), getattr(torch, args.dtype)
    made = {name: [make(n, k, dtype) for n, k in [*LAYERS, HEAD]] for name, make in CONTENDERS.items()}
    for rows in args.rows or (1, 8, 512):
        found.results += compare(made, rows, dtype, budget_s=args.seconds)
    said = f"the allocator is left as it is: {reason}" if reason else "freed memory is kept, for every contender"
    found.results = [replace(r, note="; ".join(filter(None, [r.note, said]))) for r in found.results]
    return found


@torch.no_grad()
def compare(made: dict[str, list[Layer]], rows: int, dtype: torch.dtype, *, budget_s: float) -> list[Result]:
    """Time one pass of every contender over its layers.

    Args:
        made: contender -> LAYERS, then HEAD.
        rows, dtype: of the inputs.
        budget_s: see clock.interleave.
    """
    shapes = [*LAYERS, HEAD] if rows <= FEW else LAYERS
    inputs = {k: torch.randn(rows, k, dtype=dtype) for _, k in shapes}
    results = {n: torch.empty(rows, n, dtype=dtype) for n, _ in shapes}

    def go(layers: list[Layer]) -> None:
        for (product, _), (n, k) in zip(layers, shapes, strict=False):
            product(inputs[k], results[n])

    contenders = {name: (lambda layers=layers: go(layers)) for name, layers in made.items()}
    timings = interleave(contenders, rounds=50, warmup=2, budget_s=budget_s)
    peaks = {name: peak_for("cpu", torch.int8 if name.startswith("peakgpt, ") else dtype) for name in contenders}
    return [
        Result.of(
            timing, bench="products", contender=name, backend="torch" if name.startswith("torch") else "cpu",
            device="cpu", dtype=str(dtype).removeprefix("torch."), case={"rows": rows},
            flops=2 * rows * sum(n * k for n, k in shapes), flops_kind="work",
            bytes=sum(size for (_, size), _ in zip(made[name], shapes, strict=False)),
            peak_flops_s=peaks[name].flops_s, peak_bytes_s=peaks[name].bandwidth_bytes_s,
            peak_source=peaks[name].source,
        )
        for name, timing in timings.items()
    ]  # fmt: skip


def _plain(n: int, k: int, dtype: torch.dtype) -> Layer:
    from peakgpt.kernels.cpu.gemm import gemm

    w, b = torch.randn(n, k, dtype=dtype) * k**-0.5, torch.randn(n, dtype=dtype)
    return lambda x, y: gemm(x, w.t(), y, bias=b), w.nbytes


def _quantized(bits: int, group: int) -> Callable[[int, int, torch.dtype], Layer]:
    def make(n: int, k: int, dtype: torch.dtype) -> Layer:
        from peakgpt.kernels.cpu.linear_q8 import multiply

        more = {} if bits == 8 else {"group": group}
        _, w, scale, b = (linear_q8 if bits == 8 else linear_q4).sample(rows=1, width=k, out=n, dtype=dtype, **more)
        return lambda x, y: multiply(bits, y, x, w, scale, b, group, "none"), w.nbytes + scale.nbytes

    return make


def _torch(n: int, k: int, dtype: torch.dtype) -> Layer:
    w, b = torch.randn(n, k, dtype=dtype) * k**-0.5, torch.randn(n, dtype=dtype)
    return lambda x, y: torch.addmm(b, x, w.t(), out=y), w.nbytes


def _torch_8(n: int, k: int, dtype: torch.dtype) -> Layer:
    """torch's weight-only product (torch._weight_int8pack_mm, bfloat16 only): inputs stay as they are, no bias."""
    w, scale = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n).to(dtype)
    return lambda x, y: torch._weight_int8pack_mm(x, w, scale), w.nbytes + scale.nbytes


CONTENDERS: dict[str, Callable[[int, int, torch.dtype], Layer]] = {
    "peakgpt": _plain,
    "peakgpt, 8 bits": _quantized(8, BLOCK),
    "peakgpt, 4 bits by 64": _quantized(4, 64),
    "peakgpt, 4 bits by 32": _quantized(4, 32),
    "torch": _torch,
    "torch, 8 bits": _torch_8,
}
