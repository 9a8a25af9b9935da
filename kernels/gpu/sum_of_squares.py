"""Sum of squares in Triton: a partial sum a program over its own stretch, then one program adds them in order."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from peakgpt.kernels.gpu import launch
from peakgpt.kernels.gpu.launch import AotCase, Tile

# Unmeasured on hardware. 1024 programs: some eight for each SM of the largest chips.
PROGRAMS, BLOCK_N, ROW = 1024, 2048, Tile(warps=8)


@triton.jit
def sum_of_squares_partial(x_ptr, partial_ptr, N, stretch, BLOCK_N: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    begin = program * stretch
    end = tl.minimum(begin + stretch, N)
    acc = tl.zeros([BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + at, mask=at < end, other=0.0).to(tl.float32)
        acc += x * x
    tl.store(partial_ptr + program, tl.sum(acc, 0))


@triton.jit
def sum_of_squares_total(partial_ptr, total_ptr, PROGRAMS: tl.constexpr):
    sums = tl.load(partial_ptr + tl.arange(0, PROGRAMS))
    tl.store(total_ptr, tl.load(total_ptr) + tl.sum(sums, 0))


def objection(x, total) -> str | None:
    if total.dtype != torch.float32:
        return f"takes total in float32, got {total.dtype}"
    return launch.objection(x)


def forward(outputs, saved, x, total):
    # Whole blocks a program; programs past the end write zero.
    stretch = triton.cdiv(triton.cdiv(x.numel(), PROGRAMS), BLOCK_N) * BLOCK_N
    partial = torch.empty(PROGRAMS, dtype=torch.float32, device=x.device)
    with launch.on(x):
        sum_of_squares_partial[(PROGRAMS,)](
            x_ptr=x, partial_ptr=partial, N=x.numel(), stretch=stretch, BLOCK_N=BLOCK_N,
            num_warps=ROW.warps, num_stages=ROW.stages,
        )  # fmt: skip
        sum_of_squares_total[(1,)](partial_ptr=partial, total_ptr=total, PROGRAMS=PROGRAMS, num_warps=4)


def aot_cases(arch: str) -> Iterator[AotCase]:
    """The static check's cases."""
    yield launch.case(sum_of_squares_partial, "bf16", ROW, "bf16", {"BLOCK_N": BLOCK_N}, partial_ptr="*fp32", N="i64",
                      stretch="i64")  # fmt: skip
    yield launch.case(sum_of_squares_total, "", Tile(warps=4), "fp32", {"PROGRAMS": PROGRAMS})
