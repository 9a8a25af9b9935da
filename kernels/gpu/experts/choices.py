"""Sorting the choices of experts, and adding up the experts' results for each token, in Triton.

The host reads nothing: the number of rows of each expert stays on the device. Up to SORT_LIMIT choices one kernel ranks
every choice by comparing it with all others, in one launch instead of the several of a radix sort: with 8,192 choices
67 million comparisons. More choices take torch.sort. Both are stable, so both give the same order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.gpu import launch
from peakgpt.kernels.gpu.launch import AotCase, Tile

# Not measured on hardware.
SORT_LIMIT = 1 << 13
BLOCK_I, BLOCK_J, SORT = 64, 128, Tile(warps=4)
BLOCK_C, COMBINE = 1024, Tile(warps=4)


@triton.jit
def experts_sort(ids_ptr, order_ptr, position_ptr, offsets_ptr, S, E, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """Rank BLOCK_I choices, or count the choices before each of BLOCK_I experts."""
    ranks = tl.cdiv(S, BLOCK_I)
    is_rank = tl.program_id(0) < ranks
    i = tl.where(is_rank, tl.program_id(0), tl.program_id(0) - ranks) * BLOCK_I + tl.arange(0, BLOCK_I)
    # An expert's first row is the rank of a choice of it that comes before all others.
    mine = tl.load(ids_ptr + i, mask=is_rank & (i < S), other=0).to(tl.int32)
    mine = tl.where(is_rank, mine, i)
    index = tl.where(is_rank, i, -1)
    before = tl.zeros([BLOCK_I], tl.int32)
    for first in range(0, S, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        other = tl.load(ids_ptr + j, mask=j < S, other=2147483647).to(tl.int32)
        is_earlier = (other[None, :] == mine[:, None]) & (j[None, :] < index[:, None])
        before += tl.sum(((other[None, :] < mine[:, None]) | is_earlier).to(tl.int32), 1)
    if is_rank:
        tl.store(position_ptr + i, before.to(tl.int64), mask=i < S)
        tl.store(order_ptr + before, i.to(tl.int64), mask=i < S)
    else:
        tl.store(offsets_ptr + i, before.to(tl.int64), mask=i <= E)


@triton.jit
def experts_combine(
    y_ptr, position_ptr, weights_ptr, out_ptr, C, CHOICES: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Add up the rows of one token, times its weights unless weights_ptr is None, in the order of the choices."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_C], tl.float32)
    for j in range(CHOICES):
        row = tl.load(position_ptr + token * CHOICES + j)
        y = tl.load(y_ptr + row * C + col, mask=col < C, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            y *= tl.load(weights_ptr + token * CHOICES + j)
        acc += y
    tl.store(out_ptr + token * C + col, acc.to(out_ptr.dtype.element_ty), mask=col < C)


def sort_choices(topk_ids: Tensor, order: Tensor, position: Tensor, offsets: Tensor) -> None:
    """Fill order and position, (S,), and offsets, (E + 1,), int64; see kernels/ops/experts.py."""
    ids, count, experts = topk_ids.reshape(-1), topk_ids.numel(), len(offsets) - 1
    if count > SORT_LIMIT:
        expert, by_expert = ids.sort(stable=True)
        order.copy_(by_expert)
        position.scatter_(0, by_expert, torch.arange(count, device=ids.device))
        offsets.copy_(torch.searchsorted(expert, torch.arange(experts + 1, device=ids.device, dtype=ids.dtype)))
        return
    grid = (triton.cdiv(count, BLOCK_I) + triton.cdiv(experts + 1, BLOCK_I),)
    experts_sort[grid](
        ids_ptr=ids, order_ptr=order, position_ptr=position, offsets_ptr=offsets, S=count, E=experts, BLOCK_I=BLOCK_I,
        BLOCK_J=BLOCK_J, num_warps=SORT.warps, num_stages=SORT.stages,
    )  # fmt: skip


def combine_choices(ys: Tensor, position: Tensor, weights: Tensor | None, out: Tensor, choices: int) -> None:
    """Fill out (N, C) with the sums over each token's rows of ys (S, C), times weights (N, k) float32 unless None."""
    width = out.shape[1]
    experts_combine[(out.shape[0], triton.cdiv(width, BLOCK_C))](
        y_ptr=ys, position_ptr=position, weights_ptr=weights, out_ptr=out, C=width, CHOICES=choices, BLOCK_C=BLOCK_C,
        num_warps=COMBINE.warps, num_stages=COMBINE.stages,
    )  # fmt: skip


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Yield the static check's cases."""
    integers = dict.fromkeys(("ids_ptr", "order_ptr", "position_ptr", "offsets_ptr"), "*i64")
    yield launch.case(experts_sort, "int64", SORT, "bf16", {"BLOCK_I": BLOCK_I, "BLOCK_J": BLOCK_J}, **integers)
    for weighted in (True, False):
        given = {"CHOICES": 8, "BLOCK_C": BLOCK_C, **({} if weighted else {"weights_ptr": None})}
        yield launch.case(experts_combine, f"bf16 {'weighted' if weighted else 'plain'}", COMBINE, "bf16", given,
                          position_ptr="*i64", weights_ptr="*fp32")  # fmt: skip
