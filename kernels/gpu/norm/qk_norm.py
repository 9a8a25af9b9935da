"""RMSNorm of queries and keys with their rotary embedding in Triton. Math: kernels/ops/qk_norm.py.

A unit is the heads of a token that share a mean: one head, or all query heads, or all key heads. A program holds whole
units. As in kernels/gpu/rotary.py, the partner of a feature is a second load of the same memory.

Backward programs loop over tokens with the same units and sum dn z in registers. reduce.py adds these partial sums in a
fixed order, so the gradients of the weights are the same from run to run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.gpu import launch, overlap, rotary
from peakgpt.kernels.gpu.launch import AotCase, Tile
from peakgpt.kernels.gpu.reduce import empty_partials, sum_partials
from peakgpt.kernels.gpu.rotary import partners
from peakgpt.kernels.ops.norm import default_eps
from peakgpt.kernels.ops.qk_norm import is_joint

NO_GRADIENT = rotary.NO_GRADIENT
ELEMENTS = 1024  # that a program holds, if a unit is not larger
# Keyed by the most elements of a program. Not measured on hardware; 8 to 16 elements a thread.
TILES = {1024: Tile(warps=4), 2048: Tile(warps=4), 4096: Tile(warps=8), 16384: Tile(warps=16)}
MAX_UNIT = max(TILES)
PROGRAMS_PER_PROCESSOR = 4  # of qk_norm_bwd


@triton.jit
def _features(H, N, D: tl.constexpr, JOINT: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the units of this program, (BLOCK_U,), the number of their features, and of each feature,
    (BLOCK_U, BLOCK_C): its head, its index in the head and in the weight, and whether it exists.
    """  # fmt: skip
    block = tl.program_id(1)
    c = tl.arange(0, BLOCK_C)[None, :] + tl.zeros([BLOCK_U, BLOCK_C], tl.int32)
    if JOINT:  # unit 0 has the query heads, unit 1 the key heads
        unit = block + tl.arange(0, BLOCK_U)
        count = tl.where(block == 0, H, N - H) * D
        head, d, live = tl.where(block == 0, 0, H) + c // D, c % D, c < count
    else:
        unit = block * BLOCK_U + tl.arange(0, BLOCK_U)
        count = D
        head, d, live = unit[:, None] + tl.zeros_like(c), c, (unit[:, None] < N) & (c < D)
    return unit, count, head, d, c, live


@triton.jit
def _weights(q_norm_ptr, k_norm_ptr, at, head, H, live, OFFSET: tl.constexpr):
    """Load the weights of features as float32, plus OFFSET; `at` is the index in the weight."""
    q = tl.load(q_norm_ptr + at, mask=live & (head < H), other=0.0).to(tl.float32)
    k = tl.load(k_norm_ptr + at, mask=live & (head >= H), other=0.0).to(tl.float32)
    return tl.where(head < H, q, k) + OFFSET


@triton.jit
def qk_norm_fwd(
    x_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    r_ptr,
    stride_x_b,
    stride_x_t,
    stride_x_h,
    T,
    H,
    N,
    units,
    eps,
    OFFSET: tl.constexpr,
    JOINT: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Normalize and rotate BLOCK_U units of one of the tokens; N heads, the first H of them are queries."""
    overlap.wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    t = row % T
    unit, count, head, d, at_w, live = _features(H, N, D, JOINT, BLOCK_U, BLOCK_C)
    x_ptr += row // T * stride_x_b + t * stride_x_t
    at = head.to(tl.int64) * stride_x_h
    x = tl.load(x_ptr + at + d, mask=live, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, 1) / count + eps)
    y = x * r[:, None] * _weights(q_norm_ptr, k_norm_ptr, at_w, head, H, live, OFFSET)
    if cos_ptr is not None:
        pair, first, partner = partners(d, PAIRS, INTERLEAVED)
        rotated = live & (d < 2 * PAIRS)
        other = tl.load(x_ptr + at + partner, mask=rotated, other=0.0).to(tl.float32) * r[:, None]
        other *= _weights(q_norm_ptr, k_norm_ptr, at_w + partner - d, head, H, rotated, OFFSET)
        cos = tl.load(cos_ptr + t * PAIRS + pair, mask=rotated, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + t * PAIRS + pair, mask=rotated, other=0.0).to(tl.float32)
        y = y * cos + tl.where(first, -other, other) * sin
    tl.store(y_ptr + (row * N + head) * D + d, y.to(y_ptr.dtype.element_ty), mask=live)
    tl.store(r_ptr + row * units + unit, r, mask=unit < units)


@triton.jit(do_not_specialize=("rows",))
def qk_norm_bwd(
    dy_ptr,
    x_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    r_ptr,
    dx_ptr,
    q_partial_ptr,
    k_partial_ptr,
    stride_dy_b,
    stride_dy_t,
    stride_dy_h,
    stride_x_b,
    stride_x_t,
    stride_x_h,
    stride_dx_b,
    stride_dx_t,
    stride_dx_h,
    rows,
    T,
    H,
    N,
    units,
    OFFSET: tl.constexpr,
    JOINT: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store dx of BLOCK_U units of tokens pid, pid + programs, ..., and the program's sums of dn z for each head."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    unit, count, head, d, at_w, live = _features(H, N, D, JOINT, BLOCK_U, BLOCK_C)
    pair, first, partner = partners(d, PAIRS, INTERLEAVED)
    rotated = live & (d < 2 * PAIRS)
    wide_head = head.to(tl.int64)
    dw = tl.zeros([BLOCK_U, BLOCK_C], tl.float32)
    for i in range(pid, rows, programs):
        row = tl.cast(i, tl.int64)
        b, t = row // T, row % T
        dy_head = dy_ptr + b * stride_dy_b + t * stride_dy_t + wide_head * stride_dy_h
        dn = tl.load(dy_head + d, mask=live, other=0.0).to(tl.float32)
        if cos_ptr is not None:
            other = tl.load(dy_head + partner, mask=rotated, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + t * PAIRS + pair, mask=rotated, other=0.0).to(tl.float32)
            other = tl.where(first, other, -other) * sin
            dn = dn * tl.load(cos_ptr + t * PAIRS + pair, mask=rotated, other=1.0).to(tl.float32) + other
        x_at = b * stride_x_b + t * stride_x_t + wide_head * stride_x_h + d
        r = tl.load(r_ptr + row * units + unit, mask=unit < units, other=0.0)[:, None]
        z = tl.load(x_ptr + x_at, mask=live, other=0.0).to(tl.float32) * r
        dw += dn * z
        g = dn * _weights(q_norm_ptr, k_norm_ptr, at_w, head, H, live, OFFSET)
        dx = r * (g - z * (tl.sum(g * z, 1) / count)[:, None])
        dx_at = b * stride_dx_b + t * stride_dx_t + wide_head * stride_dx_h + d
        tl.debug_barrier()  # dx may be dy, whose partners other threads have loaded by now
        tl.store(dx_ptr + dx_at, dx.to(dx_ptr.dtype.element_ty), mask=live)
    is_query = head < H
    tl.store(q_partial_ptr + (pid.to(tl.int64) * H + head) * D + d, dw, mask=live & is_query)
    tl.store(k_partial_ptr + (pid.to(tl.int64) * (N - H) + head - H) * D + d, dw, mask=live & (head >= H))


def objection(x: Tensor, q_norm: Tensor, k_norm: Tensor, *_, n_head: int, **__) -> str | None:
    heads, width = x.shape[2:]
    if not width:
        return "takes heads of at least 1 feature, got 0"
    count = max(n_head, heads - n_head) * width if is_joint(q_norm, k_norm, width) else width
    if count > MAX_UNIT:
        return f"takes up to {MAX_UNIT} features with one mean, got {count}"
    return launch.objection(x)


def forward(outputs, saved, *tensors, **params) -> None:
    normalize(outputs[0], saved[0], *tensors, **params)


def backward(grads, inputs, outputs, saved, needs, *, eps, **params) -> Sequence[Tensor | None]:
    x = inputs[0]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dw = gradients(dx, grads[0], saved[0], *inputs, **params)
    return dx, *dw, None, None


def normalize(
    y: Tensor, r: Tensor, x: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor | None, sin: Tensor | None, *,
    eps: float | None, **options,
) -> None:  # fmt: skip
    """Fill y (B, T, H + K, D), contiguous, and r with the results of the op `qk_norm`."""
    if not x.numel():
        return
    x, rows = launch.unit_last(x), x.shape[0] * x.shape[1]
    blocks, arguments = _arguments(x, q_norm, k_norm, cos, sin, **options)
    with launch.device_of(x):
        qk_norm_fwd[(rows, blocks)](
            y_ptr=y, r_ptr=r, eps=default_eps(x.dtype, eps), **_strides(x=x), **arguments, **overlap.options(x, rows)
        )


def gradients(
    dx: Tensor, dy: Tensor, r: Tensor, x: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor | None,
    sin: Tensor | None, **options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill dx (B, T, H + K, D), which has contiguous heads and may be dy; return the gradients of the weights."""
    if not x.numel():
        return torch.zeros_like(q_norm), torch.zeros_like(k_norm)
    x, dy, dw = launch.unit_last(x), launch.unit_last(dy), (torch.empty_like(q_norm), torch.empty_like(k_norm))
    (batch, tokens, heads, width), n_head = x.shape, options["n_head"]
    blocks, arguments = _arguments(x, q_norm, k_norm, cos, sin, **options)
    with launch.device_of(x):
        programs = min(batch * tokens, triton.cdiv(PROGRAMS_PER_PROCESSOR * launch.processors(x), blocks))
        partials = [empty_partials(x, 1, programs * n, width) for n in (n_head, heads - n_head)]
        qk_norm_bwd[(programs, blocks)](
            dy_ptr=dy, r_ptr=r, dx_ptr=dx, q_partial_ptr=partials[0], k_partial_ptr=partials[1], rows=batch * tokens,
            **_strides(x=x, dy=dy, dx=dx), **arguments,
        )  # fmt: skip
        for partial, w in zip(partials, dw, strict=True):
            sum_partials(partial.view(1, -1, w.numel()), w)
    return dw


def _arguments(x, q_norm, k_norm, cos, sin, *, n_head, interleaved, offset) -> tuple[int, dict[str, Any]]:
    """Return the number of blocks of units, and the arguments that both kernels share."""
    tokens, heads, width = x.shape[1:]
    joint, rotates = is_joint(q_norm, k_norm, width), cos is not None and cos.shape[1] > 0
    units = 2 if joint else heads
    blocks = _blocks(units, max(n_head, heads - n_head) * width if joint else width)
    tile = _tile(blocks)
    return triton.cdiv(units, blocks["BLOCK_U"]), {
        "x_ptr": x, "q_norm_ptr": q_norm, "k_norm_ptr": k_norm, "cos_ptr": cos if rotates else None,
        "sin_ptr": sin if rotates else None, "T": tokens, "H": n_head, "N": heads, "units": units,
        "OFFSET": float(offset), "JOINT": joint, "D": width, "PAIRS": cos.shape[1] if rotates else 1,
        "INTERLEAVED": interleaved, **blocks, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {f"stride_{name}_{axis}": t.stride(n) for name, t in tensors.items() for n, axis in enumerate("bth")}


def _blocks(units: int, count: int) -> dict[str, int]:
    """Return the block sizes for units of `count` features. Units of joint means differ in size: one a program."""
    block_c = triton.next_power_of_2(count)
    block_u = 1 if units == 2 else min(triton.next_power_of_2(units), max(1, ELEMENTS // block_c))
    return {"BLOCK_U": block_u, "BLOCK_C": block_c}


def _tile(blocks: dict[str, int]) -> Tile:
    return next(tile for most, tile in TILES.items() if blocks["BLOCK_U"] * blocks["BLOCK_C"] <= most)


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Yield the static check's cases: 16 + 8 heads of 128 and of 256, and joint means of 40 + 8 heads of 128."""
    floats = dict.fromkeys(("cos_ptr", "sin_ptr", "r_ptr", "q_partial_ptr", "k_partial_ptr"), "*fp32")
    for width, joint, offset in ((128, False, 0.0), (256, False, 1.0), (128, True, 0.0)):
        blocks = _blocks(2, 40 * width) if joint else _blocks(24, width)
        sizes = {"D": width, "JOINT": joint, "OFFSET": offset, "PAIRS": width // 2, "INTERLEAVED": False, **blocks}
        label = f"bf16 D={width}{' joint' if joint else ''}"
        for kernel, more in ((qk_norm_fwd, {"OVERLAP": arch in overlap.ARCHS}), (qk_norm_bwd, {})):
            yield launch.case(kernel, label, _tile(blocks), "bf16", {**sizes, **more}, **floats, eps="fp32")
