"""Products of up to 16 rows, which cost what reading the weight costs: the linear layers of a decoding step.

    y = act(x w^T + b)        gated: y = act(x g^T + c) (x w^T + b)

A program owns BLOCK_N outputs and reads their rows of the weight whole, in 16-byte asynchronous copies several stages
ahead; each of its warps takes a SLICE of every step along C, and their sums are added at the end in one order: nothing
is shared between programs. The rows of x are padded to the 16 of one matrix instruction, whatever their number, so
that a row's bits depend neither on how many there are nor on its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.gpu import launch, overlap
from peakgpt.kernels.gpu.gemm.activation import activate
from peakgpt.kernels.gpu.launch import AotCase, Tile


@dataclass(frozen=True, kw_only=True)
class FewRowsTile(Tile):
    """SLICES * BLOCK_K inputs a step, a slice for each warp."""

    SLICES: int
    BLOCK_N: int
    BLOCK_K: int


ROWS = 16
PREFETCH_BYTES = 1 << 15  # a program, while the kernel before runs: two microseconds of an H100 over 200 programs
# Unmeasured on hardware, by count: an H100's 3.35 TB/s at 0.8 us of latency want 2.7 MB in flight, 20 KB a processor.
# "wide" holds 24 KB a program in 48 KB of shared memory: four programs a processor, so that the 400 of GPT-2 1558M's
# first MLP product are all there at once. Where these would leave processors idle, as for its 1600 outputs, "narrow"
# has twice the programs, with 24 KB each, and twice the warps, whose chains of products are half as long.
TILES = {
    **{(arch, "wide"): FewRowsTile(SLICES=4, BLOCK_N=16, BLOCK_K=64, warps=4, stages=4) for arch in launch.CLASSES},
    **{(arch, "narrow"): FewRowsTile(SLICES=8, BLOCK_N=8, BLOCK_K=64, warps=8, stages=4) for arch in launch.CLASSES},
    **{("gfx942", width): FewRowsTile(SLICES=4, BLOCK_N=16, BLOCK_K=64, warps=4, stages=2)
       for width in ("wide", "narrow")},
}  # fmt: skip
FLOAT32 = FewRowsTile(SLICES=4, BLOCK_N=16, BLOCK_K=32, warps=4, stages=2)

# Up to how many rows these run instead of cuBLAS, by class and precision. Unmeasured, by count: every byte of the
# weight is read once, as by nobody better, and no second kernel adds parts of C. Not float32, whose products have no
# matrix instruction and are padded sixteenfold; not gfx942, where too little is in flight.
MOST_ROWS = {(arch, "half"): ROWS for arch in ("sm_80", "sm_86", "sm_90", "sm_100")}
HOT = {("narrow", "plain"), ("wide", "gelu"), ("wide", "gated")}  # of the static check
ALIGN = 16  # elements: what Triton must know of strides to copy 16 bytes at a time


@triton.jit
def _weights(w_at, live, n, N):
    return tl.load(w_at, mask=live[:, :, None] & (n < N)[None, None, :], other=0.0)


@triton.jit
def _end(acc, b_ptr, pre_ptr, n, at, live, N):
    """The sum of the slices, and the bias; stored in pre where given."""
    y = tl.sum(acc, 0)
    if b_ptr is not None:
        y += tl.load(b_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if pre_ptr is not None:
        tl.store(pre_ptr + at, y.to(pre_ptr.dtype.element_ty), mask=live)
    return y


@triton.jit(do_not_specialize=("M",))
def few_rows_fwd(
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
    row = tl.program_id(0) * BLOCK_N
    n = row + tl.arange(0, BLOCK_N)
    if OVERLAP:
        overlap.prefetch(w_ptr, stride_w, row, BLOCK_N, N, K, PREFETCH, THREADS)
        if gate_w_ptr is not None:
            overlap.prefetch(gate_w_ptr, stride_gate_w, row, BLOCK_N, N, K, PREFETCH, THREADS)
    overlap.follow(OVERLAP)
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
        acc = tl.dot(x, _weights(w_at + k[:, :, None], k < K, n, N), acc, input_precision="ieee")
        if gate_w_ptr is not None:
            gate_w = _weights(gate_w_at + k[:, :, None], k < K, n, N)
            gate_acc = tl.dot(x, gate_w, gate_acc, input_precision="ieee")

    kind = y_ptr.dtype.element_ty
    at = m[:, None] * N + n[None, :]
    live = (m < M)[:, None] & (n < N)[None, :]
    if gate_w_ptr is not None:
        gate = _end(gate_acc, gate_b_ptr, gate_pre_ptr, n, at, live, N)
        gate, _ = activate(gate.to(kind).to(tl.float32), ACT)
        y = gate * _end(acc, b_ptr, pre_ptr, n, at, live, N).to(kind).to(tl.float32)
    else:
        y = _end(acc, b_ptr, pre_ptr, n, at, live, N)
        if ACT is not None:
            y, _ = activate(y.to(kind).to(tl.float32), ACT)
    tl.store(y_ptr + at, y.to(kind), mask=live)


def takes(x: Tensor, *weights: Tensor) -> bool:
    """Whether the product of x (R, C) with weights (F, C) is for this file: few rows of C, each on 16 bytes.

    Weights that lie by inputs, as Conv1D's, are the library's: a block of 16 outputs has 32 bytes together there.
    """
    return 1 <= x.shape[0] <= MOST_ROWS.get((launch.arch(x), _precision(x)), 0) and _aligned(x, *weights)


def _aligned(*tensors: Tensor) -> bool:
    return all(
        t.stride(1) == 1 and t.shape[1] % ALIGN == t.stride(0) % ALIGN == t.data_ptr() % 16 == 0 for t in tensors
    )


def product(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    y: Tensor,
    *,
    pre: Tensor | None = None,
    gate: tuple[Tensor, Tensor | None, Tensor | None] = (None, None, None),
    activation: str | None = None,
) -> None:
    """Fill y = act(x w^T + b), and pre = x w^T + b where given.

    Args:
        x: (R, C), R up to ROWS, with a unit stride along C, as the weights have.
        w: (F, C).
        b: (F,) or None.
        y, pre: (R, F) contiguous.
        gate: the second weight, its bias, and where its product goes: then y = act(x g^T + c) (x w^T + b).
        activation: None for none.
    """
    (rows, width), outputs, (gate_w, gate_b, gate_pre) = x.shape, w.shape[0], gate
    tile = _tile(x, outputs)
    early = {"OVERLAP": False}  # what is fetched before its time must start on 16 bytes
    if _aligned(w) and (gate_w is None or _aligned(gate_w)):
        early = overlap.options(x, rows)
    with launch.on(x):
        few_rows_fwd[(triton.cdiv(outputs, tile.BLOCK_N),)](
            x_ptr=x, w_ptr=w, b_ptr=b, pre_ptr=pre, gate_w_ptr=gate_w, gate_b_ptr=gate_b, gate_pre_ptr=gate_pre,
            y_ptr=y, M=rows, N=outputs, K=width, stride_x=x.stride(0), stride_w=w.stride(0),
            stride_gate_w=None if gate_w is None else gate_w.stride(0), ACT=activation, **_sizes(tile),
            num_warps=tile.warps, num_stages=tile.stages, **early,
        )  # fmt: skip


def _precision(x: Tensor) -> str:
    return "fp32" if x.dtype == torch.float32 else "half"


def _tile(x: Tensor, outputs: int) -> FewRowsTile:
    """By the outputs alone, whatever the number of rows: a row's bits follow from it."""
    if x.dtype == torch.float32:
        return FLOAT32
    wide = TILES[launch.arch(x), "wide"]
    idle = triton.cdiv(outputs, wide.BLOCK_N) < launch.processors(x)
    return TILES[launch.arch(x), "narrow"] if idle else wide


def _sizes(tile: FewRowsTile) -> dict[str, int]:
    return {
        "SLICES": tile.SLICES, "ROWS": ROWS, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K,
        "PREFETCH": PREFETCH_BYTES // tile.BLOCK_N, "THREADS": 32 * tile.warps,
    }  # fmt: skip


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Every row, plain and gated, with and without what only training stores; hot are those of a decoding step."""
    kept, gate = ("pre_ptr", "gate_pre_ptr"), ("gate_w_ptr", "gate_b_ptr", "gate_pre_ptr", "stride_gate_w")
    for width in ("wide", "narrow"):
        tile = TILES[arch, width]
        for what, act, absent in (
            ("plain", None, {*kept, *gate}),
            ("gelu", "gelu_tanh", {*kept, *gate}),
            ("gelu kept", "gelu_tanh", gate),
            ("gated", "silu", kept),
            ("gated kept", "silu", ()),
        ):
            given = {"ACT": act, **dict.fromkeys(absent), **_sizes(tile), "OVERLAP": arch in overlap.CLASSES}
            yield launch.case(few_rows_fwd, f"bf16 {width} {what}", tile, "bf16", given, matmul=True, narrow=True,
                              hot=(width, what) in HOT)  # fmt: skip
    given = {"ACT": None, **dict.fromkeys({*kept, *gate}), **_sizes(FLOAT32), "OVERLAP": arch in overlap.CLASSES}
    yield launch.case(few_rows_fwd, "fp32", FLOAT32, "fp32", given, hot=False)
