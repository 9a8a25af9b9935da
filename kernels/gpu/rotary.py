"""Rotary position embedding in Triton.

    y[d] = x[d] cos - x[partner(d)] sin      for the first feature of each pair; + for the second

A thread loads its own value and, in a second load, the partner's value: the first loads have brought it into the cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.gpu import launch
from peakgpt.kernels.gpu.launch import AotCase, Tile

NO_GRADIENT = ("cos", "sin")


@dataclass(frozen=True, kw_only=True)
class RotaryTile(Tile):
    ELEMENTS: int  # heads * features that a program holds


TILE = RotaryTile(ELEMENTS=2048, warps=4)  # 16 elements a thread; not measured on hardware


@triton.jit
def partners(d, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return for each feature d < 2 PAIRS: its pair, whether it is the pair's first feature, and the other feature."""
    if INTERLEAVED:
        pair, first = d // 2, d % 2 == 0
        step = 1
    else:
        pair, first = d % PAIRS, d < PAIRS
        step = PAIRS
    return pair, first, tl.where(first, d + step, d - step)


@triton.jit
def rotate_back(
    x, row, live, cos_ptr, sin_ptr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Turn the gradient of rotated rows into the gradient of the rows before rotation.

    x is a float32 tile (len(row), BLOCK_D) in registers, so the partner's value comes from a gather. The sin table is
    used before the gather and the cos table is loaded after it: with both in registers at once, D = 128 spills on sm_90
    and D = 64 on sm_100.
    """
    d = tl.arange(0, BLOCK_D)[None, :]
    pair, first, partner = partners(d, PAIRS, INTERLEAVED)
    rotated = d < 2 * PAIRS
    at, live = row[:, None] * PAIRS + tl.where(rotated, pair, 0), live[:, None] & rotated
    product = tl.where(first, -x, x) * tl.load(sin_ptr + at, mask=live, other=0.0).to(tl.float32)
    other = tl.gather(product, tl.broadcast_to(tl.where(rotated, partner, d), x.shape), 1)
    return x * tl.load(cos_ptr + at, mask=live, other=1.0).to(tl.float32) + other


@triton.jit
def rotary_apply(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    stride_b,
    stride_t,
    stride_h,
    T,
    N,
    rotated_heads,
    sign,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rotate the first rotated_heads of the N heads of one token, copy the others. sign is -1 for the inverse."""
    row = tl.program_id(0).to(tl.int64)
    t = row % T
    head = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    pair, first, partner = partners(d, PAIRS, INTERLEAVED)
    live = (head < N) & (d < D)
    rotated = (head < rotated_heads) & (d < 2 * PAIRS)
    x_row = x_ptr + (row // T) * stride_b + t * stride_t + head * stride_h
    x = tl.load(x_row + d, mask=live, other=0.0)
    other = tl.load(x_row + partner, mask=rotated, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + t * PAIRS + pair, mask=rotated, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + t * PAIRS + pair, mask=rotated, other=0.0).to(tl.float32) * sign
    y = x.to(tl.float32) * cos + tl.where(first, -other, other) * sin
    tl.store(y_ptr + (row * N + head) * D + d, y.to(y_ptr.dtype.element_ty), mask=live)


def objection(x: Tensor, *_, **__) -> str | None:
    return launch.objection(x)


def forward(outputs, saved, x, cos, sin, *, heads, interleaved):
    rotate(x, cos, sin, outputs[0], heads, interleaved)


def backward(grads, inputs, outputs, saved, needs, *, heads, interleaved):
    _, cos, sin = inputs
    dx = torch.empty(grads[0].shape, dtype=grads[0].dtype, device=grads[0].device)
    rotate(grads[0], cos, sin, dx, heads, interleaved, sign=-1.0)
    return dx, None, None


def _blocks(heads: int, width: int) -> dict[str, int]:
    block_d = triton.next_power_of_2(width)
    return {"BLOCK_N": min(triton.next_power_of_2(heads), max(1, TILE.ELEMENTS // block_d)), "BLOCK_D": block_d}


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, heads: int, interleaved: bool, *, sign: float = 1.0
) -> None:
    """Fill y (B, T, N, D) with x after rotation of its first `heads` heads; sign -1 rotates back.

    y, cos and sin are contiguous.
    """
    batch, tokens, count, width = x.shape
    if not x.numel() or not cos.shape[1]:
        y.copy_(x)
        return
    x = launch.unit_last(x)
    blocks = _blocks(count, width)
    with launch.device_of(x):
        rotary_apply[(batch * tokens, triton.cdiv(count, blocks["BLOCK_N"]))](
            x_ptr=x, cos_ptr=cos, sin_ptr=sin, y_ptr=y,
            stride_b=x.stride(0), stride_t=x.stride(1), stride_h=x.stride(2), T=tokens, N=count, rotated_heads=heads,
            sign=sign, D=width, PAIRS=cos.shape[1], INTERLEAVED=interleaved, **blocks,
            num_warps=TILE.warps, num_stages=TILE.stages,
        )  # fmt: skip


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Yield the static check's cases: the heads of GPT-NeoX-20B and of GPT-J."""
    types = {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "sign": "fp32"}
    for heads, width, pairs, interleaved in ((192, 96, 12, False), (48, 256, 32, True)):
        sizes = {"D": width, "PAIRS": pairs, "INTERLEAVED": interleaved, **_blocks(heads, width)}
        yield launch.case(rotary_apply, f"bf16 D={width}", TILE, "bf16", sizes, **types)
