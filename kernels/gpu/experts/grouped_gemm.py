"""Grouped matrix products in Triton: rows that are sorted by expert, times the expert's matrix.

A program computes one tile. Which rows it has follows from the offsets of the experts, which it reads: the grid has as
many tiles as any distribution of the rows could need, and programs past the last tile return. So the host knows no
count, and CUDA graphs and torch.compile work. Only experts with rows are read. Each sum is one loop in one program, so
two runs give the same bits. A row's bits do not depend on the other rows as long as the number of rows selects the same
tiles (`is_few`).

    experts_up_fwd      gate = x[token] w_gate[e]^T     pre = x[token] w_up[e]^T     h = act(gate) pre, or act(pre)
    experts_product     c = a w[e]^T + bias, or a w[e] + a2 w2[e]
    experts_hidden_bwd  g = dy[token] w_down[e], and all that follows from it: dgate, dpre, w h, parts of g . h
    experts_dw          c[e] = sum over the rows of e of a[row]^T b[row]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.gpu import launch
from peakgpt.kernels.gpu.gemm.activation import activate, up_factor, up_gradient
from peakgpt.kernels.gpu.launch import AotCase, Tile


@dataclass(frozen=True, kw_only=True)
class GroupedTile(Tile):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int


# (kernel, whether the experts have few rows) -> tile for bfloat16 and float16. float32 takes FLOAT32, which is not
# optimized. Derived from registers and shared memory, not measured; no spills. A tile of few rows reads the weights
# like skinny_gemm.py: with one row an expert, larger tiles would compute 8 times as much.
TILES = {
    ("up", False): GroupedTile(BLOCK_M=128, BLOCK_N=64, BLOCK_K=32, warps=8, stages=3),
    ("up", True): GroupedTile(BLOCK_M=16, BLOCK_N=32, BLOCK_K=128, warps=4, stages=3),
    ("product", False): GroupedTile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, warps=8, stages=3),
    ("product", True): GroupedTile(BLOCK_M=16, BLOCK_N=64, BLOCK_K=128, warps=4, stages=3),
    ("hidden", False): GroupedTile(BLOCK_M=128, BLOCK_N=64, BLOCK_K=32, warps=8, stages=3),
    # The clamped gate has more values alive: with the tile above it would spill on sm_80.
    ("clamped hidden", False): GroupedTile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, warps=8, stages=3),
    ("dw", False): GroupedTile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, warps=8, stages=3),
}
FLOAT32 = GroupedTile(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, warps=4, stages=2)
AMD_STAGES = 2
FEW_ROWS = 16  # rows an expert on average, up to which tiles have 16 rows
BLOCK_SUM, SUM = 128, Tile(warps=4)  # of experts_column_sums
# Cases of the fast static check.
HOT = {(False, "saved"), (True, "inference"), (False, "down"), (False, "gated"), (False, "dw_up")}


@triton.jit
def _rows_of(offsets_ptr, number, E, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return (expert, first row, end of the expert's rows) of a tile of rows; the expert is >= E past the last tile."""
    e = tl.arange(0, BLOCK_E)
    first = tl.load(offsets_ptr + e, mask=e < E, other=0).to(tl.int32)
    end = tl.load(offsets_ptr + e + 1, mask=e < E, other=0).to(tl.int32)
    tiles = (end - first + BLOCK_M - 1) // BLOCK_M
    is_before = (tl.cumsum(tiles, 0) <= number).to(tl.int32)
    expert = tl.sum(is_before, 0)
    is_mine = (e == expert).to(tl.int32)
    row = tl.sum(is_mine * first, 0) + (number - tl.sum(is_before * tiles, 0)) * BLOCK_M
    return expert, row, tl.sum(is_mine * end, 0)


@triton.jit
def _load_a(a_ptr, at, live, k, K):
    return tl.load(a_ptr + at[:, None] * K + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def _load_w(w_ptr, n, k, N, K, BY_N: tl.constexpr):
    """Load the tile (BLOCK_K, BLOCK_N) of a matrix stored as (N, K) if BY_N, else as (K, N)."""
    if BY_N:  # noqa: SIM108  an expression would compile both branches
        at = n[None, :] * K + k[:, None]
    else:
        at = k[:, None] * N + n[None, :]
    return tl.load(w_ptr + at, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)


@triton.jit
def _add_bias(acc, bias_ptr, expert, n, N):
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + expert * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def experts_up_fwd(
    x_ptr, order_ptr, offsets_ptr, gate_w_ptr, gate_b_ptr, w_ptr, b_ptr, gate_ptr, pre_ptr, h_ptr, N, K, E, CHOICES,
    ACT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute one tile of h, and of gate and pre unless their pointers are None. Without gate_w_ptr h = act(pre)."""
    columns = tl.cdiv(N, BLOCK_N)
    expert, first, end = _rows_of(offsets_ptr, tl.program_id(0) // columns, E, BLOCK_E, BLOCK_M)
    if expert < E:
        index = expert.to(tl.int64)
        n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
        row = first + tl.arange(0, BLOCK_M)
        token = tl.load(order_ptr + row, mask=row < end, other=0) // CHOICES
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if gate_w_ptr is not None:
            gate_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(0, K, BLOCK_K):
            k = step + tl.arange(0, BLOCK_K)
            x = _load_a(x_ptr, token, row < end, k, K)
            acc = tl.dot(x, _load_w(w_ptr + index * N * K, n, k, N, K, True), acc, input_precision="ieee")
            if gate_w_ptr is not None:
                w = _load_w(gate_w_ptr + index * N * K, n, k, N, K, True)
                gate_acc = tl.dot(x, w, gate_acc, input_precision="ieee")
        dtype = h_ptr.dtype.element_ty
        at = row.to(tl.int64)[:, None] * N + n[None, :]
        live = (row < end)[:, None] & (n < N)[None, :]
        pre = _add_bias(acc, b_ptr, index, n, N).to(dtype)
        if pre_ptr is not None:
            tl.store(pre_ptr + at, pre, mask=live)
        if gate_w_ptr is not None:
            gate = _add_bias(gate_acc, gate_b_ptr, index, n, N).to(dtype)
            if gate_ptr is not None:
                tl.store(gate_ptr + at, gate, mask=live)
            h, _ = activate(gate.to(tl.float32), ACT)
            h *= up_factor(pre.to(tl.float32), ACT)
        else:
            h, _ = activate(pre.to(tl.float32), ACT)
        tl.store(h_ptr + at, h.to(dtype), mask=live)


@triton.jit
def experts_product(
    a_ptr, w_ptr, a2_ptr, w2_ptr, bias_ptr, offsets_ptr, c_ptr, N, K, E, BY_N: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute one tile of c = a w[e] (+ a2 w2[e]) (+ bias[e]); w is (E, N, K) if BY_N, else (E, K, N)."""
    columns = tl.cdiv(N, BLOCK_N)
    expert, first, end = _rows_of(offsets_ptr, tl.program_id(0) // columns, E, BLOCK_E, BLOCK_M)
    if expert < E:
        index = expert.to(tl.int64)
        n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
        row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(0, K, BLOCK_K):
            k = step + tl.arange(0, BLOCK_K)
            a = _load_a(a_ptr, row, row < end, k, K)
            acc = tl.dot(a, _load_w(w_ptr + index * N * K, n, k, N, K, BY_N), acc, input_precision="ieee")
        if a2_ptr is not None:
            for step in range(0, K, BLOCK_K):
                k = step + tl.arange(0, BLOCK_K)
                a = _load_a(a2_ptr, row, row < end, k, K)
                acc = tl.dot(a, _load_w(w2_ptr + index * N * K, n, k, N, K, BY_N), acc, input_precision="ieee")
        acc = _add_bias(acc, bias_ptr, index, n, N)
        live = (row < end)[:, None] & (n < N)[None, :]
        tl.store(c_ptr + row[:, None] * N + n[None, :], acc.to(c_ptr.dtype.element_ty), mask=live)


@triton.jit
def experts_hidden_bwd(
    dy_ptr, order_ptr, offsets_ptr, w_ptr, weights_ptr, gate_ptr, pre_ptr, dgate_ptr, dpre_ptr, h_ptr, partial_ptr, S,
    N, K, E, CHOICES, ACT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute one tile of g = dy[token] w[e]; store dgate, dpre, the weighted h unless h_ptr is None, and g . h."""
    columns = tl.cdiv(N, BLOCK_N)
    expert, first, end = _rows_of(offsets_ptr, tl.program_id(0) // columns, E, BLOCK_E, BLOCK_M)
    if expert < E:
        index, column = expert.to(tl.int64), tl.program_id(0) % columns
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        row = first + tl.arange(0, BLOCK_M)
        choice = tl.load(order_ptr + row, mask=row < end, other=0)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(0, K, BLOCK_K):
            k = step + tl.arange(0, BLOCK_K)
            dy = _load_a(dy_ptr, choice // CHOICES, row < end, k, K)
            acc = tl.dot(dy, _load_w(w_ptr + index * N * K, n, k, N, K, False), acc, input_precision="ieee")
        dtype = dpre_ptr.dtype.element_ty
        at = row.to(tl.int64)[:, None] * N + n[None, :]
        live = (row < end)[:, None] & (n < N)[None, :]
        weight = tl.load(weights_ptr + choice, mask=row < end, other=0.0)[:, None]
        pre = tl.load(pre_ptr + at, mask=live, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            act, slope = activate(tl.load(gate_ptr + at, mask=live, other=0.0).to(tl.float32), ACT)
            up = up_factor(pre, ACT)
            h = act * up
            tl.store(dgate_ptr + at, (acc * weight * up * slope).to(dtype), mask=live)
            dpre = up_gradient(acc * weight * act, pre, ACT)
        else:
            h, slope = activate(pre, ACT)
            dpre = acc * weight * slope
        tl.store(dpre_ptr + at, dpre.to(dtype), mask=live)
        if h_ptr is not None:
            tl.store(h_ptr + at, (h * weight).to(dtype), mask=live)
        dots = tl.sum(tl.where(live, acc * h, 0.0), 1)
        tl.store(partial_ptr + column.to(tl.int64) * S + row, dots, mask=row < end)


@triton.jit
def experts_dw(
    a_ptr, b_ptr, order_ptr, offsets_ptr, c_ptr, M, N, CHOICES, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute one tile of c[e] = sum of a[row]^T b[row], (M, N); a gathered operand has one row a token."""
    columns = tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end = tl.load(offsets_ptr + expert).to(tl.int32), tl.load(offsets_ptr + expert + 1).to(tl.int32)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(begin, end, BLOCK_K):
        row = (step + tl.arange(0, BLOCK_K)).to(tl.int64)
        token = tl.load(order_ptr + row, mask=row < end, other=0) // CHOICES
        a_row, b_row = row, row
        if GATHER_A:
            a_row = token
        if GATHER_B:
            b_row = token
        a = tl.load(a_ptr + a_row[:, None] * M + m[None, :], mask=(row < end)[:, None] & (m < M)[None, :], other=0.0)
        b = tl.load(b_ptr + b_row[:, None] * N + n[None, :], mask=(row < end)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
    at = expert * M * N + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(c_ptr + at, acc.to(c_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def experts_column_sums(d_ptr, offsets_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    """Store the column sums of the rows of one expert."""
    expert = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    acc = tl.zeros([BLOCK_N], tl.float32)
    for row in range(begin, end):
        acc += tl.load(d_ptr + row * N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + expert * N + n, acc.to(out_ptr.dtype.element_ty), mask=n < N)


def is_few(rows: int, experts: int) -> bool:
    """Return whether the products of so many rows take tiles of few rows."""
    return rows <= FEW_ROWS * experts


def up_forward(x, order, offsets, w_gate, b_gate, w_up, b_up, gate, pre, h, choices: int, activation: str) -> None:
    """Fill h (S, F), and gate and pre unless they are None; x is (N, C), the weights are (E, F, C)."""
    experts, hidden, width = w_up.shape
    grid, options = _launch("up", h, experts, hidden)
    experts_up_fwd[grid](
        x_ptr=x, order_ptr=order, offsets_ptr=offsets, gate_w_ptr=w_gate, gate_b_ptr=b_gate, w_ptr=w_up, b_ptr=b_up,
        gate_ptr=gate, pre_ptr=pre, h_ptr=h, N=hidden, K=width, E=experts, CHOICES=choices, ACT=activation, **options,
    )  # fmt: skip


def product(a, w, offsets, c, *, bias=None, second=(None, None), by_n: bool) -> None:
    """Fill c (S, N) = a w[e]^T + bias[e] if by_n, with w (E, N, K), else a w[e] + a2 w2[e], with w (E, K, N)."""
    experts, inputs = w.shape[0], w.shape[2 if by_n else 1]
    grid, options = _launch("product", a, experts, c.shape[1])
    experts_product[grid](
        a_ptr=a, w_ptr=w, a2_ptr=second[0], w2_ptr=second[1], bias_ptr=bias, offsets_ptr=offsets, c_ptr=c,
        N=c.shape[1], K=inputs, E=experts, BY_N=by_n, **options,
    )  # fmt: skip


def hidden_backward(
    dy, order, offsets, w_down, weights, gate, pre, dgate, dpre, h, choices: int, activation: str
) -> Tensor:  # fmt: skip
    """Fill dgate (if there is a gate), dpre and h (unless None), (S, F); return g . h of each row, (S,) float32."""
    experts, width, hidden = w_down.shape
    kernel = "clamped hidden" if activation == "clamped_swiglu" else "hidden"
    grid, options = _launch(kernel, pre, experts, hidden)
    columns = triton.cdiv(hidden, options["BLOCK_N"])
    partial = torch.empty(columns, pre.shape[0], dtype=torch.float32, device=pre.device)
    experts_hidden_bwd[grid](
        dy_ptr=dy, order_ptr=order, offsets_ptr=offsets, w_ptr=w_down, weights_ptr=weights, gate_ptr=gate, pre_ptr=pre,
        dgate_ptr=dgate, dpre_ptr=dpre, h_ptr=h, partial_ptr=partial, S=pre.shape[0], N=hidden, K=width, E=experts,
        CHOICES=choices, ACT=activation, **options,
    )  # fmt: skip
    return partial.sum(0)


def weight_gradient(a, b, w, order, offsets, choices: int, *, gather: str) -> Tensor:
    """Return the gradient of w (E, M, N) from a and b, of which the one named by `gather` has one row a token."""
    dw = torch.empty_like(w)
    (experts, m, n), tile = dw.shape, _tile("dw", dw, 1, 0)
    experts_dw[(triton.cdiv(m, tile.BLOCK_M) * triton.cdiv(n, tile.BLOCK_N), experts)](
        a_ptr=a, b_ptr=b, order_ptr=order, offsets_ptr=offsets, c_ptr=dw, M=m, N=n, CHOICES=choices,
        GATHER_A=gather == "a", GATHER_B=gather == "b", **_sizes(tile), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dw


def column_sums(d, offsets, out) -> Tensor:
    """Fill and return out (E, N) with the sums of each expert's rows of d (S, N)."""
    experts, width = out.shape
    experts_column_sums[(triton.cdiv(width, BLOCK_SUM), experts)](
        d_ptr=d, offsets_ptr=offsets, out_ptr=out, N=width, BLOCK_N=BLOCK_SUM, num_warps=SUM.warps,
        num_stages=SUM.stages,
    )  # fmt: skip
    return out


def _tile(kernel: str, x: Tensor, rows: int, experts: int) -> GroupedTile:
    if x.dtype == torch.float32:
        return FLOAT32
    return TILES.get((kernel, is_few(rows, experts)), TILES[kernel, False])


def _launch(kernel: str, rows: Tensor, experts: int, outputs: int):
    """Return the grid and the sizes of a kernel over rows (S, ...): at most one partial tile for each expert."""
    tile, count = _tile(kernel, rows, rows.shape[0], experts), rows.shape[0]
    tiles = min(count, triton.cdiv(count, tile.BLOCK_M) + min(count, experts))
    grid = (tiles * triton.cdiv(outputs, tile.BLOCK_N),)
    stages = min(tile.stages, AMD_STAGES) if launch.arch(rows) == "gfx942" else tile.stages
    return grid, {
        "BLOCK_E": triton.next_power_of_2(experts), **_sizes(tile), "num_warps": tile.warps, "num_stages": stages
    }  # fmt: skip


def _sizes(tile: GroupedTile) -> dict[str, int]:
    return {"BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K}


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Yield the static check's cases: every tile row, with 128 gated experts."""
    integers = dict.fromkeys(("order_ptr", "offsets_ptr"), "*i64")
    floats = {"weights_ptr": "*fp32", "partial_ptr": "*fp32"}
    for (kernel, few), tile in TILES.items():
        if arch == "gfx942":
            tile = GroupedTile(**{**tile.__dict__, "stages": min(tile.stages, AMD_STAGES)})
        sizes, label = {"BLOCK_E": 128, **_sizes(tile)}, f"bf16 {'few' if few else 'many'}"
        for variant, function, given in _variants(kernel):
            given = {**given, **{n: v for n, v in sizes.items() if n in function.arg_names}}
            options = {"matmul": True, "narrow": tile.BLOCK_M < 64, "hot": (few, variant) in HOT, **integers, **floats}
            yield launch.case(function, f"{label} {variant}", tile, "bf16", given, **options)
    yield launch.case(experts_column_sums, "bf16", SUM, "bf16", {"BLOCK_N": BLOCK_SUM}, **integers)


def _variants(kernel: str):
    if kernel == "up":
        absent = dict.fromkeys(("gate_b_ptr", "b_ptr"))
        yield "saved", experts_up_fwd, {"ACT": "silu", **absent}
        yield "inference", experts_up_fwd, {"ACT": "silu", **absent, "gate_ptr": None, "pre_ptr": None}
        yield "clamped, biases", experts_up_fwd, {"ACT": "clamped_swiglu"}
    elif kernel == "product":
        yield "down", experts_product, {"BY_N": True, **dict.fromkeys(("a2_ptr", "w2_ptr", "bias_ptr"))}
        yield "dx", experts_product, {"BY_N": False, "bias_ptr": None}
    elif kernel == "hidden":
        yield "gated", experts_hidden_bwd, {"ACT": "silu"}
    elif kernel == "clamped hidden":
        yield "clamped", experts_hidden_bwd, {"ACT": "clamped_swiglu"}
    else:
        yield "dw_up", experts_dw, {"GATHER_A": False, "GATHER_B": True}
        yield "dw_down", experts_dw, {"GATHER_A": True, "GATHER_B": False}
