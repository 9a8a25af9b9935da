"""The second stage of a column sum: add the partial sums of all programs, in a fixed order and without atomics.

    out[c] = sum_p partial[p, c]      p in ascending blocks, so the result is the same from run to run
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.gpu import launch
from peakgpt.kernels.gpu.launch import AotCase, Tile

# Not measured on hardware. 32 columns of float32 are one 128-byte line.
BLOCK_P, BLOCK_C, TILE = 32, 32, Tile(warps=4)


@triton.jit
def column_sum(partial_ptr, first_ptr, second_ptr, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Store the sums of group 0 in first_ptr and of group 1 in second_ptr; partial is (groups, P, C)."""
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    group = tl.program_id(1)
    partial_ptr += group.to(tl.int64) * P * C
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        live = (p < P)[:, None] & (col < C)[None, :]
        acc += tl.load(partial_ptr + p[:, None].to(tl.int64) * C + col[None, :], mask=live, other=0.0)
    total = tl.sum(acc, 0)
    if group == 0:
        tl.store(first_ptr + col, total.to(first_ptr.dtype.element_ty), mask=col < C)
    else:
        tl.store(second_ptr + col, total.to(second_ptr.dtype.element_ty), mask=col < C)


def sum_partials(partial: Tensor, *outputs: Tensor) -> None:
    """Write the sum over the programs of each group.

    Args:
        partial: (G, P, C) float32, contiguous: P partial sums in each of G groups; G is 1 or 2.
        outputs: G tensors (C,), contiguous, of one dtype.
    """
    groups, programs, width = partial.shape
    grid = (triton.cdiv(width, BLOCK_C), groups)
    column_sum[grid](
        partial_ptr=partial, first_ptr=outputs[0], second_ptr=outputs[-1], P=programs, C=width,
        BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=TILE.warps, num_stages=TILE.stages,
    )  # fmt: skip


def empty_partials(x: Tensor, groups: int, programs: int, width: int) -> Tensor:
    """Allocate (groups, programs, width) float32 for the first stage, on x's device."""
    return torch.empty((groups, programs, width), dtype=torch.float32, device=x.device)


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Yield the static check's cases."""
    constexprs = {"BLOCK_P": BLOCK_P, "BLOCK_C": BLOCK_C}
    yield launch.case(column_sum, "bf16", TILE, "bf16", constexprs, partial_ptr="*fp32")
