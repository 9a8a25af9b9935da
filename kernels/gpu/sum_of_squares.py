"""Sum of squares in Triton: each program sums one range of elements, then a single program adds the partial sums.

Both stages have a fixed order, so the result is the same from run to run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.gpu import block_map, launch
from peakgpt.kernels.gpu.launch import AotCase, Tile

# Not measured on hardware. At most 1024 programs: about eight for each streaming multiprocessor of the largest chips.
PROGRAMS, BLOCK_N, TILE = 1024, 2048, Tile(warps=8)


@triton.jit
def sum_of_squares_partial(x_ptr, partial_ptr, N, range_size, BLOCK_N: tl.constexpr):
    """Store the sum over elements program * range_size .. (program + 1) * range_size - 1."""
    program = tl.program_id(0).to(tl.int64)
    begin = program * range_size
    end = tl.minimum(begin + range_size, N)
    acc = tl.zeros([BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + at, mask=at < end, other=0.0).to(tl.float32)
        acc += x * x
    tl.store(partial_ptr + program, tl.sum(acc, 0))


@triton.jit
def sum_of_squares_partial_each(
    table_ptr, row_ptr, first_ptr, partial_ptr, blocks, range_size, DTYPE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store the sum over blocks program * range_size .. (program + 1) * range_size - 1 of the tensors of a table."""
    program = tl.program_id(0)
    begin = program * range_size
    acc = tl.zeros([BLOCK_N], tl.float32)
    for block in range(begin, tl.minimum(begin + range_size, blocks)):
        row = tl.load(row_ptr + block)
        start, N = (block - tl.load(first_ptr + row)).to(tl.int64) * BLOCK_N, tl.load(table_ptr + 2 * row)
        at, x_ptr = start + tl.arange(0, BLOCK_N), block_map.address(table_ptr + 2 * row + 1, DTYPE, ALIGN)
        if start + BLOCK_N <= N:  # without a mask, its loads have 16 bytes
            x = tl.load(x_ptr + at).to(tl.float32)
        else:
            x = tl.load(x_ptr + at, mask=at < N, other=0.0).to(tl.float32)
        acc += x * x
    tl.store(partial_ptr + program, tl.sum(acc, 0))


@triton.jit
def sum_of_squares_total(partial_ptr, total_ptr, programs, PROGRAMS: tl.constexpr):
    """Add the partial sums of all programs, at most PROGRAMS, to total."""
    at = tl.arange(0, PROGRAMS)
    sums = tl.load(partial_ptr + at, mask=at < programs, other=0.0)
    tl.store(total_ptr, tl.load(total_ptr) + tl.sum(sums, 0))


def objection(x, total) -> str | None:
    if total.dtype != torch.float32:
        return f"takes total in float32, got {total.dtype}"
    return launch.objection(x)


def _shares(blocks: int) -> tuple[int, int]:
    """Return the number of programs and the number of blocks of each; the last program may have fewer."""
    size = max(1, triton.cdiv(blocks, PROGRAMS))
    return max(1, triton.cdiv(blocks, size)), size


def _add_to(total: Tensor, partial: Tensor) -> None:
    sum_of_squares_total[(1,)](
        partial_ptr=partial, total_ptr=total, programs=len(partial), PROGRAMS=PROGRAMS, num_warps=4
    )


def forward(outputs, saved, x, total):
    programs, size = _shares(triton.cdiv(x.numel(), BLOCK_N))
    partial = torch.empty(programs, dtype=torch.float32, device=x.device)
    with launch.device_of(x):
        sum_of_squares_partial[(programs,)](
            x_ptr=x, partial_ptr=partial, N=x.numel(), range_size=size * BLOCK_N, BLOCK_N=BLOCK_N,
            num_warps=TILE.warps, num_stages=TILE.stages,
        )  # fmt: skip
        _add_to(total, partial)


def prepare(table: Tensor, device: torch.device) -> block_map.BlockMap:
    return block_map.BlockMap(table, device, BLOCK_N)


def run_each(blocks, calls, total):
    x, (programs, size) = calls[0][0], _shares(blocks.count)
    partial = torch.empty(programs, dtype=torch.float32, device=total.device)
    with launch.device_of(x):
        sum_of_squares_partial_each[(programs,)](
            table_ptr=blocks.table, row_ptr=blocks.row, first_ptr=blocks.first, partial_ptr=partial,
            blocks=blocks.count, range_size=size, DTYPE=block_map.DTYPES[x.dtype], ALIGN=blocks.align, BLOCK_N=BLOCK_N,
            num_warps=TILE.warps, num_stages=TILE.stages,
        )  # fmt: skip
        _add_to(total, partial)


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Yield the static check's cases."""
    yield launch.case(sum_of_squares_partial, "bf16", TILE, "bf16", {"BLOCK_N": BLOCK_N}, partial_ptr="*fp32", N="i64",
                      range_size="i64")  # fmt: skip
    constants = {"DTYPE": tl.bfloat16, "ALIGN": 16, "BLOCK_N": BLOCK_N}
    yield launch.case(sum_of_squares_partial_each, "bf16", TILE, "bf16", constants, partial_ptr="*fp32",
                      **block_map.AOT_TYPES)  # fmt: skip
    yield launch.case(sum_of_squares_total, "", Tile(warps=4), "fp32", {"PROGRAMS": PROGRAMS}, programs="i32")
