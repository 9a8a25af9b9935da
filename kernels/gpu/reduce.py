"""The second stage of a column sum: partial sums of the programs, added in a fixed order without atomics.

    out[c] = sum_p partial[p, c]      p ascending in blocks, so the result is the same from run to run
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.gpu import launch
from peakgpt.kernels.gpu.launch import AotCase, Tile

# Unmeasured on hardware. 32 columns of float32 are one 128-byte line.
BLOCK_P, BLOCK_C, ROW = 32, 32, Tile(warps=4)


@triton.jit
def column_sum(partial_ptr, first_ptr, second_ptr, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    which = tl.program_id(1)
    partial_ptr += which.to(tl.int64) * P * C
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        live = (p < P)[:, None] & (col < C)[None, :]
        acc += tl.load(partial_ptr + p[:, None].to(tl.int64) * C + col[None, :], mask=live, other=0.0)
    total = tl.sum(acc, 0)
    if which == 0:
        tl.store(first_ptr + col, total.to(first_ptr.dtype.element_ty), mask=col < C)
    else:
        tl.store(second_ptr + col, total.to(second_ptr.dtype.element_ty), mask=col < C)


def sum_partials(partial: Tensor, *outputs: Tensor) -> None:
    """Write the sum over programs of each group of partials.

    Args:
        partial: (G, P, C) float32, contiguous; G is 1 or 2.
        outputs: G tensors (C,), contiguous, of one dtype.
    """
    groups, programs, width = partial.shape
    grid = (triton.cdiv(width, BLOCK_C), groups)
    column_sum[grid](
        partial_ptr=partial, first_ptr=outputs[0], second_ptr=outputs[-1], P=programs, C=width,
        BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=ROW.warps, num_stages=ROW.stages,
    )  # fmt: skip


def partials(x: Tensor, groups: int, programs: int, width: int) -> Tensor:
    """Room for the first stage, on x's device."""
    return torch.empty((groups, programs, width), dtype=torch.float32, device=x.device)


def aot_cases(arch: str) -> Iterator[AotCase]:
    """The static check's cases."""
    constexprs = {"BLOCK_P": BLOCK_P, "BLOCK_C": BLOCK_C}
    yield launch.case(column_sum, "bf16", ROW, "bf16", constexprs, partial_ptr="*fp32")
