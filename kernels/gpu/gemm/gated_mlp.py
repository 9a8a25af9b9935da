"""Gated MLP on the GPU: cuBLAS for the products, Triton for the elementwise gate and its backward.

    forward   gate = x w_gate^T     up = x w_up^T     h = act(gate) up     y = h w_down^T
    backward  dh = dy w_down     dgate = dh up act'(gate)     dup = dh act(gate)

One backward kernel overwrites dh with dgate, and computes dup, h and the column sums for the biases. Up to 16 rows the
forward pass is two kernels of skinny_gemm.py; the first one computes gate, up and h.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.gpu import launch
from peakgpt.kernels.gpu.gemm import skinny_gemm
from peakgpt.kernels.gpu.gemm.activation import activate, up_factor, up_gradient
from peakgpt.kernels.gpu.gemm.linear import linear_out
from peakgpt.kernels.gpu.gemm.mlp import ACT_BACKWARD, ACT_BLOCK_N, ACT_FORWARD, column_sum_grid
from peakgpt.kernels.gpu.launch import AotCase
from peakgpt.kernels.gpu.reduce import empty_partials, sum_partials


@triton.jit
def gated_mlp_gate_fwd(gate_ptr, up_ptr, h_ptr, N, ACT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store h = act(gate) up."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    gate, _ = activate(tl.load(gate_ptr + at, mask=at < N, other=0.0).to(tl.float32), ACT)
    h = gate * up_factor(tl.load(up_ptr + at, mask=at < N, other=0.0).to(tl.float32), ACT)
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=at < N)


@triton.jit
def gated_mlp_gate_bwd(
    dh_ptr, gate_ptr, up_ptr, dup_ptr, h_ptr, partial_ptr, R, F, ACT: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Overwrite dh with dgate; store dup, h unless h_ptr is None, and the program's column sums of dgate and dup."""
    col = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    pid, programs = tl.program_id(1), tl.num_programs(1)
    db_gate = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
    db_up = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
    for block in range(pid, tl.cdiv(R, BLOCK_R), programs):
        row = tl.cast(block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        at = row[:, None] * F + col[None, :]
        live = (row < R)[:, None] & (col < F)[None, :]
        dh = tl.load(dh_ptr + at, mask=live, other=0.0).to(tl.float32)
        pre = tl.load(up_ptr + at, mask=live, other=0.0).to(tl.float32)
        up = up_factor(pre, ACT)
        act, slope = activate(tl.load(gate_ptr + at, mask=live, other=0.0).to(tl.float32), ACT)
        dgate, dup = dh * up * slope, up_gradient(dh * act, pre, ACT)
        tl.store(dh_ptr + at, dgate.to(dh_ptr.dtype.element_ty), mask=live)
        tl.store(dup_ptr + at, dup.to(dup_ptr.dtype.element_ty), mask=live)
        if h_ptr is not None:
            tl.store(h_ptr + at, (act * up).to(h_ptr.dtype.element_ty), mask=live)
        db_gate += dgate
        db_up += dup
    if partial_ptr is not None:
        sums_at = partial_ptr + pid.to(tl.int64) * F + col
        tl.store(sums_at, tl.sum(db_gate, 0), mask=col < F)
        tl.store(sums_at + programs.to(tl.int64) * F, tl.sum(db_up, 0), mask=col < F)


def objection(x: Tensor, w_gate: Tensor, *weights: Tensor | None, **_) -> str | None:
    return launch.objection(x, w_gate, weights[3])


def forward(outputs, saved, x, w_gate, b_gate, w_up, b_up, w_down, b_down, *, activation, recompute):
    x = x.reshape(-1, x.shape[-1])
    h = _hidden(x, saved, w_gate, b_gate, w_up, b_up, activation)
    linear_out(h, w_down, b_down, outputs[0].view(-1, w_down.shape[0]))


def _hidden(x: Tensor, saved, w_gate, b_gate, w_up, b_up, activation: str) -> Tensor:
    """Return h; gate and up are filled if backward needs them (saved)."""
    h = x.new_empty(x.shape[0], w_up.shape[0])
    gate, up = (t.view_as(h) for t in saved) if saved else (None, None)
    if skinny_gemm.supports(x, w_gate, w_up):
        skinny_gemm.skinny_gemm_out(x, w_up, b_up, h, pre=up, gate=(w_gate, b_gate, gate), activation=activation)
        return h
    gate, up = (torch.empty_like(h), h) if gate is None else (gate, up)
    linear_out(x, w_gate, b_gate, gate)
    linear_out(x, w_up, b_up, up)
    with launch.device_of(x):
        gated_mlp_gate_fwd[(triton.cdiv(h.numel(), ACT_BLOCK_N),)](
            gate_ptr=gate, up_ptr=up, h_ptr=h, N=h.numel(), ACT=activation,
            BLOCK_N=ACT_BLOCK_N, num_warps=ACT_FORWARD.warps, num_stages=ACT_FORWARD.stages,
        )  # fmt: skip
    return h


def backward(grads, inputs, outputs, saved, needs, *, activation, recompute):
    x, w_gate, b_gate, w_up, b_up, w_down, _ = inputs
    need_x, need_w_gate, need_b_gate, need_w_up, need_b_up, need_w_down, need_b_down = needs
    dy, rows = grads[0].reshape(-1, w_down.shape[0]), x.reshape(-1, x.shape[-1])
    dx = dw_gate = db_gate = dw_up = db_up = dw_down = None
    if any(needs[:6]):
        hidden = (rows.shape[0], w_up.shape[0])
        gate, up = (t.view(hidden) for t in saved) if saved else (x.new_empty(hidden), x.new_empty(hidden))
        if not saved:
            linear_out(rows, w_gate, b_gate, gate)
            linear_out(rows, w_up, b_up, up)
        dgate, dup, h, sums = _gate_backward(dy @ w_down, gate, up, need_w_down, need_b_gate or need_b_up, activation)
        if need_x:
            dx = torch.addmm(dgate @ w_gate, dup, w_up).view(x.shape)
        dw_gate = torch.mm(dgate.t(), rows, out=torch.empty_like(w_gate)) if need_w_gate else None
        dw_up = torch.mm(dup.t(), rows, out=torch.empty_like(w_up)) if need_w_up else None
        dw_down = torch.mm(dy.t(), h, out=torch.empty_like(w_down)) if need_w_down else None
        db_gate, db_up = (sums[0] if need_b_gate else None, sums[1] if need_b_up else None)
    return dx, dw_gate, db_gate, dw_up, db_up, dw_down, dy.sum(0) if need_b_down else None


def _gate_backward(dh: Tensor, gate: Tensor, up: Tensor, need_h: bool, need_sums: bool, activation: str):
    """Return dgate (in the memory of dh), dup, h or None, and the column sums of dgate and dup or (None, None)."""
    (count, hidden), tile = dh.shape, ACT_BACKWARD
    grid = column_sum_grid(dh)
    dup, h = torch.empty_like(dh), torch.empty_like(dh) if need_h else None
    partial = empty_partials(dh, 2, grid[1], hidden) if need_sums else None
    sums = dh.new_empty(2, hidden) if need_sums else (None, None)
    with launch.device_of(dh):
        gated_mlp_gate_bwd[grid](
            dh_ptr=dh, gate_ptr=gate, up_ptr=up, dup_ptr=dup, h_ptr=h, partial_ptr=partial, R=count, F=hidden,
            ACT=activation, BLOCK_R=tile.BLOCK_R, BLOCK_F=tile.BLOCK_F, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if need_sums:
            sum_partials(partial, *sums)
    return dh, dup, h, sums


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Yield the static check's cases."""
    tile = {"BLOCK_R": ACT_BACKWARD.BLOCK_R, "BLOCK_F": ACT_BACKWARD.BLOCK_F}
    yield launch.case(gated_mlp_gate_fwd, "bf16 silu", ACT_FORWARD, "bf16", {"ACT": "silu", "BLOCK_N": ACT_BLOCK_N})
    yield launch.case(
        gated_mlp_gate_bwd, "bf16 silu", ACT_BACKWARD, "bf16", {"ACT": "silu", **tile}, partial_ptr="*fp32"
    )
