"""LayerNorm and RMSNorm in Triton: a row stays in registers between its statistics and its output.

A row too wide for that (MAX_BLOCK_C) is read twice by blocks, the second time from L2 cache; its mean and squares are
merged block by block (Chan, Golub, LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample
Variances"), which loses no digits to a large mean. RMSNorm is the same kernels without mu, and without b.

Backward: each program walks rows pid, pid + P, ... , writes dx, and keeps its own sums of dy * z and dy in float32;
a second kernel adds the P partial sums in a fixed order, so dw and db are the same from run to run. Rows too wide to
hold both sums in registers take them in a kernel of their own. add_layernorm and add_rmsnorm pass a residual.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.gpu import launch, overlap
from peakgpt.kernels.gpu.launch import AotCase, Tile
from peakgpt.kernels.gpu.reduce import partials, sum_partials


@dataclass(frozen=True, kw_only=True)
class NormTile(Tile):
    BLOCK_R: int  # rows a program holds at once


# By the widest row served (the next power of two of C), for every class: memory-bound kernels follow the width.
# Unmeasured on hardware: 8 to 32 elements a thread forward, compiled without spills.
FORWARD = {
    512: NormTile(BLOCK_R=8, warps=4),
    2048: NormTile(BLOCK_R=2, warps=4),
    8192: NormTile(BLOCK_R=1, warps=8),
    16384: NormTile(BLOCK_R=1, warps=16),
}
BACKWARD = {
    512: NormTile(BLOCK_R=4, warps=4),
    1024: NormTile(BLOCK_R=1, warps=4),
    4096: NormTile(BLOCK_R=1, warps=8),
    16384: NormTile(BLOCK_R=1, warps=16),
}
MAX_BLOCK_C = 16384
BLOCKS = NormTile(BLOCK_R=1, warps=16)  # of wider rows
BLOCKS_C = 8192
FUSED_WIDTH = 4096  # wider: five float32 rows (x, dy, w, both sums) outgrow the registers
PROGRAMS_PER_PROCESSOR = 4  # of the persistent kernels

# Sums of a wide row's dw and db: 64 columns of 2 bytes are one 128-byte line.
WIDE = NormTile(BLOCK_R=32, warps=4)
WIDE_BLOCK_C = 64


@triton.jit(do_not_specialize=("R",))
def layernorm_fwd(
    x_ptr,
    residual_ptr,
    w_ptr,
    b_ptr,
    sum_ptr,
    y_ptr,
    mu_ptr,
    r_ptr,
    stride_x_r,
    stride_residual_r,
    R,
    eps,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    overlap.follow(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_C)
    live_c = col < C
    live = (row < R)[:, None] & live_c[None, :]
    x = tl.load(x_ptr + row[:, None] * stride_x_r + col[None, :], mask=live, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row[:, None] * stride_residual_r + col[None, :], mask=live, other=0.0)
        x += residual.to(tl.float32)
        total = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row[:, None] * C + col[None, :], total, mask=live)
        x = total.to(tl.float32)
    centred = x
    if mu_ptr is not None:
        mu = tl.sum(x, 1) / C
        x -= mu[:, None]
        centred = x if C == BLOCK_C else tl.where(live_c[None, :], x, 0.0)
        tl.store(mu_ptr + row, mu, mask=row < R)
    r = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    y = x * r[:, None] * tl.load(w_ptr + col, mask=live_c, other=0.0).to(tl.float32)[None, :]
    if b_ptr is not None:
        y += tl.load(b_ptr + col, mask=live_c, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row[:, None] * C + col[None, :], y.to(y_ptr.dtype.element_ty), mask=live)
    tl.store(r_ptr + row, r, mask=row < R)


@triton.jit
def layernorm_bwd(
    dy_ptr,
    dsum_ptr,
    x_ptr,
    w_ptr,
    mu_ptr,
    r_ptr,
    dx_ptr,
    partial_ptr,
    stride_dy_r,
    stride_dsum_r,
    stride_x_r,
    R,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid, programs = tl.program_id(0), tl.num_programs(0)
    col = tl.arange(0, BLOCK_C)
    live_c = col < C
    w = tl.load(w_ptr + col, mask=live_c, other=0.0)
    if partial_ptr is not None:
        dw = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        db = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    # Beside a row of 16384 columns w in float32 spills (sm_120), so there it is widened row by row, not hoisted.
    for block in tl.range(pid, tl.cdiv(R, BLOCK_R), programs, disable_licm=partial_ptr is None):
        row = tl.cast(block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        live = (row < R)[:, None] & live_c[None, :]
        r = tl.load(r_ptr + row, mask=row < R, other=0.0)
        x = tl.load(x_ptr + row[:, None] * stride_x_r + col[None, :], mask=live, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row[:, None] * stride_dy_r + col[None, :], mask=live, other=0.0).to(tl.float32)
        if mu_ptr is not None:
            x -= tl.load(mu_ptr + row, mask=row < R, other=0.0)[:, None]
        z = x * r[:, None]
        g = dy * w.to(tl.float32)[None, :]  # zero past the row, which keeps z there out of every sum
        if mu_ptr is not None:
            dx = r[:, None] * (g - (tl.sum(g, 1) / C)[:, None] - z * (tl.sum(g * z, 1) / C)[:, None])
        else:
            dx = r[:, None] * (g - z * (tl.sum(g * z, 1) / C)[:, None])
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + row[:, None] * stride_dsum_r + col[None, :], mask=live, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row[:, None] * C + col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=live)
        if partial_ptr is not None:
            dw += dy * z
            if mu_ptr is not None:
                db += dy
    if partial_ptr is not None:
        at = partial_ptr + pid.to(tl.int64) * C + col
        tl.store(at, tl.sum(dw, 0), mask=live_c)
        if mu_ptr is not None:
            tl.store(at + programs.to(tl.int64) * C, tl.sum(db, 0), mask=live_c)


@triton.jit
def layernorm_fwd_blocks(
    x_ptr,
    residual_ptr,
    w_ptr,
    b_ptr,
    sum_ptr,
    y_ptr,
    mu_ptr,
    r_ptr,
    stride_x_r,
    stride_residual_r,
    eps,
    C,
    BLOCK_C: tl.constexpr,
):
    """One row, by blocks of columns, twice."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x_r
    y_ptr += row * C
    mu = 0.0
    squares = 0.0
    for first in range(0, C, BLOCK_C):
        col = first + tl.arange(0, BLOCK_C)
        x = tl.load(x_ptr + col, mask=col < C, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            x += tl.load(residual_ptr + row * stride_residual_r + col, mask=col < C, other=0.0).to(tl.float32)
            total = x.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + row * C + col, total, mask=col < C)
            x = total.to(tl.float32)
        if mu_ptr is not None:
            count = tl.minimum(C - first, BLOCK_C).to(tl.float32)
            here = tl.sum(x, 0) / count
            apart = here - mu
            share = count / (first + count)
            x = tl.where(col < C, x - here, 0.0)
            squares += apart * apart * first * share
            mu += apart * share
        squares += tl.sum(x * x, 0)
    r = tl.rsqrt(squares / C + eps)
    if mu_ptr is not None:
        tl.store(mu_ptr + row, mu)
    tl.store(r_ptr + row, r)
    if residual_ptr is not None:
        tl.debug_barrier()  # what other threads stored is read below
        x_ptr = sum_ptr + row * C
    for first in range(0, C, BLOCK_C):
        col = first + tl.arange(0, BLOCK_C)
        z = (tl.load(x_ptr + col, mask=col < C, other=0.0).to(tl.float32) - mu) * r
        y = z * tl.load(w_ptr + col, mask=col < C, other=0.0).to(tl.float32)
        if b_ptr is not None:
            y += tl.load(b_ptr + col, mask=col < C, other=0.0).to(tl.float32)
        tl.store(y_ptr + col, y.to(y_ptr.dtype.element_ty), mask=col < C)


@triton.jit
def layernorm_bwd_blocks(
    dy_ptr,
    dsum_ptr,
    x_ptr,
    w_ptr,
    mu_ptr,
    r_ptr,
    dx_ptr,
    stride_dy_r,
    stride_dsum_r,
    stride_x_r,
    C,
    BLOCK_C: tl.constexpr,
):
    """dx of one row, by blocks of columns, twice."""
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * stride_dy_r
    x_ptr += row * stride_x_r
    mu = 0.0
    if mu_ptr is not None:
        mu = tl.load(mu_ptr + row)
    r = tl.load(r_ptr + row)
    sum_g = tl.zeros([BLOCK_C], tl.float32)
    sum_gz = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, C, BLOCK_C):
        col = first + tl.arange(0, BLOCK_C)
        z = (tl.load(x_ptr + col, mask=col < C, other=0.0).to(tl.float32) - mu) * r
        g = tl.load(dy_ptr + col, mask=col < C, other=0.0).to(tl.float32)
        g *= tl.load(w_ptr + col, mask=col < C, other=0.0).to(tl.float32)
        sum_g += g
        sum_gz += g * z
    mean_gz = tl.sum(sum_gz, 0) / C
    mean_g = 0.0
    if mu_ptr is not None:
        mean_g = tl.sum(sum_g, 0) / C
    for first in range(0, C, BLOCK_C):
        col = first + tl.arange(0, BLOCK_C)
        z = (tl.load(x_ptr + col, mask=col < C, other=0.0).to(tl.float32) - mu) * r
        g = tl.load(dy_ptr + col, mask=col < C, other=0.0).to(tl.float32)
        g *= tl.load(w_ptr + col, mask=col < C, other=0.0).to(tl.float32)
        dx = r * (g - mean_g - z * mean_gz)
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + row * stride_dsum_r + col, mask=col < C, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * C + col, dx.to(dx_ptr.dtype.element_ty), mask=col < C)


@triton.jit
def layernorm_bwd_dwdb(
    dy_ptr,
    x_ptr,
    mu_ptr,
    r_ptr,
    partial_ptr,
    stride_dy_r,
    stride_x_r,
    R,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    pid, programs = tl.program_id(1), tl.num_programs(1)
    live_c = col < C
    dw = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    db = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for block in range(pid, tl.cdiv(R, BLOCK_R), programs):
        row = tl.cast(block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        live = (row < R)[:, None] & live_c[None, :]
        r = tl.load(r_ptr + row, mask=row < R, other=0.0)
        x = tl.load(x_ptr + row[:, None] * stride_x_r + col[None, :], mask=live, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row[:, None] * stride_dy_r + col[None, :], mask=live, other=0.0).to(tl.float32)
        if mu_ptr is not None:
            x -= tl.load(mu_ptr + row, mask=row < R, other=0.0)[:, None]
            db += dy
        dw += dy * x * r[:, None]
    at = partial_ptr + pid.to(tl.int64) * C + col
    tl.store(at, tl.sum(dw, 0), mask=live_c)
    if mu_ptr is not None:
        tl.store(at + programs.to(tl.int64) * C, tl.sum(db, 0), mask=live_c)


def objection(x: Tensor, w: Tensor, b: Tensor | None, **_) -> str | None:
    if not x.shape[-1]:
        return "takes rows of at least 1, got 0"
    if b is not None and b.dtype != w.dtype:
        return f"takes w and b of one dtype, got {w.dtype} and {b.dtype}"
    return launch.objection(x)


def forward(outputs, saved, x, w, b, *, eps):
    normalise(x, None, w, b, None, outputs[0], saved, eps)


def backward(grads, inputs, outputs, saved, needs, *, eps):
    x, w, _ = inputs
    return gradients(grads[0], None, x, w, saved, needs)


def normalise(x, residual, w, b, total, normed, saved, eps) -> None:
    """Fill normed and saved = (mu, r), mu None for RMSNorm, and total = x + residual where there is a residual."""
    x, residual = launch.rows(x), residual if residual is None else launch.rows(residual)
    (count, width), block = x.shape, triton.next_power_of_2(x.shape[1])
    arguments = {
        "x_ptr": x, "residual_ptr": residual, "w_ptr": w.contiguous(), "b_ptr": b if b is None else b.contiguous(),
        "sum_ptr": total, "y_ptr": normed, "mu_ptr": saved[0], "r_ptr": saved[1], "stride_x_r": x.stride(0),
        "stride_residual_r": 0 if residual is None else residual.stride(0), "eps": eps, "C": width,
    }  # fmt: skip
    with launch.on(x):
        if block > MAX_BLOCK_C:
            layernorm_fwd_blocks[(count,)](BLOCK_C=BLOCKS_C, num_warps=BLOCKS.warps, **arguments)
            return
        tile = _row(FORWARD, x)
        layernorm_fwd[(triton.cdiv(count, tile.BLOCK_R),)](
            R=count, BLOCK_R=tile.BLOCK_R, BLOCK_C=block, num_warps=tile.warps, num_stages=tile.stages, **arguments,
            **overlap.options(x, count),
        )  # fmt: skip


def gradients(dy, dsum, x, w, saved, needs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dw, db), None where not needed; dy and dsum are the gradients that reached normed and sum."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, dy, dsum = launch.rows(x), launch.rows(dy), dsum if dsum is None else launch.rows(dsum)
    (count, width), block = x.shape, triton.next_power_of_2(x.shape[1])
    sums = [torch.empty_like(w) for _ in range(1 if saved[0] is None else 2)]
    summed, fused, partial = any(needs[1:]), width <= FUSED_WIDTH, None
    arguments = {
        "dy_ptr": dy, "dsum_ptr": dsum, "x_ptr": x, "w_ptr": w.contiguous(), "mu_ptr": saved[0], "r_ptr": saved[1],
        "dx_ptr": dx, "stride_dy_r": dy.stride(0), "stride_dsum_r": 0 if dsum is None else dsum.stride(0),
        "stride_x_r": x.stride(0), "C": width,
    }  # fmt: skip
    with launch.on(x):
        if block > MAX_BLOCK_C:
            layernorm_bwd_blocks[(count,)](BLOCK_C=BLOCKS_C, num_warps=BLOCKS.warps, **arguments)
        else:
            tile = _row(BACKWARD, x)
            programs = min(triton.cdiv(count, tile.BLOCK_R), PROGRAMS_PER_PROCESSOR * launch.processors(x))
            partial = partials(x, len(sums), programs, width) if summed and fused else None
            layernorm_bwd[(programs,)](
                partial_ptr=partial, R=count, BLOCK_R=tile.BLOCK_R, BLOCK_C=block,
                num_warps=tile.warps, num_stages=tile.stages, **arguments,
            )  # fmt: skip
        if summed:
            sum_partials(_wide_partials(dy, x, saved, len(sums)) if partial is None else partial, *sums)
    return dx, sums[0] if needs[1] else None, sums[1] if needs[2] else None


def _wide_partials(dy, x, saved, groups: int) -> Tensor:
    (count, width), columns = x.shape, triton.cdiv(x.shape[1], WIDE_BLOCK_C)
    most = triton.cdiv(PROGRAMS_PER_PROCESSOR * launch.processors(x), columns)
    programs = min(triton.cdiv(count, WIDE.BLOCK_R), most)
    partial = partials(x, groups, programs, width)
    layernorm_bwd_dwdb[(columns, programs)](
        dy_ptr=dy, x_ptr=x, mu_ptr=saved[0], r_ptr=saved[1], partial_ptr=partial,
        stride_dy_r=dy.stride(0), stride_x_r=x.stride(0), R=count, C=width,
        BLOCK_R=WIDE.BLOCK_R, BLOCK_C=WIDE_BLOCK_C, num_warps=WIDE.warps, num_stages=WIDE.stages,
    )  # fmt: skip
    return partial


def _row(table: dict[int, NormTile], x: Tensor) -> NormTile:
    return next(tile for width, tile in table.items() if x.shape[1] <= width)


def cases(arch: str, added: bool, centred: bool = True) -> Iterator[AotCase]:
    """Both kernels at every row's widest C, with or without residual and mean; the last one with a masked tail."""
    types = {"mu_ptr": "*fp32", "r_ptr": "*fp32", "partial_ptr": "*fp32", "eps": "fp32"}
    uncentred = {} if centred else {"mu_ptr": None}
    hot = centred and not added  # the same kernels
    for kernel, blocks, table, extra in (
        (layernorm_fwd, layernorm_fwd_blocks, FORWARD, ("residual_ptr", "sum_ptr", "stride_residual_r")),
        (layernorm_bwd, layernorm_bwd_blocks, BACKWARD, ("dsum_ptr", "stride_dsum_r")),
    ):
        absent = {**({} if added else dict.fromkeys(extra)), **uncentred}
        if not centred and kernel is layernorm_fwd:
            absent["b_ptr"] = None
        for block, tile in table.items():
            width = block if block < max(table) else block - 128
            sizes = {"C": width, "BLOCK_R": tile.BLOCK_R, "BLOCK_C": block}
            if kernel is layernorm_fwd:
                sizes["OVERLAP"] = arch in overlap.CLASSES
            if kernel is layernorm_bwd and width > FUSED_WIDTH:
                sizes["partial_ptr"] = None
            yield launch.case(kernel, f"bf16 C={width}", tile, "bf16", {**absent, **sizes}, hot=hot, **types)
        yield launch.case(blocks, "bf16 blocks", BLOCKS, "bf16", {**absent, "BLOCK_C": BLOCKS_C}, hot=hot, **types)


def aot_cases(arch: str) -> Iterator[AotCase]:
    """The static check's cases."""
    yield from cases(arch, added=False)
    wide = {"C": 8192, "BLOCK_R": WIDE.BLOCK_R, "BLOCK_C": WIDE_BLOCK_C}
    w32 = {"mu_ptr": "*fp32", "r_ptr": "*fp32", "partial_ptr": "*fp32"}
    yield launch.case(layernorm_bwd_dwdb, "bf16 C=8192", WIDE, "bf16", wide, **w32)
