"""Linear layer with scales and offsets of groups, in Triton: one kernel rounds x, one multiplies its integers.

    y = act(Q(x[order]) W^T + b)      kernels/ops/linear_grouped.py

The integers of x and the levels of W have at most 8 bits, which bfloat16 holds, and sums of up to 128 products stay
below 2^24. So the matrix instruction of bfloat16 gives the exact sums of integers, on every chip and for groups of 16
inputs on; that of int8 needs 32. A program computes BLOCK_N outputs of BLOCK_M rows, and reads each byte of their
weights once: a line of a panel has 4 bytes of each of 16 outputs, so a word is a load of one thread. SLICES groups are
multiplied at once, one by each warp of a decoding step; their sums are added at the end, in the same order for any
number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.gpu import launch
from peakgpt.kernels.gpu.gemm.activation import activate, up_factor
from peakgpt.kernels.gpu.gemm.grouped_levels import GroupedTile, decoded_levels, level_constants
from peakgpt.kernels.gpu.gemm.linear_grouped_backward import gradients
from peakgpt.kernels.gpu.launch import AotCase, Tile
from peakgpt.kernels.ops.linear_quantized import input_width
from peakgpt.kernels.ops.quantize import PANEL

NO_GRADIENT = ("scale", "offset")
GROUPS = (16, 32, 64, 128)
SLICES = 4
FEW_ROWS = 16
# Derived, not measured. A step of "few" reads 4 KB of 4-bit weights for groups of 128; two steps are in flight while
# one is unpacked. "many" multiplies each unpacked weight by 32 rows; with 64 rows it spills registers.
TILES = {
    "few": GroupedTile(BLOCK_M=FEW_ROWS, BLOCK_N=PANEL, warps=4, stages=3),
    "many": GroupedTile(BLOCK_M=32, BLOCK_N=PANEL, warps=8, stages=2),
}
ROUND, ROUND_GROUPS = Tile(warps=4), 8  # groups of one row that a program rounds
_PANEL: tl.constexpr = tl.constexpr(PANEL)


@triton.jit
def linear_grouped_round(
    x_ptr,
    order_ptr,
    q_ptr,
    scale_ptr,
    total_ptr,
    stride_x,
    K,
    G,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Round GROUPS groups of one row to integers q, with their scales and, unless total_ptr is None, scaled sums."""
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    k = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    at = k
    if order_ptr is not None:
        at = tl.load(order_ptr + k, mask=k < K, other=0)
    x = tl.load(x_ptr + row * stride_x + at, mask=k < K, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), 1)
    divisor = tl.where(largest > 1e-30, largest, 1.0)
    inverse = tl.where(largest > 1e-30, tl.div_rn(127.0 + tl.zeros([GROUPS], tl.float32), divisor), 0.0)
    # Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even.
    q = (x * inverse[:, None] + 12582912.0) - 12582912.0
    # A group with an infinity or NaN has a scale of NaN: the maximum alone would lose a NaN.
    scale = tl.div_rn(largest, 127.0 + tl.zeros([GROUPS], tl.float32)) + tl.sum(x * 0.0, 1)
    tl.store(q_ptr + row * G * GROUP + k, q.to(tl.bfloat16), mask=(g < G)[:, None])
    tl.store(scale_ptr + row * G + g, scale, mask=g < G)
    if total_ptr is not None:
        tl.store(total_ptr + row * G + g, scale * tl.sum(q, 1), mask=g < G)


@triton.jit(do_not_specialize=("M",))
def linear_grouped_fwd(
    q_ptr,
    x_scale_ptr,
    total_ptr,
    w_ptr,
    scale_ptr,
    offset_ptr,
    b_ptr,
    y_ptr,
    pre_ptr,
    M,
    N,
    G,
    lines,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO_POINTS: tl.constexpr,
    ACT: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute a tile of y; w_ptr has words of 4 bytes, (panels, lines, 16). LEVELS: see `level_constants`."""
    LINES: tl.constexpr = GROUP * BITS // 32
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    panel, lane = (n // _PANEL).to(tl.int64), n % _PANEL
    slices, k, line = tl.arange(0, SLICES), tl.arange(0, GROUP), tl.arange(0, LINES)
    live_n = n < N
    w_at = w_ptr + (panel * lines * _PANEL + lane)[None, None, :]
    s_at = (panel * G * _PANEL + lane)[None, :]
    row = m.to(tl.int64)[None, :] * G
    acc = tl.zeros([SLICES, BLOCK_M, BLOCK_N], tl.float32)
    for at in range(0, G, SLICES):
        g = at + slices
        live = (g < G)[:, None] & (m < M)[None, :]
        q_at = q_ptr + (row + g[:, None])[:, :, None] * GROUP + k[None, None, :]
        q = tl.load(q_at, mask=live[:, :, None], other=0.0)
        step = g[:, None] * LINES + line[None, :]
        live_w = (step < lines)[:, :, None] & live_n[None, None, :]
        words = tl.load(w_at + step[:, :, None] * _PANEL, mask=live_w, other=0)
        sums = tl.dot(q, decoded_levels(words, BITS, LEVELS), input_precision="ieee")
        live_s = (g < G)[:, None] & live_n[None, :]
        scale = tl.load(scale_ptr + s_at + g[:, None] * _PANEL, mask=live_s, other=0.0).to(tl.float32)
        x_scale = tl.load(x_scale_ptr + row + g[:, None], mask=live, other=0.0)
        acc += sums * (x_scale[:, :, None] * scale[:, None, :])
        if offset_ptr is not None:
            offset = tl.load(offset_ptr + s_at + g[:, None] * _PANEL, mask=live_s, other=0.0).to(tl.float32)
            if ZERO_POINTS:
                offset = -offset * scale
            total = tl.load(total_ptr + row + g[:, None], mask=live, other=0.0)
            acc += total[:, :, None] * offset[:, None, :]
    y = tl.sum(acc, 0)
    if b_ptr is not None:
        y += tl.load(b_ptr + n, mask=live_n, other=0.0).to(tl.float32)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    if pre_ptr is not None:
        tl.store(pre_ptr + at, y.to(pre_ptr.dtype.element_ty), mask=(m < M)[:, None] & live_n[None, :])
    if ACT == "clamped_up":
        y = up_factor(y, "clamped_swiglu")
    elif ACT is not None:
        y, _ = activate(y, ACT)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & live_n[None, :])


def objection(x: Tensor, w: Tensor, scale: Tensor, *_, group: int = 32, **__) -> str | None:
    if group not in GROUPS:
        return f"takes groups of {', '.join(map(str, GROUPS))} inputs, got {group}"
    return launch.objection(x, w, scale)


def forward(outputs, saved, x, w, scale, offset, b, order, *, out, bits, group, levels, zero_points, activation):
    y, x = outputs[0], launch.as_rows(x)
    pre = saved[0] if saved and activation != "none" else None
    (rows, width), outs, groups = x.shape, y.shape[-1], scale.shape[1]
    if not y.numel():
        return
    tile = TILES["few" if rows <= FEW_ROWS else "many"]
    q = torch.empty(rows, groups, group, dtype=torch.bfloat16, device=x.device)
    x_scale = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    totals = None if offset is None else torch.empty_like(x_scale)
    with launch.device_of(x):
        linear_grouped_round[(rows, triton.cdiv(groups, ROUND_GROUPS))](
            x_ptr=x, order_ptr=order, q_ptr=q, scale_ptr=x_scale, total_ptr=totals, stride_x=x.stride(0), K=width,
            G=groups, GROUP=group, GROUPS=ROUND_GROUPS, num_warps=ROUND.warps, num_stages=ROUND.stages,
        )  # fmt: skip
        linear_grouped_fwd[(triton.cdiv(outs, tile.BLOCK_N), triton.cdiv(rows, tile.BLOCK_M))](
            q_ptr=q, x_scale_ptr=x_scale, total_ptr=totals, w_ptr=w.view(torch.int32), scale_ptr=scale,
            offset_ptr=offset, b_ptr=b, y_ptr=y, pre_ptr=pre, M=rows, N=outs, G=groups, lines=w.shape[1], BITS=bits,
            LEVELS=level_constants(bits, levels), GROUP=group, ZERO_POINTS=zero_points, **_sizes(tile),
            ACT=None if activation == "none" else activation, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def backward(grads, inputs, outputs, saved, needs, *, out, bits, group, levels, zero_points, activation):
    x, w, scale, offset, _, order = inputs
    dx, db = gradients(
        grads[0], input_width(x, saved[0]), saved[0], w, scale, offset, order, (needs[0], needs[4]), bits=bits,
        group=group, levels=levels, zero_points=zero_points, activation=activation,
    )  # fmt: skip
    return dx, None, None, None, db, None


def _sizes(tile: GroupedTile) -> dict[str, int]:
    return {"SLICES": SLICES, "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N}


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Yield the static check's cases: 4 bits as GPTQ and Q4_K have them, 8 bits, a table of levels, and both tiles."""
    types = {"q_ptr": "*bf16", "x_scale_ptr": "*fp32", "total_ptr": "*fp32", "w_ptr": "*i32", "scale_ptr": "*fp16",
             "offset_ptr": "*fp16"}  # fmt: skip
    for label, bits, levels, group, act, absent in (
        ("4 bits by 128", 4, "signed", 128, None, ("b_ptr", "pre_ptr")),
        ("4 bits by 32", 4, "unsigned", 32, "silu", ()),
        ("8 bits by 32", 8, "signed", 32, None, ("offset_ptr", "total_ptr", "pre_ptr")),
        ("fp4 by 32", 4, "fp4", 32, None, ("offset_ptr", "total_ptr", "pre_ptr")),
    ):
        for name, tile in TILES.items():
            given = {"BITS": bits, "LEVELS": level_constants(bits, levels), "GROUP": group, "ZERO_POINTS": group == 128,
                     "ACT": act, **dict.fromkeys(absent)}  # fmt: skip
            yield launch.case(linear_grouped_fwd, f"bf16 {name}, {label}", tile, "bf16", {**given, **_sizes(tile)},
                              matmul=True, narrow=True, hot=label == "4 bits by 128", **types)  # fmt: skip
    sizes = {"GROUP": 128, "GROUPS": ROUND_GROUPS}
    types = {"q_ptr": "*bf16", "scale_ptr": "*fp32", "total_ptr": "*fp32", "order_ptr": "*i32"}
    yield launch.case(linear_grouped_round, "bf16 by 128", ROUND, "bf16", sizes, **types)
