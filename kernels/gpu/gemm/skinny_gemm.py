"""Skinny GEMM: matrix products of up to 16 rows, such as the linear layers of a decoding step.

    y = act(x w^T + b)        gated: y = act(x g^T + c) (x w^T + b)

Such a product costs as much as reading the weight. Each program computes BLOCK_N outputs and reads their rows of the
weight with 16-byte asynchronous copies, several pipeline stages ahead. Each warp takes one slice of every step along C.
The sums of the slices are added at the end, in a fixed order and within the program. x is padded to the 16 rows of one
matrix instruction for any number of rows, so the bits of a row depend neither on that number nor on the row's index.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.gpu import launch, overlap
from peakgpt.kernels.gpu.gemm.activation import activate, up_factor
from peakgpt.kernels.gpu.launch import AotCase, Tile


@dataclass(frozen=True, kw_only=True)
class SkinnyTile(Tile):
    """Each step covers SLICES * BLOCK_K inputs; each warp takes one slice."""

    SLICES: int
    BLOCK_N: int
    BLOCK_K: int


ROWS = 16
# Bytes of the weight that each program prefetches while the previous kernel runs: for 200 programs 2 us of an H100's
# bandwidth.
PREFETCH_BYTES = 1 << 15
# Derived, not measured: an H100's 3.35 TB/s at a latency of 0.8 us need 2.7 MB in flight, or 20 KB a processor. "wide"
# keeps 24 KB a program in flight in 48 KB of shared memory. Four programs fit on a processor, so the 400 programs of
# GPT-2 1558M's first MLP product run at the same time. If "wide" leaves processors idle, as for 1600 outputs, "narrow"
# has twice as many programs, also with 24 KB each, and twice as many warps: the chains of products are half as long.
TILES = {
    **{(arch, "wide"): SkinnyTile(SLICES=4, BLOCK_N=16, BLOCK_K=64, warps=4, stages=4) for arch in launch.ARCHS},
    **{(arch, "narrow"): SkinnyTile(SLICES=8, BLOCK_N=8, BLOCK_K=64, warps=8, stages=4) for arch in launch.ARCHS},
    **{("gfx942", width): SkinnyTile(SLICES=4, BLOCK_N=16, BLOCK_K=64, warps=4, stages=2)
       for width in ("wide", "narrow")},
}  # fmt: skip
FLOAT32 = SkinnyTile(SLICES=4, BLOCK_N=16, BLOCK_K=32, warps=4, stages=2)

# (architecture, precision) -> the largest number of rows for which this kernel runs instead of cuBLAS. Derived, not
# measured: it reads each byte of the weight once and needs no second kernel to add parts of C. float32 is missing: it
# has no matrix instruction here, so padding would cost 16 times the work. gfx942 is missing: too few bytes in flight.
MAX_ROWS = {(arch, "half"): ROWS for arch in ("sm_80", "sm_86", "sm_90", "sm_100")}
HOT = {("narrow", "plain"), ("wide", "gelu"), ("wide", "gated")}  # cases of a decoding step, for the static check
ALIGN = 16  # elements: Triton copies 16 bytes at a time only if strides are multiples of this


@triton.jit
def _load_weights(w_at, live, n, N):
    """Load the tile (SLICES, BLOCK_K, BLOCK_N) of a weight; live (SLICES, BLOCK_K) marks inputs below K."""
    return tl.load(w_at, mask=live[:, :, None] & (n < N)[None, None, :], other=0.0)


@triton.jit
def _bias_and_store(acc, b_ptr, pre_ptr, n, at, live, N):
    """Add up the slices and the bias, store the result in pre unless pre_ptr is None, and return it."""
    y = tl.sum(acc, 0)
    if b_ptr is not None:
        y += tl.load(b_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if pre_ptr is not None:
        tl.store(pre_ptr + at, y.to(pre_ptr.dtype.element_ty), mask=live)
    return y


@triton.jit(do_not_specialize=("M",))
def skinny_gemm_fwd(
    x_ptr,
    w_ptr,
    b_ptr,
    pre_ptr,
    gate_w_ptr,
    gate_b_ptr,
    gate_pre_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_x,
    stride_w,
    stride_gate_w,
    ACT: tl.constexpr,
    SLICES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    THREADS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Compute BLOCK_N columns of y; gate_w_ptr is None for the product without a gate."""
    row = tl.program_id(0) * BLOCK_N
    n = row + tl.arange(0, BLOCK_N)
    if OVERLAP:
        overlap.prefetch(w_ptr, stride_w, row, BLOCK_N, N, K, PREFETCH, THREADS)
        if gate_w_ptr is not None:
            overlap.prefetch(gate_w_ptr, stride_gate_w, row, BLOCK_N, N, K, PREFETCH, THREADS)
    overlap.wait_for_previous(OVERLAP)
    m = tl.arange(0, ROWS)
    steps = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    x_at = x_ptr + m.to(tl.int64)[None, :, None] * stride_x
    w_at = w_ptr + n.to(tl.int64)[None, None, :] * stride_w
    acc = tl.zeros([SLICES, ROWS, BLOCK_N], tl.float32)
    if gate_w_ptr is not None:
        gate_w_at = gate_w_ptr + n.to(tl.int64)[None, None, :] * stride_gate_w
        gate_acc = tl.zeros([SLICES, ROWS, BLOCK_N], tl.float32)
    for first in range(0, K, SLICES * BLOCK_K):
        k = first + steps
        x = tl.load(x_at + k[:, None, :], mask=(k < K)[:, None, :] & (m < M)[None, :, None], other=0.0)
        acc = tl.dot(x, _load_weights(w_at + k[:, :, None], k < K, n, N), acc, input_precision="ieee")
        if gate_w_ptr is not None:
            gate_w = _load_weights(gate_w_at + k[:, :, None], k < K, n, N)
            gate_acc = tl.dot(x, gate_w, gate_acc, input_precision="ieee")

    dtype = y_ptr.dtype.element_ty
    at = m[:, None] * N + n[None, :]
    live = (m < M)[:, None] & (n < N)[None, :]
    if gate_w_ptr is not None:
        gate = _bias_and_store(gate_acc, gate_b_ptr, gate_pre_ptr, n, at, live, N)
        gate, _ = activate(gate.to(dtype).to(tl.float32), ACT)
        y = gate * up_factor(_bias_and_store(acc, b_ptr, pre_ptr, n, at, live, N).to(dtype).to(tl.float32), ACT)
    else:
        y = _bias_and_store(acc, b_ptr, pre_ptr, n, at, live, N)
        if ACT is not None:
            y, _ = activate(y.to(dtype).to(tl.float32), ACT)
    tl.store(y_ptr + at, y.to(dtype), mask=live)


def supports(x: Tensor, *weights: Tensor) -> bool:
    """Return whether this kernel should run the products of x (R, C) with the weights (F, C).

    It needs few rows, and rows of x and of the weights that start at multiples of 16 bytes. Transposed weights, such as
    those of Conv1D, go to cuBLAS: only 32 bytes of 16 outputs are adjacent there.
    """
    return 1 <= x.shape[0] <= MAX_ROWS.get((launch.arch(x), _precision(x)), 0) and _aligned(x, *weights)


def _aligned(*tensors: Tensor) -> bool:
    return all(
        t.stride(1) == 1 and t.shape[1] % ALIGN == t.stride(0) % ALIGN == t.data_ptr() % 16 == 0 for t in tensors
    )


def skinny_gemm_out(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    y: Tensor,
    *,
    pre: Tensor | None = None,
    gate: tuple[Tensor, Tensor | None, Tensor | None] = (None, None, None),
    activation: str | None = None,
) -> None:
    """Fill y = act(x w^T + b) and, unless it is None, pre = x w^T + b.

    Args:
        x: (R, C) with R <= ROWS; x and the weights have unit stride along C.
        w: (F, C).
        b: (F,) or None.
        y, pre: (R, F) contiguous.
        gate: (g, c, out): a second weight, its bias or None, and a tensor (R, F) for x g^T + c or None. Then
            y = act(x g^T + c) (x w^T + b).
        activation: name of act; None for the identity.
    """
    (rows, width), outputs, (gate_w, gate_b, gate_pre) = x.shape, w.shape[0], gate
    tile = _tile(x, outputs)
    options = {"OVERLAP": False}  # a prefetch needs rows that start at multiples of 16 bytes
    if _aligned(w) and (gate_w is None or _aligned(gate_w)):
        options = overlap.options(x, rows)
    with launch.device_of(x):
        skinny_gemm_fwd[(triton.cdiv(outputs, tile.BLOCK_N),)](
            x_ptr=x, w_ptr=w, b_ptr=b, pre_ptr=pre, gate_w_ptr=gate_w, gate_b_ptr=gate_b, gate_pre_ptr=gate_pre,
            y_ptr=y, M=rows, N=outputs, K=width, stride_x=x.stride(0), stride_w=w.stride(0),
            stride_gate_w=None if gate_w is None else gate_w.stride(0), ACT=activation, **_sizes(tile),
            num_warps=tile.warps, num_stages=tile.stages, **options,
        )  # fmt: skip


def _precision(x: Tensor) -> str:
    return "fp32" if x.dtype == torch.float32 else "half"


def _tile(x: Tensor, outputs: int) -> SkinnyTile:
    """Choose the tile by the number of outputs alone: a row's bits must not depend on the number of rows."""
    if x.dtype == torch.float32:
        return FLOAT32
    wide = TILES[launch.arch(x), "wide"]
    idle = triton.cdiv(outputs, wide.BLOCK_N) < launch.processors(x)
    return TILES[launch.arch(x), "narrow"] if idle else wide


def _sizes(tile: SkinnyTile) -> dict[str, int]:
    return {
        "SLICES": tile.SLICES, "ROWS": ROWS, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K,
        "PREFETCH": PREFETCH_BYTES // tile.BLOCK_N, "THREADS": 32 * tile.warps,
    }  # fmt: skip


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Yield the static check's cases: every tile row, plain and gated, with and without storing for backward."""
    saved, gate = ("pre_ptr", "gate_pre_ptr"), ("gate_w_ptr", "gate_b_ptr", "gate_pre_ptr", "stride_gate_w")
    for width in ("wide", "narrow"):
        tile = TILES[arch, width]
        for variant, act, absent in (
            ("plain", None, {*saved, *gate}),
            ("gelu", "gelu_tanh", {*saved, *gate}),
            ("gelu saved", "gelu_tanh", gate),
            ("gated", "silu", saved),
            ("gated saved", "silu", ()),
        ):
            given = {"ACT": act, **dict.fromkeys(absent), **_sizes(tile), "OVERLAP": arch in overlap.ARCHS}
            yield launch.case(skinny_gemm_fwd, f"bf16 {width} {variant}", tile, "bf16", given, matmul=True, narrow=True,
                              hot=(width, variant) in HOT)  # fmt: skip
    given = {"ACT": None, **dict.fromkeys({*saved, *gate}), **_sizes(FLOAT32), "OVERLAP": arch in overlap.ARCHS}
    yield launch.case(skinny_gemm_fwd, "fp32", FLOAT32, "fp32", given, hot=False)
