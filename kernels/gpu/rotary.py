"""Rotary position embedding in Triton: each feature takes its partner's value from the cache it has just been read to.

y[d] = x[d] cos - x[partner(d)] sin      d the first of its pair; + for the second
"""

from __future__ import annotations

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
    if INTERLEAVED:
        pair, second = d // 2, d % 2
        partner = d + 1 - 2 * second
    else:
        pair, second = d % PAIRS, d // PAIRS
        partner = d + PAIRS - 2 * PAIRS * second
    live = (head < N) & (d < D)
    turns = (head < turned) & (d < 2 * PAIRS)
    x_row = x_ptr + (row // T) * stride_b + t * stride_t + head * stride_h
    x = tl.load(x_row + d, mask=live, other=0.0)
    other = tl.load(x_row + partner, mask=turns, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + t * PAIRS + pair, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + t * PAIRS + pair, mask=turns, other=0.0).to(tl.float32) * sign
    y = x.to(tl.float32) * cos + tl.where(second == 0, -other, other) * sin
    tl.store(y_ptr + (row * N + head) * D + d, y.to(y_ptr.dtype.element_ty), mask=live)


def objection(x: Tensor, *_, **__) -> str | None:
    return launch.objection(x)


def forward(outputs, saved, x, cos, sin, *, heads, interleaved):
    _turn(x, cos, sin, outputs[0], heads, interleaved, 1.0)


def backward(grads, inputs, outputs, saved, needs, *, heads, interleaved):
    _, cos, sin = inputs
    dx = torch.empty(grads[0].shape, dtype=grads[0].dtype, device=grads[0].device)
    _turn(grads[0], cos, sin, dx, heads, interleaved, -1.0)
    return dx, None, None


def _blocks(heads: int, width: int) -> dict[str, int]:
    wide = triton.next_power_of_2(width)
    return {"BLOCK_N": min(triton.next_power_of_2(heads), max(1, ROW.ELEMENTS // wide)), "BLOCK_D": wide}


def _turn(x, cos, sin, y, heads, interleaved, sign):
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
