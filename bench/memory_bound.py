"""Memory-bound kernels of the CPU backend versus streams of the same reads and writes: `peakgpt bench memory_bound`.

`bench ops` times an op as users call it, with dispatch, autograd and new memory. Here only the kernel is timed, on
preallocated memory. Every call uses the same tensors, so tensors that fit into a cache stay there. Values are not
compared here; the tests and `bench ops` do that.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from peakgpt.bench.case import Case, expect_cpu, joined, sizes_text
from peakgpt.bench.interleave import OnFailure, interleave
from peakgpt.bench.peak_meter import PeakMeter
from peakgpt.bench.run_results import OURS
from peakgpt.bench.schema import Result
from peakgpt.kernels.hardware.peaks import Streams
from peakgpt.kernels.ops.adamw import adamw as adamw_op

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # DType in csrc/base/types.h


@dataclass(frozen=True)
class KernelCall:
    """A kernel of the extension, its arguments except the threads, and the tensors that it must read and write.

    Tensors changed in place count as read and written. Vectors as long as a row are left out.
    """

    kernel: str
    arguments: dict[str, Any]  # as the extension takes them
    read: Sequence[Tensor | None]
    written: Sequence[Tensor | None] = ()

    def bind(self) -> Callable[[], None]:
        """Return a function that calls the kernel. The caller keeps this object, and so the tensors, alive."""
        from peakgpt.kernels.cpu.ext import _C, threads

        kernel, count = getattr(_C, self.kernel), threads()
        return lambda: kernel(**self.arguments, threads=count)


def layernorm_forward(dtype, rows: int, width: int, residual: bool = False) -> KernelCall:
    x, w, b, mu, r = _norm_tensors(dtype, rows, width)
    added, total = torch.randn(2, rows, width).to(dtype).unbind() if residual else (None, None)
    y = torch.empty_like(x)
    arguments = {"dtype": DTYPES[dtype], "w_dtype": DTYPES[dtype], "rows": rows, "width": width, "x": x,
                 "x_stride": width, "w": w, "y": y, "r": r, "eps": 1e-5, "b": b, "residual": added,
                 "residual_stride": width, "sum": total, "mu": mu}  # fmt: skip
    return KernelCall("norm_forward", arguments, (x, added), (total, y))


def layernorm_backward(dtype, rows: int, width: int, residual: bool = False) -> KernelCall:
    x, w, b, mu, r = _norm_tensors(dtype, rows, width)
    dy, dsum = torch.randn(2, rows, width).to(dtype).unbind()
    dsum = dsum if residual else None
    dx, dw, db = (torch.empty_like(t) for t in (x, w, b))
    arguments = {"dtype": DTYPES[dtype], "w_dtype": DTYPES[dtype], "rows": rows, "width": width, "dy": dy,
                 "dy_stride": width, "x": x, "x_stride": width, "w": w, "r": r, "dsum": dsum, "dsum_stride": width,
                 "mu": mu, "dx": dx, "dw": dw, "db": db}  # fmt: skip
    return KernelCall("norm_backward", arguments, (x, dy, dsum), (dx,))


def _norm_tensors(dtype, rows: int, width: int) -> tuple[Tensor, ...]:
    w, b = torch.randn(2, width).to(dtype).unbind()
    return (3 + torch.randn(rows, width)).to(dtype), w, b, torch.full((rows,), 3.0), torch.ones(rows)


def embedding_forward(dtype, batch: int, tokens: int, width: int, vocab: int) -> KernelCall:
    wte, wpe = torch.randn(vocab, width).to(dtype), torch.randn(tokens, width).to(dtype)
    ids, out = torch.randint(vocab, (batch, tokens)), torch.empty(batch, tokens, width, dtype=dtype)
    arguments = {"dtype": DTYPES[dtype], "batch": batch, "tokens": tokens, "width": width, "ids": ids, "wte": wte,
                 "wte_stride": width, "out": out, "wpe": wpe, "wpe_stride": width}  # fmt: skip
    rows_read = wte[: batch * tokens]  # the rows that are read, at most
    return KernelCall("embedding_forward", arguments, (rows_read, wpe), (out,))


def cross_entropy(dtype, rows: int, vocab: int, gradient: bool = True) -> KernelCall:
    """Compute losses, and write the gradient over the logits: a later call reads the gradient of the previous one."""
    logits, target = torch.randn(rows, vocab).to(dtype), torch.randint(vocab, (rows,))
    loss, stats = torch.empty(rows), torch.empty(rows, 2)
    arguments = {"dtype": DTYPES[dtype], "rows": rows, "vocab": vocab, "logits": logits, "target": target,
                 "ignore_index": -100, "loss": loss, "stats": stats, "with_gradient": gradient,
                 "smoothing": 0.0, "z_loss": 0.0}  # fmt: skip
    return KernelCall("cross_entropy_forward", arguments, (logits,), (logits,) if gradient else ())


def sum_of_squares(dtype, count: int) -> KernelCall:
    x, total = torch.randn(count).to(dtype), torch.zeros(())
    return KernelCall("sum_of_squares", {"dtype": DTYPES[dtype], "count": count, "x": x, "total": total}, (x,))


def adamw(dtype, count: int) -> KernelCall:
    """Update the parameters; in bfloat16 with the remainder of the float32 master weights."""
    param, grad, remainder, m, v, step, _ = adamw_op.sample(count, dtype=dtype)
    arguments = {"dtype": DTYPES[dtype], "count": count, "param": param, "grad": grad, "exp_avg": m, "exp_avg_sq": v,
                 "step": step, "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01,
                 "remainder": remainder}  # fmt: skip
    return KernelCall("adamw", arguments, (param, remainder, m, v, grad), (param, remainder, m, v))


KERNELS = {
    f.__name__: f
    for f in (layernorm_forward, layernorm_backward, embedding_forward, cross_entropy, sum_of_squares, adamw)
}
# GPT-2 124M: 1024 tokens stay in the last-level cache, 16384 do not.
GPT2_CALLS: list[tuple[str, dict[str, int]]] = [
    *((name, {"rows": rows, "width": 768, **more})
      for name in ("layernorm_forward", "layernorm_backward")
      for more in ({}, {"residual": True}) for rows in (1024, 4096, 16384)),
    *(("embedding_forward", {"batch": batch, "tokens": 1024, "width": 768, "vocab": 50304}) for batch in (1, 16)),
    *(("cross_entropy", {"rows": rows, "vocab": 50304}) for rows in (64, 512)),
    ("cross_entropy", {"rows": 512, "vocab": 50304, "gradient": False}),
    *(("sum_of_squares", {"count": count}) for count in (1 << 21, 124_475_904)),
    *(("adamw", {"count": count}) for count in (1 << 18, 124_475_904)),
]  # fmt: skip


@dataclass(frozen=True)
class KernelCase(Case):
    """One kernel, compared with the bandwidth of streams of the same bytes. There is one contender and no check.

    Args:
        kernel: key of KERNELS.
        sizes: arguments of KERNELS[kernel].
        dtype: "float32" or "bfloat16".
    """

    kind: ClassVar[str] = "memory_bound"
    kernel: str
    sizes: Mapping[str, int]
    dtype: str

    @property
    def name(self) -> str:
        return joined(self.kind, self.kernel, sizes_text(self.sizes), self.dtype)

    def all_contenders(self, device: torch.device) -> list[str]:
        return [OURS]

    def _measure(self, device: torch.device, on_failure: OnFailure) -> list[Result]:
        """
        Raises:
            ImportError: the C++ extension is missing.
        """
        start = time.perf_counter()
        call = KERNELS[self.kernel](getattr(torch, self.dtype), **self.sizes)
        read, written = _distinct(call.read), _distinct(call.written)
        updated = _bytes(t for address, t in read.items() if address in written)
        read_bytes, written_bytes = _bytes(read.values()), _bytes(written.values())
        streams = Streams.of(read_bytes, written_bytes, read_bytes + written_bytes - updated, updated_bytes=updated)
        timing = interleave({OURS: call.bind()}, rounds=self.rounds, warmup=2, budget_s=self.left_s(start),
                            peaks=PeakMeter(device, streams=streams))[OURS]  # fmt: skip
        return [Result.of(
            timing, bench="pass", contender=OURS, backend="cpu", device="cpu", dtype=self.dtype,
            case={"op": self.kernel, **self.sizes}, bytes=read_bytes + written_bytes,
        )]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", choices=sorted(KERNELS), help="repeatable; default all")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="repeatable; default both")


def cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    expect_cpu("memory_bound", device)
    return [
        KernelCase(kernel, sizes, dtype, rounds=15)
        for dtype in args.dtype or ("float32", "bfloat16")
        for kernel, sizes in GPT2_CALLS
        if kernel in (args.only or KERNELS)
    ]


def _distinct(tensors: Iterable[Tensor | None]) -> dict[int, Tensor]:
    return {t.data_ptr(): t for t in tensors if t is not None}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
