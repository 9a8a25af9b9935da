"""Backward of the linear layer with scales of groups, in Triton: dx = dpre W, with tiles of W decoded in registers.

Each program computes BLOCK_M rows of dx for SLICES groups of inputs. It reads the panels of the weight in steps of
BLOCK_N outputs, in the layout of linear_grouped.py, and multiplies by values of x's dtype: a whole W never exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.gpu import launch
from peakgpt.kernels.gpu.gemm.activation import activate, up_gradient
from peakgpt.kernels.gpu.gemm.grouped_levels import GroupedTile, decoded_levels, level_constants
from peakgpt.kernels.gpu.launch import AotCase, Tile
from peakgpt.kernels.ops.quantize import PANEL

INPUTS = 128  # inputs of a tile: one group of 128, or several smaller ones
# Derived, not measured: the tile of dx takes 32 registers of a thread.
TILE = GroupedTile(BLOCK_M=64, BLOCK_N=2 * PANEL, warps=8, stages=2)
SLOPE, SLOPE_BLOCK = Tile(warps=4), 1024
_PANEL: tl.constexpr = tl.constexpr(PANEL)


@triton.jit
def linear_grouped_slope(dy_ptr, pre_ptr, dpre_ptr, count, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """Compute dpre = dy act'(pre), element by element."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < count
    dy = tl.load(dy_ptr + at, mask=live, other=0.0).to(tl.float32)
    pre = tl.load(pre_ptr + at, mask=live, other=0.0).to(tl.float32)
    if ACT == "clamped_up":
        dpre = up_gradient(dy, pre, "clamped_swiglu")
    else:
        _, slope = activate(pre, ACT)
        dpre = dy * slope
    tl.store(dpre_ptr + at, dpre.to(dpre_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=("M",))
def linear_grouped_bwd(
    dpre_ptr,
    w_ptr,
    scale_ptr,
    offset_ptr,
    order_ptr,
    dx_ptr,
    M,
    N,
    K,
    G,
    lines,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO_POINTS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute a tile of dx; w_ptr has words of 4 bytes, (panels, lines, 16). LEVELS: see `level_constants`."""
    LINES: tl.constexpr = GROUP * BITS // 32
    g = tl.program_id(0) * SLICES + tl.arange(0, SLICES)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    step = g[:, None] * LINES + tl.arange(0, LINES)[None, :]
    row = m.to(tl.int64)[:, None]
    acc = tl.zeros([BLOCK_M, SLICES * GROUP], tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        panel, lane = (n // _PANEL).to(tl.int64), n % _PANEL
        live_w = (step < lines)[:, :, None] & (n < N)[None, None, :]
        w_at = w_ptr + (panel * lines * _PANEL + lane)[None, None, :] + step[:, :, None] * _PANEL
        level = decoded_levels(tl.load(w_at, mask=live_w, other=0), BITS, LEVELS).to(tl.float32)
        live_s = (g < G)[:, None] & (n < N)[None, :]
        s_at = (panel * G * _PANEL + lane)[None, :] + g[:, None] * _PANEL
        scale = tl.load(scale_ptr + s_at, mask=live_s, other=0.0).to(tl.float32)
        w = level * scale[:, None, :]
        if offset_ptr is not None:
            offset = tl.load(offset_ptr + s_at, mask=live_s, other=0.0).to(tl.float32)
            if ZERO_POINTS:
                offset = -offset * scale
            w += offset[:, None, :]
        w = tl.reshape(w, [SLICES * GROUP, BLOCK_N]).to(dpre_ptr.dtype.element_ty)
        live = (m < M)[:, None] & (n < N)[None, :]
        dpre = tl.load(dpre_ptr + row * N + n[None, :], mask=live, other=0.0)
        acc = tl.dot(dpre, tl.trans(w), acc, input_precision="ieee")
    k = tl.program_id(0) * (SLICES * GROUP) + tl.arange(0, SLICES * GROUP)
    at = k
    if order_ptr is not None:
        at = tl.load(order_ptr + k, mask=k < K, other=0)
    live = (m < M)[:, None] & (k < K)[None, :]
    tl.store(dx_ptr + row * K + at[None, :], acc.to(dx_ptr.dtype.element_ty), mask=live)


def gradients(
    dy: Tensor, width: int, saved: Tensor, w: Tensor, scale: Tensor, offset: Tensor | None, order: Tensor | None,
    needs: tuple[bool, bool], *, bits: int, group: int, levels: str, zero_points: bool, activation: str,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Compute the gradients (dx, db) that `needs` asks for.

    Args:
        dy: (..., F), contiguous.
        width: C.
        saved: what forward saved, `linear_quantized.saved_tensors`.
        w, scale, offset, order, bits, group, levels, zero_points, activation: as in linear_grouped.
    """
    need_x, need_b = needs
    dx = dy.new_empty((*dy.shape[:-1], width)) if need_x else None
    dpre = dy.view(-1, dy.shape[-1])
    (rows, outs), groups = dpre.shape, scale.shape[1]
    with launch.device_of(dy):
        if activation != "none" and dy.numel():
            dpre = torch.empty_like(dpre)
            linear_grouped_slope[(triton.cdiv(dy.numel(), SLOPE_BLOCK),)](
                dy_ptr=dy, pre_ptr=saved, dpre_ptr=dpre, count=dy.numel(), ACT=activation, BLOCK=SLOPE_BLOCK,
                num_warps=SLOPE.warps, num_stages=SLOPE.stages,
            )  # fmt: skip
        if dx is not None and dx.numel():
            linear_grouped_bwd[(triton.cdiv(width, INPUTS), triton.cdiv(rows, TILE.BLOCK_M))](
                dpre_ptr=dpre, w_ptr=w.view(torch.int32), scale_ptr=scale, offset_ptr=offset, order_ptr=order,
                dx_ptr=dx, M=rows, N=outs, K=width, G=groups, lines=w.shape[1], BITS=bits,
                LEVELS=level_constants(bits, levels), GROUP=group, ZERO_POINTS=zero_points, **_sizes(group),
                num_warps=TILE.warps, num_stages=TILE.stages,
            )  # fmt: skip
    return dx, dpre.sum(0) if need_b else None


def _sizes(group: int) -> dict[str, int]:
    return {"SLICES": INPUTS // group, "BLOCK_M": TILE.BLOCK_M, "BLOCK_N": TILE.BLOCK_N}


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Yield the static check's cases: those of linear_grouped, and the 4 bits of linear_q4."""
    types = {"w_ptr": "*i32", "scale_ptr": "*fp16", "offset_ptr": "*fp16", "order_ptr": "*i32"}
    for label, bits, levels, group, zero_points, absent in (
        ("4 bits by 128", 4, "signed", 128, True, ()),
        ("4 bits by 32", 4, "unsigned", 32, False, ("order_ptr",)),
        ("8 bits by 32", 8, "signed", 32, False, ("offset_ptr", "order_ptr")),
        ("normal by 64", 4, "normal", 64, False, ("offset_ptr", "order_ptr")),
    ):
        given = {"BITS": bits, "LEVELS": level_constants(bits, levels), "GROUP": group, "ZERO_POINTS": zero_points,
                 **dict.fromkeys(absent), **_sizes(group)}  # fmt: skip
        yield launch.case(linear_grouped_bwd, f"bf16 {label}", TILE, "bf16", given, matmul=True,
                          hot=label == "4 bits by 128", **types)  # fmt: skip
    given = {"ACT": "gelu_tanh", "BLOCK": SLOPE_BLOCK}
    yield launch.case(linear_grouped_slope, "bf16 gelu_tanh", SLOPE, "bf16", given)
