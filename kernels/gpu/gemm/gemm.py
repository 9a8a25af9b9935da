"""Matrix products with the MLP's epilogues in Triton, the "fused" strategy of mlp.py.

    gemm_act_fwd   pre = a b + bias              h = act(pre)
    gemm_act_bwd   dpre = (a b) act'(pre)        h = act(pre)        column sums of dpre, one for each row of tiles

Both kernels read the activation's input from pre as stored, so that backward recomputes h with forward's bits. Tiles
are visited in groups of GROUP_M rows, which keeps the columns of b in the L2 cache. On sm_90 and newer, TMA loads the
operands if their rows start at multiples of 16 bytes. The epilogue then handles the tile in two halves: a whole tile
and the operands of the epilogue need more registers than a thread has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.gpu import launch
from peakgpt.kernels.gpu.gemm.activation import activate
from peakgpt.kernels.gpu.launch import AotCase, Tile
from peakgpt.kernels.gpu.reduce import empty_partials, sum_partials


@dataclass(frozen=True, kw_only=True)
class GemmTile(Tile):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    TMA: bool = False
    HALVES: bool = False  # the epilogue handles the tile in two halves


GROUP_M = 8
# For bfloat16 and float16. float32 takes FLOAT32, which is not optimized. Not measured on hardware; no spills.
FORWARD = {
    "sm_80": GemmTile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, warps=8, stages=4),
    "sm_86": GemmTile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, warps=8, stages=3),
    "sm_90": GemmTile(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, warps=8, stages=3, TMA=True, HALVES=True),
    "sm_100": GemmTile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, warps=8, stages=3, TMA=True, HALVES=True),
    "gfx942": GemmTile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, warps=8, stages=2),
}
BACKWARD = {
    "sm_80": GemmTile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, warps=8, stages=4, HALVES=True),
    "sm_86": GemmTile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, warps=8, stages=3, HALVES=True),
    "sm_90": GemmTile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, warps=8, stages=4, TMA=True, HALVES=True),
    "sm_100": GemmTile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, warps=8, stages=3, TMA=True, HALVES=True),
    "gfx942": GemmTile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, warps=8, stages=2),
}
FLOAT32 = GemmTile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, warps=4, stages=2)
TMA_BYTES = 16


@triton.jit
def _tile_of(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Return (first row, first column) of this program's tile."""
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * columns)
    height = tl.minimum(rows - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * columns)
    return (group * GROUP_M + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def _product(
    a_ptr, b_ptr, m, n, M, N, K, stride_a, stride_b, B_BY_N: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the tile of a b at (m, n) in float32. a is (M, K); b is stored as (N, K) if B_BY_N, else as (K, N)."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if TMA:
        a = tl.make_tensor_descriptor(a_ptr, [M, K], [stride_a, 1], [BLOCK_M, BLOCK_K])
        if B_BY_N:
            b = tl.make_tensor_descriptor(b_ptr, [N, K], [stride_b, 1], [BLOCK_N, BLOCK_K])
        else:
            b = tl.make_tensor_descriptor(b_ptr, [K, N], [stride_b, 1], [BLOCK_K, BLOCK_N])
        for k in range(0, K, BLOCK_K):
            if B_BY_N:
                acc = tl.dot(a.load([m, k]), b.load([n, k]).T, acc, input_precision="ieee")
            else:
                acc = tl.dot(a.load([m, k]), b.load([k, n]), acc, input_precision="ieee")
    else:
        row, col = (m + tl.arange(0, BLOCK_M)).to(tl.int64), (n + tl.arange(0, BLOCK_N)).to(tl.int64)
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            live = k < K
            live_a = (row < M)[:, None] & live[None, :]
            a = tl.load(a_ptr + row[:, None] * stride_a + k[None, :], mask=live_a, other=0.0)
            if B_BY_N:  # noqa: SIM108  an expression would compile both branches
                at = col[None, :] * stride_b + k[:, None]
            else:
                at = k.to(tl.int64)[:, None] * stride_b + col[None, :]
            b = tl.load(b_ptr + at, mask=live[:, None] & (col < N)[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def _halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))


@triton.jit
def _epilogue_fwd(
    acc, bias_ptr, pre_ptr, h_ptr, m, n, M, N, ACT: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr
):
    """Add the bias; store pre and h, each unless its pointer is None."""
    row, col = (m + tl.arange(0, BLOCK_M)).to(tl.int64), n + tl.arange(0, WIDTH)
    live = (row < M)[:, None] & (col < N)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    at = row[:, None] * N + col[None, :]
    if pre_ptr is not None:
        tl.store(pre_ptr + at, acc.to(pre_ptr.dtype.element_ty), mask=live)
    if h_ptr is not None:
        h, _ = activate(acc.to(h_ptr.dtype.element_ty).to(tl.float32), ACT)
        tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=live)


@triton.jit
def _epilogue_bwd(
    acc, pre_ptr, dpre_ptr, h_ptr, partial_ptr, m, n, M, N, ACT: tl.constexpr, BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Store dpre and, each unless its pointer is None, h and the column sums of dpre."""
    row, col = (m + tl.arange(0, BLOCK_M)).to(tl.int64), n + tl.arange(0, WIDTH)
    live = (row < M)[:, None] & (col < N)[None, :]
    at = row[:, None] * N + col[None, :]
    h, slope = activate(tl.load(pre_ptr + at, mask=live, other=0.0).to(tl.float32), ACT)
    if h_ptr is not None:
        tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=live)
    dpre = acc * slope  # zero in rows past the end, where acc is zero
    tl.store(dpre_ptr + at, dpre.to(dpre_ptr.dtype.element_ty), mask=live)
    if partial_ptr is not None:
        tl.store(partial_ptr + (m // BLOCK_M).to(tl.int64) * N + col, tl.sum(dpre, 0), mask=col < N)


@triton.jit
def gemm_act_fwd(
    a_ptr,
    b_ptr,
    bias_ptr,
    pre_ptr,
    h_ptr,
    M,
    N,
    K,
    stride_a,
    stride_b,
    ACT: tl.constexpr,
    B_BY_N: tl.constexpr,
    TMA: tl.constexpr,
    HALVES: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute one tile of pre and h."""
    m, n = _tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    acc = _product(a_ptr, b_ptr, m, n, M, N, K, stride_a, stride_b, B_BY_N, TMA, BLOCK_M, BLOCK_N, BLOCK_K)
    if HALVES:
        left, right = _halves(acc, BLOCK_M, BLOCK_N)
        _epilogue_fwd(left, bias_ptr, pre_ptr, h_ptr, m, n, M, N, ACT, BLOCK_M, BLOCK_N // 2)
        _epilogue_fwd(right, bias_ptr, pre_ptr, h_ptr, m, n + BLOCK_N // 2, M, N, ACT, BLOCK_M, BLOCK_N // 2)
    else:
        _epilogue_fwd(acc, bias_ptr, pre_ptr, h_ptr, m, n, M, N, ACT, BLOCK_M, BLOCK_N)


@triton.jit
def gemm_act_bwd(
    a_ptr,
    b_ptr,
    pre_ptr,
    dpre_ptr,
    h_ptr,
    partial_ptr,
    M,
    N,
    K,
    stride_a,
    stride_b,
    ACT: tl.constexpr,
    B_BY_N: tl.constexpr,
    TMA: tl.constexpr,
    HALVES: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute one tile of dpre and h, and its column sums of dpre."""
    m, n = _tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    acc = _product(a_ptr, b_ptr, m, n, M, N, K, stride_a, stride_b, B_BY_N, TMA, BLOCK_M, BLOCK_N, BLOCK_K)
    if HALVES:
        left, right = _halves(acc, BLOCK_M, BLOCK_N)
        HALF: tl.constexpr = BLOCK_N // 2
        _epilogue_bwd(left, pre_ptr, dpre_ptr, h_ptr, partial_ptr, m, n, M, N, ACT, BLOCK_M, HALF)
        _epilogue_bwd(right, pre_ptr, dpre_ptr, h_ptr, partial_ptr, m, n + HALF, M, N, ACT, BLOCK_M, HALF)
    else:
        _epilogue_bwd(acc, pre_ptr, dpre_ptr, h_ptr, partial_ptr, m, n, M, N, ACT, BLOCK_M, BLOCK_N)


def gemm_act_forward(
    x: Tensor, w: Tensor, bias: Tensor | None, pre: Tensor | None, h: Tensor | None, activation: str
) -> None:
    """Fill pre = x w^T + bias and h = act(pre), each unless None; x (R, C), w (F, C) with a unit stride."""
    grid, arguments = _launch(FORWARD, x, w.t(), activation)
    with launch.device_of(x):
        gemm_act_fwd[grid](bias_ptr=bias, pre_ptr=pre, h_ptr=h, **arguments)


def gemm_act_backward(
    dy: Tensor, w: Tensor, pre: Tensor, h: Tensor | None, db: Tensor | None, activation: str
) -> Tensor:
    """Return dpre = (dy w) act'(pre); fill h = act(pre) and db = column sums of dpre, each unless it is None.

    Shapes: dy (R, C), w (C, F), pre and h (R, F), db (F,).
    """
    dpre = torch.empty_like(pre)
    grid, arguments = _launch(BACKWARD, dy, w, activation)
    tiles = triton.cdiv(dy.shape[0], arguments["BLOCK_M"])
    partial = None if db is None else empty_partials(dy, 1, tiles, w.shape[1])
    with launch.device_of(dy):
        gemm_act_bwd[grid](pre_ptr=pre, dpre_ptr=dpre, h_ptr=h, partial_ptr=partial, **arguments)
        if db is not None:
            sum_partials(partial, db)
    return dpre


def _launch(table: dict[str, GemmTile], a: Tensor, b: Tensor, activation: str):
    """Return the grid and the arguments that both kernels share, for a product (M, K) (K, N)."""
    tile = FLOAT32 if a.dtype == torch.float32 else table[launch.arch(a)]
    a = a if a.stride(1) == 1 else a.contiguous()
    b = b if 1 in b.stride() else b.contiguous()
    by_n = b.stride(1) != 1
    (count, depth), width, stride_b = a.shape, b.shape[1], b.stride(1 if by_n else 0)
    aligned = all(
        at % TMA_BYTES == 0
        for t, stride in ((a, a.stride(0)), (b, stride_b))
        for at in (t.data_ptr(), stride * t.element_size())
    )
    tma = tile.TMA and aligned
    if tma:
        triton.set_allocator(_descriptor_memory)
    grid = (triton.cdiv(count, tile.BLOCK_M) * triton.cdiv(width, tile.BLOCK_N),)
    return grid, {
        "a_ptr": a, "b_ptr": b, "M": count, "N": width, "K": depth, "stride_a": a.stride(0), "stride_b": stride_b,
        "ACT": activation, "B_BY_N": by_n, "TMA": tma, **_sizes(tile),
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _sizes(tile: GemmTile) -> dict[str, int | bool]:
    return {"HALVES": tile.HALVES, "GROUP_M": GROUP_M, "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N,
            "BLOCK_K": tile.BLOCK_K}  # fmt: skip


def _descriptor_memory(size: int, alignment: int, stream: int | None) -> Tensor:
    """Allocate the memory in which a launch keeps its TMA descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Yield the static check's cases, with weights in the layout of F.linear: (N, K) forward, (K, N) backward."""
    for kernel, table, by_n in ((gemm_act_fwd, FORWARD, True), (gemm_act_bwd, BACKWARD, False)):
        tile = table[arch]
        for tma in (True, False) if tile.TMA else (False,):
            constexprs = {"ACT": "gelu_tanh", "B_BY_N": by_n, "TMA": tma, **_sizes(tile)}
            label = f"bf16 {'TMA' if tma else 'pointers'}"
            yield launch.case(kernel, label, tile, "bf16", constexprs, matmul=True, hot=tma == tile.TMA,
                              partial_ptr="*fp32")  # fmt: skip
