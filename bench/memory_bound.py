"""The memory-bound passes of the CPU backend alone, each beside streams of the same reads and writes.

What `bench ops` times is an op as people call it, with dispatch, autograd and fresh memory; here a kernel's memory is
made before, so that what is left is the kernel. Every call works on the same tensors: what fits a cache stays there.
Values are not compared here: the tests and `bench ops` do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peakgpt.bench.interleave import interleave
from peakgpt.bench.run_results import RunResults
from peakgpt.bench.schema import Result
from peakgpt.kernels.hardware.peaks import stream_peak
from peakgpt.kernels.ops.adamw import adamw as adamw_op

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # DType in csrc/types.h


@dataclass(frozen=True)
class KernelCall:
    """A kernel of the extension with its arguments but for the threads, and what it must move.

    What it changes in place is read and written. Vectors as long as a row are left out.
    """

    kernel: str
    arguments: tuple[Any, ...]  # as the extension takes them, tensors for addresses
    read: Sequence[Tensor | None]
    written: Sequence[Tensor | None] = ()

    def bind(self) -> Callable[[], None]:
        """A call of it; whoever calls keeps this object, and so the tensors, alive."""
        from peakgpt.kernels.cpu.ext import _C

        kernel, threads = getattr(_C, self.kernel), torch.get_num_threads()
        call = [DTYPES[a] if isinstance(a, torch.dtype) else _address(a) for a in self.arguments]
        return lambda: kernel(*call, threads)


def layernorm_forward(dtype, rows: int, width: int, residual: bool = False) -> KernelCall:
    x, w, b, mu, r = _norm_tensors(dtype, rows, width)
    added, total = torch.randn(2, rows, width).to(dtype).unbind() if residual else (None, None)
    y = torch.empty_like(x)
    arguments = (dtype, dtype, rows, width, x, width, added, width, w, b, total, y, mu, r, 1e-5)
    return KernelCall("layernorm_forward", arguments, (x, added), (total, y))


def layernorm_backward(dtype, rows: int, width: int, residual: bool = False) -> KernelCall:
    x, w, b, mu, r = _norm_tensors(dtype, rows, width)
    dy, dsum = torch.randn(2, rows, width).to(dtype).unbind()
    dsum = dsum if residual else None
    dx, dw, db = (torch.empty_like(t) for t in (x, w, b))
    arguments = (dtype, dtype, rows, width, dy, width, dsum, width, x, width, w, mu, r, dx, dw, db)
    return KernelCall("layernorm_backward", arguments, (x, dy, dsum), (dx,))


def _norm_tensors(dtype, rows: int, width: int) -> tuple[Tensor, ...]:
    w, b = torch.randn(2, width).to(dtype).unbind()
    return (3 + torch.randn(rows, width)).to(dtype), w, b, torch.full((rows,), 3.0), torch.ones(rows)


def embedding_forward(dtype, batch: int, tokens: int, width: int, vocab: int) -> KernelCall:
    wte, wpe = torch.randn(vocab, width).to(dtype), torch.randn(tokens, width).to(dtype)
    ids, out = torch.randint(vocab, (batch, tokens)), torch.empty(batch, tokens, width, dtype=dtype)
    arguments = (dtype, batch, tokens, width, ids, wte, width, wpe, width, out, None)
    found = wte[: batch * tokens]  # as much as is read of it
    return KernelCall("embedding_forward", arguments, (found, wpe), (out,))


def cross_entropy(dtype, rows: int, vocab: int, gradient: bool = True) -> KernelCall:
    """The losses, and the logits' gradient in their place; a call finds the gradients that the one before left."""
    logits, target = torch.randn(rows, vocab).to(dtype), torch.randint(vocab, (rows,))
    loss, stats = torch.empty(rows), torch.empty(rows, 2)
    arguments = (dtype, rows, vocab, logits, target, None, -100, loss, stats, gradient, 1.0, 0.0, 0.0)
    return KernelCall("cross_entropy_forward", arguments, (logits,), (logits,) if gradient else ())


def sum_of_squares(dtype, count: int) -> KernelCall:
    x, total = torch.randn(count).to(dtype), torch.zeros(())
    return KernelCall("sum_of_squares", (dtype, count, x, total), (x,))


def adamw(dtype, count: int) -> KernelCall:
    """In bfloat16 with the remainder of the float32 master."""
    param, grad, remainder, m, v, step, _ = adamw_op.sample(count, dtype=dtype)
    arguments = (dtype, count, param, grad, remainder, m, v, step, None, 1e-3, 0.9, 0.999, 1e-8, 0.01, 0.0)
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", choices=sorted(KERNELS), help="repeatable; default all")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="repeatable; default both")
    parser.add_argument("--rounds", type=int, default=15, help="timings of each pass (default 15)")


def run(args: argparse.Namespace, device: torch.device) -> RunResults:
    if device.type != "cpu":
        raise ValueError(f"bench memory_bound times the C++ kernels, expected --device cpu, got {device}")
    dtypes = [getattr(torch, name) for name in args.dtype or ("float32", "bfloat16")]
    cases = [case for case in GPT2_CALLS if case[0] in (args.only or KERNELS)]
    return RunResults([measure(name, sizes, dtype, rounds=args.rounds) for dtype in dtypes for name, sizes in cases])


def measure(name: str, sizes: dict[str, int], dtype: torch.dtype, *, rounds: int = 15) -> Result:
    """Time a pass.

    Args:
        name: of KERNELS.
        sizes: what it takes.
        dtype: float32 or bfloat16.
        rounds: timings at most.
    Returns:
        A result with the bytes that the pass must move, its streaming ceiling, and no FLOPs.
    Raises:
        ImportError: there is no C++ extension.
    """
    made = KERNELS[name](dtype, **sizes)
    read, written = _distinct(made.read), _distinct(made.written)
    updated = _bytes(t for address, t in read.items() if address in written)
    read_bytes, written_bytes = _bytes(read.values()), _bytes(written.values())
    ceiling, streams = stream_peak("cpu", read_bytes, written_bytes, read_bytes + written_bytes - updated,
                                   updated_bytes=updated)  # fmt: skip
    timing = interleave({name: made.bind()}, rounds=rounds, warmup=2)[name]
    return Result.of(
        timing, bench="pass", contender="peakgpt", backend="cpu", device="cpu",
        dtype=str(dtype).removeprefix("torch."), case={"op": name, **sizes}, bytes=read_bytes + written_bytes,
        peak_bytes_s=ceiling, peak_source=f"bytes: {streams}",
    )  # fmt: skip


def _distinct(tensors: Iterable[Tensor | None]) -> dict[int, Tensor]:
    return {t.data_ptr(): t for t in tensors if t is not None}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _address(argument: Any) -> Any:
    """What the extension takes for an argument: the address of a tensor, 0 for None, anything else as it is."""
    return 0 if argument is None else argument.data_ptr() if isinstance(argument, Tensor) else argument
