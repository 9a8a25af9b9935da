"""Rotary position embedding in Triton: each feature takes its partner's value from the cache it has just been read to.

y[d] = x[d] cos - x[partner(d)] sin      d the first of its pair; + for the second
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
    ELEMENTS: int  # heads times features that a program holds


ROW = RotaryTile(ELEMENTS=2048, warps=4)  # unmeasured on hardware: 16 elements a thread


@triton.jit
def partners(d, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The pair of feature d < 2 PAIRS, whether it is the first of it, and the other one."""
    if INTERLEAVED:
        pair, first = d // 2, d % 2 == 0
        step = 1
    else:
        pair, first = d % PAIRS, d < PAIRS
        step = PAIRS
    return pair, first, tl.where(first, d + step, d - step)


@triton.jit
def turned_back(
    x, row, live, cos_ptr, sin_ptr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Tile x (len(row), BLOCK_D), float32: the gradient of turned rows as that of what they were.

    A partner lies in another register or thread, not in a cache: a gather. What a feature gives away is multiplied
    before it, its own share after it: with both tables at hand first a D of 128 spills on sm_90, one of 64 on sm_100.
    """
    d = tl.arange(0, BLOCK_D)[None, :]
    pair, first, partner = partners(d, PAIRS, INTERLEAVED)
    turns = d < 2 * PAIRS
    at, live = row[:, None] * PAIRS + tl.where(turns, pair, 0), live[:, None] & turns
    given = tl.where(first, -x, x) * tl.load(sin_ptr + at, mask=live, other=0.0).to(tl.float32)
    other = tl.gather(given, tl.broadcast_to(tl.where(turns, partner, d), x.shape), 1)
    return x * tl.load(cos_ptr + at, mask=live, other=1.0).to(tl.float32) + other


@triton.jit
def rotary_turn(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    stride_b,
    stride_t,
    stride_h,
    T,
    N,
    turned,
    sign,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    t = row % T
    head = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    pair, first, partner = partners(d, PAIRS, INTERLEAVED)
    live = (head < N) & (d < D)
    turns = (head < turned) & (d < 2 * PAIRS)
    x_row = x_ptr + (row // T) * stride_b + t * stride_t + head * stride_h
    x = tl.load(x_row + d, mask=live, other=0.0)
    other = tl.load(x_row + partner, mask=turns, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + t * PAIRS + pair, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + t * PAIRS + pair, mask=turns, other=0.0).to(tl.float32) * sign
    y = x.to(tl.float32) * cos + tl.where(first, -other, other) * sin
    tl.store(y_ptr + (row * N + head) * D + d, y.to(y_ptr.dtype.element_ty), mask=live)


def objection(x: Tensor, *_, **__) -> str | None:
    return launch.objection(x)


def forward(outputs, saved, x, cos, sin, *, heads, interleaved):
    turn(x, cos, sin, outputs[0], heads, interleaved)


def backward(grads, inputs, outputs, saved, needs, *, heads, interleaved):
    _, cos, sin = inputs
    dx = torch.empty(grads[0].shape, dtype=grads[0].dtype, device=grads[0].device)
    turn(grads[0], cos, sin, dx, heads, interleaved, sign=-1.0)
    return dx, None, None


def _blocks(heads: int, width: int) -> dict[str, int]:
    wide = triton.next_power_of_2(width)
    return {"BLOCK_N": min(triton.next_power_of_2(heads), max(1, ROW.ELEMENTS // wide)), "BLOCK_D": wide}


def turn(
    x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, heads: int, interleaved: bool, *, sign: float = 1.0
) -> None:
    """Fill y, (B, T, N, D) contiguous."""
    batch, tokens, count, width = x.shape
    if not x.numel() or not cos.shape[1]:
        y.copy_(x)
        return
    x = x if x.stride(3) == 1 else x.contiguous()
    blocks = _blocks(count, width)
    with launch.on(x):
        rotary_turn[(batch * tokens, triton.cdiv(count, blocks["BLOCK_N"]))](
            x_ptr=x, cos_ptr=cos.contiguous(), sin_ptr=sin.contiguous(), y_ptr=y,
            stride_b=x.stride(0), stride_t=x.stride(1), stride_h=x.stride(2), T=tokens, N=count, turned=heads,
            sign=sign, D=width, PAIRS=cos.shape[1], INTERLEAVED=interleaved, **blocks,
            num_warps=ROW.warps, num_stages=ROW.stages,
        )  # fmt: skip


def aot_cases(arch: str) -> Iterator[AotCase]:
    """The static check's cases: NeoX-20B's heads, and GPT-J's."""
    types = {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "sign": "fp32"}
    for heads, width, pairs, interleaved in ((192, 96, 12, False), (48, 256, 32, True)):
        sizes = {"D": width, "PAIRS": pairs, "INTERLEAVED": interleaved, **_blocks(heads, width)}
        yield launch.case(rotary_turn, f"bf16 D={width}", ROW, "bf16", sizes, **types)
