"""GELU-MLP on the GPU: two ways, and a table that chooses between them by shape, forward and backward apart.

Up to 16 rows, forward is two kernels of few_rows.py, the activation in the epilogue of the first. Beyond, "library"
takes the four products from cuBLAS and what lies between them from Triton:

    forward   pre = addmm(b_up, x, w_up^T)     act_fwd: h = act(pre)     y = addmm(b_down, h, w_down^T)
    backward  dh = dy w_down       act_bwd: dpre = dh act'(pre) over dh, h = act(pre) again, partial sums of db_up
              dx = dpre w_up     dw_up = dpre^T x     dw_down = dy^T h

"fused" takes the first product of each direction from gemm.py, with activation or slope in its epilogue. That saves a
pass over h and pays only where the Triton product reaches about 0.97 of cuBLAS.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.gpu import launch
from peakgpt.kernels.gpu.gemm import gemm
from peakgpt.kernels.gpu.gemm import skinny_gemm as few_rows
from peakgpt.kernels.gpu.gemm.activation import activate
from peakgpt.kernels.gpu.gemm.linear import product
from peakgpt.kernels.gpu.launch import AotCase, Tile
from peakgpt.kernels.gpu.reduce import partials, sum_partials


@dataclass(frozen=True, kw_only=True)
class ActTile(Tile):
    BLOCK_R: int
    BLOCK_F: int


# Unmeasured on hardware: 8 elements a thread, one 16-byte load of a half precision.
BLOCK_N, FORWARD = 1024, Tile(warps=4)
BACKWARD = ActTile(BLOCK_R=8, BLOCK_F=128, warps=4)
PROGRAMS_PER_PROCESSOR = 8

# (C, F) of the shapes where "fused" was measured to be faster, by class and direction. What is not measured is not
# here, and nothing is yet: `bench device` times both ways.
FUSED: dict[tuple[str, str], frozenset[tuple[int, int]]] = {}
WAYS = ("table", "fused", "library")
_way = "table"


@contextlib.contextmanager
def way(name: str) -> Iterator[None]:
    """Take one of WAYS inside the block, whatever the table says: for tests and benchmarks, global to the process."""
    global _way
    before, _way = _way, name
    try:
        yield
    finally:
        _way = before


def _fused(direction: str, x: Tensor, w_up: Tensor) -> bool:
    if _way != "table":
        return _way == "fused"
    return (w_up.shape[1], w_up.shape[0]) in FUSED.get((launch.arch(x), direction), ())


@triton.jit
def mlp_act_fwd(pre_ptr, h_ptr, N, ACT: tl.constexpr, BLOCK_N: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    h, _ = activate(tl.load(pre_ptr + at, mask=at < N, other=0.0).to(tl.float32), ACT)
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=at < N)


@triton.jit
def mlp_act_bwd(
    dh_ptr, pre_ptr, h_ptr, partial_ptr, R, F, ACT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr
):
    col = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    pid, programs = tl.program_id(1), tl.num_programs(1)
    db = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
    for block in range(pid, tl.cdiv(R, BLOCK_R), programs):
        row = tl.cast(block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        at = row[:, None] * F + col[None, :]
        live = (row < R)[:, None] & (col < F)[None, :]
        pre = tl.load(pre_ptr + at, mask=live, other=0.0).to(tl.float32)
        h, slope = activate(pre, ACT)
        dpre = tl.load(dh_ptr + at, mask=live, other=0.0).to(tl.float32) * slope
        tl.store(dh_ptr + at, dpre.to(dh_ptr.dtype.element_ty), mask=live)
        if h_ptr is not None:
            tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=live)
        db += dpre
    if partial_ptr is not None:
        tl.store(partial_ptr + pid.to(tl.int64) * F + col, tl.sum(db, 0), mask=col < F)


def objection(x: Tensor, *_, **__) -> str | None:
    return launch.objection(x)


def forward(outputs, saved, x, w_up, b_up, w_down, b_down, *, activation, recompute):
    x = x.reshape(-1, x.shape[-1])
    hidden = (x.shape[0], w_up.shape[0])
    h = _first_product(x, w_up, b_up, saved[0].view(hidden) if saved else None, activation)
    product(h, w_down, b_down, outputs[0].view(-1, w_down.shape[0]))


def _first_product(x: Tensor, w_up: Tensor, b_up: Tensor | None, pre: Tensor | None, activation: str) -> Tensor:
    """h, with pre filled where given."""
    h = x.new_empty(x.shape[0], w_up.shape[0])
    if _way == "table" and few_rows.takes(x, w_up):
        few_rows.product(x, w_up, b_up, h, pre=pre, activation=activation)
        return h
    if _fused("forward", x, w_up):
        gemm.product_and_act(x, w_up, b_up, pre, h, activation)
        return h
    pre = h if pre is None else pre
    product(x, w_up, b_up, pre)
    with launch.on(x):
        mlp_act_fwd[(triton.cdiv(pre.numel(), BLOCK_N),)](
            pre_ptr=pre, h_ptr=h, N=pre.numel(), ACT=activation,
            BLOCK_N=BLOCK_N, num_warps=FORWARD.warps, num_stages=FORWARD.stages,
        )  # fmt: skip
    return h


def _pre(x: Tensor, w_up: Tensor, b_up: Tensor | None, activation: str) -> Tensor:
    """The pre-activation again, by the way and so with the bits of forward."""
    pre = x.new_empty(x.shape[0], w_up.shape[0])
    if _fused("forward", x, w_up):
        gemm.product_and_act(x, w_up, b_up, pre, None, activation)
    else:
        product(x, w_up, b_up, pre)
    return pre


def backward(grads, inputs, outputs, saved, needs, *, activation, recompute):
    x, w_up, b_up, w_down, _ = inputs
    need_x, need_w_up, need_b_up, need_w_down, need_b_down = needs
    dy, rows = grads[0].reshape(-1, w_down.shape[0]), x.reshape(-1, x.shape[-1])
    dx = dw_up = db_up = dw_down = None
    if need_x or need_w_up or need_b_up or need_w_down:
        pre = saved[0].view(-1, w_up.shape[0]) if saved else _pre(rows, w_up, b_up, activation)
        h = torch.empty_like(pre) if need_w_down else None
        db_up = pre.new_empty(pre.shape[1]) if need_b_up else None
        if _fused("backward", x, w_up):
            dpre = gemm.slope_of_product(dy, w_down, pre, h, db_up, activation)
        else:
            dpre = _through_activation(dy @ w_down, pre, h, db_up, activation)
        dx = (dpre @ w_up).view(x.shape) if need_x else None
        dw_up = torch.mm(dpre.t(), rows, out=torch.empty_like(w_up)) if need_w_up else None
        dw_down = torch.mm(dy.t(), h, out=torch.empty_like(w_down)) if need_w_down else None
    return dx, dw_up, db_up, dw_down, dy.sum(0) if need_b_down else None


def _through_activation(dh: Tensor, pre: Tensor, h: Tensor | None, db: Tensor | None, activation: str) -> Tensor:
    """dpre, over dh, with h and db filled where given."""
    (count, hidden), tile = dh.shape, BACKWARD
    grid = column_programs(dh)
    partial = None if db is None else partials(dh, 1, grid[1], hidden)
    with launch.on(dh):
        mlp_act_bwd[grid](
            dh_ptr=dh, pre_ptr=pre, h_ptr=h, partial_ptr=partial, R=count, F=hidden, ACT=activation,
            BLOCK_R=tile.BLOCK_R, BLOCK_F=tile.BLOCK_F, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if db is not None:
            sum_partials(partial, db)
    return dh


def column_programs(x: Tensor) -> tuple[int, int]:
    """(blocks of columns, programs that share the rows of each) of a kernel that sums x's columns."""
    columns = triton.cdiv(x.shape[1], BACKWARD.BLOCK_F)
    most = triton.cdiv(PROGRAMS_PER_PROCESSOR * launch.processors(x), columns)
    return columns, min(triton.cdiv(x.shape[0], BACKWARD.BLOCK_R), most)


def aot_cases(arch: str) -> Iterator[AotCase]:
    """The static check's cases."""
    tile = {"BLOCK_R": BACKWARD.BLOCK_R, "BLOCK_F": BACKWARD.BLOCK_F}
    for act in ("gelu_tanh", "gelu_erf"):
        yield launch.case(mlp_act_fwd, f"bf16 {act}", FORWARD, "bf16", {"ACT": act, "BLOCK_N": BLOCK_N})
        yield launch.case(mlp_act_bwd, f"bf16 {act}", BACKWARD, "bf16", {"ACT": act, **tile}, partial_ptr="*fp32")
