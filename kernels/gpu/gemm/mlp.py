"""GELU and ReLU MLP on the GPU. Two strategies; the table FUSED chooses one for each shape and direction.

"library" takes the products from cuBLAS and the elementwise work between them from Triton:

    forward   pre = addmm(b_up, x, w_up^T)     mlp_act_fwd: h = act(pre)     y = addmm(b_down, h, w_down^T)
    backward  dh = dy w_down       mlp_act_bwd: dpre = dh act'(pre) in the memory of dh, h recomputed, sums for db_up
              dx = dpre w_up     dw_up = dpre^T x     dw_down = dy^T h

"fused" computes the first product of each direction by gemm.py, with the activation or its derivative in the epilogue.
That saves a pass over h, so it pays only if the Triton product reaches about 0.97 of cuBLAS.

Up to 16 rows the forward pass is two kernels of skinny_gemm.py, the first one with the activation in its epilogue.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.core.thread_state import ThreadState
from peakgpt.kernels.gpu import launch
from peakgpt.kernels.gpu.gemm import gemm, skinny_gemm
from peakgpt.kernels.gpu.gemm.activation import activate
from peakgpt.kernels.gpu.gemm.linear import linear_out
from peakgpt.kernels.gpu.launch import AotCase, Tile
from peakgpt.kernels.gpu.reduce import empty_partials, sum_partials


@dataclass(frozen=True, kw_only=True)
class ActTile(Tile):
    BLOCK_R: int
    BLOCK_F: int


# Of the elementwise kernels. Not measured on hardware: 8 elements a thread, one 16-byte load of a half-precision type.
ACT_BLOCK_N, ACT_FORWARD = 1024, Tile(warps=4)
ACT_BACKWARD = ActTile(BLOCK_R=8, BLOCK_F=128, warps=4)
PROGRAMS_PER_PROCESSOR = 8  # of the kernels that sum columns

# (architecture, "forward" or "backward") -> the shapes (C, F) for which "fused" was measured faster than "library".
# Every entry needs a committed measurement; `bench device` times both strategies. No measurement exists yet.
FUSED: dict[tuple[str, str], frozenset[tuple[int, int]]] = {}
STRATEGIES = ("table", "fused", "library")
_strategy = ThreadState("mlp_strategy", "table")


def use_strategy(name: str) -> contextlib.AbstractContextManager[None]:
    """Force one of STRATEGIES inside the block, for this thread: for tests and benchmarks."""
    return _strategy.set_to(name)


def _fused(direction: str, x: Tensor, w_up: Tensor) -> bool:
    if (forced := _strategy.get()) != "table":
        return forced == "fused"
    return (w_up.shape[1], w_up.shape[0]) in FUSED.get((launch.arch(x), direction), ())


@triton.jit
def mlp_act_fwd(pre_ptr, h_ptr, N, ACT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store h = act(pre)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    h, _ = activate(tl.load(pre_ptr + at, mask=at < N, other=0.0).to(tl.float32), ACT)
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=at < N)


@triton.jit
def mlp_act_bwd(
    dh_ptr, pre_ptr, h_ptr, partial_ptr, R, F, ACT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr
):
    """Overwrite dh with dpre; store h unless h_ptr is None, and the program's column sums of dpre."""
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


def objection(x: Tensor, w_up: Tensor, b_up: Tensor | None, w_down: Tensor, *_, **__) -> str | None:
    return launch.objection(x, w_up, w_down)


def forward(outputs, saved, x, w_up, b_up, w_down, b_down, *, activation, recompute):
    x = x.reshape(-1, x.shape[-1])
    hidden = (x.shape[0], w_up.shape[0])
    h = _hidden(x, w_up, b_up, saved[0].view(hidden) if saved else None, activation)
    linear_out(h, w_down, b_down, outputs[0].view(-1, w_down.shape[0]))


def _hidden(x: Tensor, w_up: Tensor, b_up: Tensor | None, pre: Tensor | None, activation: str) -> Tensor:
    """Return h = act(pre); pre = x w_up^T + b_up is filled unless it is None."""
    h = x.new_empty(x.shape[0], w_up.shape[0])
    if _strategy.get() == "table" and skinny_gemm.supports(x, w_up):
        skinny_gemm.skinny_gemm_out(x, w_up, b_up, h, pre=pre, activation=activation)
        return h
    if _fused("forward", x, w_up):
        gemm.gemm_act_forward(x, w_up, b_up, pre, h, activation)
        return h
    pre = h if pre is None else pre  # h may be overwritten in place
    linear_out(x, w_up, b_up, pre)
    with launch.device_of(x):
        mlp_act_fwd[(triton.cdiv(pre.numel(), ACT_BLOCK_N),)](
            pre_ptr=pre, h_ptr=h, N=pre.numel(), ACT=activation,
            BLOCK_N=ACT_BLOCK_N, num_warps=ACT_FORWARD.warps, num_stages=ACT_FORWARD.stages,
        )  # fmt: skip
    return h


def _recompute_pre(x: Tensor, w_up: Tensor, b_up: Tensor | None, activation: str) -> Tensor:
    """Return pre with the bits of the forward pass: both use the same strategy."""
    pre = x.new_empty(x.shape[0], w_up.shape[0])
    if _fused("forward", x, w_up):
        gemm.gemm_act_forward(x, w_up, b_up, pre, None, activation)
    else:
        linear_out(x, w_up, b_up, pre)
    return pre


def backward(grads, inputs, outputs, saved, needs, *, activation, recompute):
    x, w_up, b_up, w_down, _ = inputs
    need_x, need_w_up, need_b_up, need_w_down, need_b_down = needs
    dy, rows = grads[0].reshape(-1, w_down.shape[0]), x.reshape(-1, x.shape[-1])
    dx = dw_up = db_up = dw_down = None
    if need_x or need_w_up or need_b_up or need_w_down:
        pre = saved[0].view(-1, w_up.shape[0]) if saved else _recompute_pre(rows, w_up, b_up, activation)
        h = torch.empty_like(pre) if need_w_down else None
        db_up = pre.new_empty(pre.shape[1]) if need_b_up else None
        if _fused("backward", x, w_up):
            dpre = gemm.gemm_act_backward(dy, w_down, pre, h, db_up, activation)
        else:
            dpre = _activation_backward(dy @ w_down, pre, h, db_up, activation)
        dx = (dpre @ w_up).view(x.shape) if need_x else None
        dw_up = torch.mm(dpre.t(), rows, out=torch.empty_like(w_up)) if need_w_up else None
        dw_down = torch.mm(dy.t(), h, out=torch.empty_like(w_down)) if need_w_down else None
    return dx, dw_up, db_up, dw_down, dy.sum(0) if need_b_down else None


def _activation_backward(dh: Tensor, pre: Tensor, h: Tensor | None, db: Tensor | None, activation: str) -> Tensor:
    """Return dpre (in the memory of dh); h and db are filled unless they are None."""
    (count, hidden), tile = dh.shape, ACT_BACKWARD
    grid = column_sum_grid(dh)
    partial = None if db is None else empty_partials(dh, 1, grid[1], hidden)
    with launch.device_of(dh):
        mlp_act_bwd[grid](
            dh_ptr=dh, pre_ptr=pre, h_ptr=h, partial_ptr=partial, R=count, F=hidden, ACT=activation,
            BLOCK_R=tile.BLOCK_R, BLOCK_F=tile.BLOCK_F, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if db is not None:
            sum_partials(partial, db)
    return dh


def column_sum_grid(x: Tensor) -> tuple[int, int]:
    """Return the grid of a kernel that sums the columns of x: (blocks of columns, programs that share the rows)."""
    columns = triton.cdiv(x.shape[1], ACT_BACKWARD.BLOCK_F)
    most = triton.cdiv(PROGRAMS_PER_PROCESSOR * launch.processors(x), columns)
    return columns, min(triton.cdiv(x.shape[0], ACT_BACKWARD.BLOCK_R), most)


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Yield one case for each kernel and tile that `peakgpt aot` compiles without a GPU."""
    tile = {"BLOCK_R": ACT_BACKWARD.BLOCK_R, "BLOCK_F": ACT_BACKWARD.BLOCK_F}
    for act in ("gelu_tanh", "gelu_erf"):
        yield launch.case(mlp_act_fwd, f"bf16 {act}", ACT_FORWARD, "bf16", {"ACT": act, "BLOCK_N": ACT_BLOCK_N})
        yield launch.case(mlp_act_bwd, f"bf16 {act}", ACT_BACKWARD, "bf16", {"ACT": act, **tile}, partial_ptr="*fp32")
