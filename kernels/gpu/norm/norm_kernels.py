"""Kernels of LayerNorm and RMSNorm, with and without a residual; the math is in kernels/ops.

Optional pointers and OFFSET, which is added to w, select the variant when a kernel is compiled:

    mu_ptr is None          RMSNorm: no mean is subtracted
    residual_ptr is None    x is normalized; otherwise the sum x + residual is, and the sum is stored too
    dsum_ptr is None        no gradient reaches that sum

`norm_fwd` and `norm_bwd` hold whole rows in registers. `norm_fwd_wide` and `norm_bwd_wide` serve wider rows: each
program reads its row twice, in blocks of columns, the second time from the L2 cache. The mean and the sum of squares
are merged block by block, which loses no digits to a large mean (Chan, Golub, LeVeque 1979, "Updating Formulae and a
Pairwise Algorithm for Computing Sample Variances").

Every backward program sums dy * z (for dw) and dy (for db) over its own rows in float32. reduce.py adds these partial
sums in a fixed order, so dw and db are the same from run to run. `norm_bwd` does both jobs where the sums fit in its
registers; otherwise `norm_bwd_dwdb` computes the sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peakgpt.kernels.gpu import overlap


@triton.jit
def _wide(w, OFFSET: tl.constexpr):
    """Convert a weight to float32 and add OFFSET."""
    w = w.to(tl.float32)
    if OFFSET != 0.0:
        w += OFFSET
    return w


@triton.jit(do_not_specialize=("R",))
def norm_fwd(
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
    OFFSET: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Normalize BLOCK_R rows: store y and the statistics (mu, r), and with a residual the sum."""
    overlap.wait_for_previous(OVERLAP)
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
    centered = x
    if mu_ptr is not None:
        mu = tl.sum(x, 1) / C
        x -= mu[:, None]
        centered = x if C == BLOCK_C else tl.where(live_c[None, :], x, 0.0)
        tl.store(mu_ptr + row, mu, mask=row < R)
    r = tl.rsqrt(tl.sum(centered * centered, 1) / C + eps)
    y = x * r[:, None] * _wide(tl.load(w_ptr + col, mask=live_c, other=0.0), OFFSET)[None, :]
    if b_ptr is not None:
        y += tl.load(b_ptr + col, mask=live_c, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row[:, None] * C + col[None, :], y.to(y_ptr.dtype.element_ty), mask=live)
    tl.store(r_ptr + row, r, mask=row < R)


@triton.jit
def norm_bwd(
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
    OFFSET: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store dx of rows pid, pid + programs, ..., and unless partial_ptr is None the program's sums for dw and db."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    col = tl.arange(0, BLOCK_C)
    live_c = col < C
    w = tl.load(w_ptr + col, mask=live_c, other=0.0)
    if partial_ptr is not None:
        dw = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        db = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    # w converted to float32 before the loop spills registers for rows of 16384 columns (sm_120). disable_licm keeps the
    # conversion inside the loop for rows that wide.
    for block in tl.range(pid, tl.cdiv(R, BLOCK_R), programs, disable_licm=partial_ptr is None):
        row = tl.cast(block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        live = (row < R)[:, None] & live_c[None, :]
        r = tl.load(r_ptr + row, mask=row < R, other=0.0)
        x = tl.load(x_ptr + row[:, None] * stride_x_r + col[None, :], mask=live, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row[:, None] * stride_dy_r + col[None, :], mask=live, other=0.0).to(tl.float32)
        if mu_ptr is not None:
            x -= tl.load(mu_ptr + row, mask=row < R, other=0.0)[:, None]
        z = x * r[:, None]
        g = dy * _wide(w, OFFSET)[None, :]  # zero past the end of the row, so z there adds nothing to the sums
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
def norm_fwd_wide(
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
    OFFSET: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Normalize one row in two passes over blocks of columns."""
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
            block_mu = tl.sum(x, 0) / count
            delta = block_mu - mu
            fraction = count / (first + count)
            x = tl.where(col < C, x - block_mu, 0.0)
            squares += delta * delta * first * fraction
            mu += delta * fraction
        squares += tl.sum(x * x, 0)
    r = tl.rsqrt(squares / C + eps)
    if mu_ptr is not None:
        tl.store(mu_ptr + row, mu)
    tl.store(r_ptr + row, r)
    if residual_ptr is not None:
        tl.debug_barrier()  # the next loop reads sums that other threads stored
        x_ptr = sum_ptr + row * C
    for first in range(0, C, BLOCK_C):
        col = first + tl.arange(0, BLOCK_C)
        z = (tl.load(x_ptr + col, mask=col < C, other=0.0).to(tl.float32) - mu) * r
        y = z * _wide(tl.load(w_ptr + col, mask=col < C, other=0.0), OFFSET)
        if b_ptr is not None:
            y += tl.load(b_ptr + col, mask=col < C, other=0.0).to(tl.float32)
        tl.store(y_ptr + col, y.to(y_ptr.dtype.element_ty), mask=col < C)


@triton.jit
def norm_bwd_wide(
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
    OFFSET: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store dx of one row in two passes over blocks of columns."""
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
        g *= _wide(tl.load(w_ptr + col, mask=col < C, other=0.0), OFFSET)
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
        g *= _wide(tl.load(w_ptr + col, mask=col < C, other=0.0), OFFSET)
        dx = r * (g - mean_g - z * mean_gz)
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + row * stride_dsum_r + col, mask=col < C, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * C + col, dx.to(dx_ptr.dtype.element_ty), mask=col < C)


@triton.jit
def norm_bwd_dwdb(
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
    """Store the program's sums for dw and db over rows pid, pid + programs, ... of one block of columns."""
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
