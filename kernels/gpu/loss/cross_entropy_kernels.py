"""Kernels of linear cross-entropy: one program a row of logits. Math: kernels/ops/linear_cross_entropy.py.

    m = max_v z_v      l = sum_v exp(z_v - m)      both by an online softmax over blocks of BLOCK_V logits

A row is read twice and written once. With a softcap z are the capped logits, computed at each reading.
"""
# ruff: noqa: E741  l is the usual name in the online softmax

import triton
import triton.language as tl


@triton.jit
def _capped(z, softcap):
    """Return softcap tanh(z / softcap); z if softcap is None."""
    if softcap is not None:
        x = tl.abs(z) / softcap
        # Near 0 the polynomial of S. Moshier's Cephes, tanhf: 1 - 2 / (1 + e^2x) would lose digits.
        small = tl.minimum(x, 1.0)
        square = small * small
        p = 1.33314422036e-1 + square * (-5.37397155531e-2 + square * (2.06390887954e-2 - square * 5.70498872745e-3))
        near = small + small * square * (-3.33332819422e-1 + square * p)
        t = tl.where(x < 0.625, near, 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x)))
        z = tl.where(z < 0.0, -t, t) * softcap
    return z


@triton.jit
def _times_slope(dz, z, softcap):
    """Multiply the gradient of capped logits by the slope of the cap at the logits z: 1 - tanh^2."""
    if softcap is not None:
        g = 1.0 / (1.0 + tl.exp(2.0 * tl.abs(z) / softcap))
        dz *= 4.0 * g * (1.0 - g)
    return dz


@triton.jit
def _row_sums(z_ptr, V, softcap, SMOOTH: tl.constexpr, BLOCK_V: tl.constexpr):
    """Return m and l of the online softmax over a row of logits and, with SMOOTH, the sum of the logits."""
    m = float("-inf")
    l = 0.0
    logit_sum = 0.0
    for first in range(0, V, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        z = tl.load(z_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
        if softcap is not None:
            z = tl.where(v < V, _capped(z, softcap), float("-inf"))
        m_new = tl.maximum(m, tl.max(z, 0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # 0 until a logit is finite
        l = l * tl.exp(m - base) + tl.sum(tl.exp(z - base), 0)
        m = m_new
        if SMOOTH:
            logit_sum += tl.sum(tl.where(v < V, z, 0.0), 0)
    return m, l, logit_sum


@triton.jit
def _row_gradient(z_ptr, target, m, l, g, smoothing, z_loss, softcap, V, TOTAL_V, BLOCK_V: tl.constexpr):
    """Overwrite a row of logits with (softmax (1 + 2 z_loss lse) - (1 - smoothing) onehot - smoothing / TOTAL_V) g."""
    softmax_scale = (1.0 + 2.0 * z_loss * (m + tl.log(l))) * g / l
    uniform = smoothing / TOTAL_V * g
    onehot = (1.0 - smoothing) * g
    for first in range(0, V, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        z = tl.load(z_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
        dz = tl.exp(_capped(z, softcap) - m) * softmax_scale - tl.where(v == target, onehot + uniform, uniform)
        tl.store(z_ptr + v, _times_slope(dz, z, softcap).to(z_ptr.dtype.element_ty), mask=v < V)


@triton.jit
def _row_zero(z_ptr, V, BLOCK_V: tl.constexpr):
    """Overwrite a row of logits with zeros."""
    for first in range(0, V, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        tl.store(z_ptr + v, tl.zeros([BLOCK_V], z_ptr.dtype.element_ty), mask=v < V)


@triton.jit
def _store_stats(stats_ptr, row, m, l):
    tl.store(stats_ptr + 2 * row, m)
    tl.store(stats_ptr + 2 * row + 1, l)


@triton.jit
def linear_cross_entropy_fwd(
    z_ptr, target_ptr, weight_ptr, loss_ptr, stats_ptr, scale_ptr, stride_z_r, V, ignore_index, smoothing, z_loss,
    softcap, GRAD: tl.constexpr, SMOOTH: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Store the weighted loss of one row. With GRAD, overwrite its logits with their gradient.

    The gradient is multiplied by the scale, unless scale_ptr is None.
    """
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_z_r
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if stats_ptr is not None:
            _store_stats(stats_ptr, row, 0.0, 0.0)
        if GRAD:
            _row_zero(z_ptr, V, BLOCK_V)
    else:
        in_range = (target >= 0) & (target < V)  # a target out of range gives a loss of NaN
        # Loaded before the reductions of _row_sums, which synchronize the warps: a later load could read a logit that
        # another warp has already overwritten with its gradient.
        z_target = _capped(tl.load(z_ptr + target, mask=in_range, other=float("nan")).to(tl.float32), softcap)
        m, l, logit_sum = _row_sums(z_ptr, V, softcap, SMOOTH, BLOCK_V)
        lse = m + tl.log(l)
        loss = tl.log(l) - (z_target - m) + z_loss * lse * lse
        if SMOOTH:
            loss += smoothing * (z_target - logit_sum / V)
        g = 1.0
        if weight_ptr is not None:
            g = tl.load(weight_ptr + row)
        tl.store(loss_ptr + row, loss * g)
        if stats_ptr is not None:
            _store_stats(stats_ptr, row, m, l)
        if GRAD:
            if scale_ptr is not None:
                g *= tl.load(scale_ptr)
            _row_gradient(z_ptr, target, m, l, g, smoothing, z_loss, softcap, V, V, BLOCK_V)


@triton.jit
def linear_cross_entropy_shard(
    z_ptr, target_ptr, parts_ptr, stride_z_r, V, ignore_index, FIRST, softcap,
    SMOOTH: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Store a shard's part of one row: m, l, the target's logit or 0, and with SMOOTH the sum of the logits.

    The shard holds the V logits from token id FIRST on.
    """
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_z_r
    target = tl.load(target_ptr + row)
    m = 0.0
    l = 0.0
    z_target = 0.0
    logit_sum = 0.0
    if target != ignore_index:
        at = target - FIRST
        in_shard = (at >= 0) & (at < V)
        # tl.where instead of other=0: Triton's interpreter ignores a scalar `other` of 0.
        z_target = _capped(tl.where(in_shard, tl.load(z_ptr + at, mask=in_shard), 0.0).to(tl.float32), softcap)
        m, l, logit_sum = _row_sums(z_ptr, V, softcap, SMOOTH, BLOCK_V)
    parts_ptr += row * (4 if SMOOTH else 3)
    tl.store(parts_ptr, m)
    tl.store(parts_ptr + 1, l)
    tl.store(parts_ptr + 2, z_target)
    if SMOOTH:
        tl.store(parts_ptr + 3, logit_sum)


@triton.jit
def linear_cross_entropy_bwd(
    z_ptr, target_ptr, weight_ptr, stats_ptr, dloss_ptr, stride_z_r, stride_dloss, V, ignore_index, FIRST, TOTAL_V,
    smoothing, z_loss, softcap, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Overwrite a row of logits with their gradient, from the saved m and l and the row's upstream gradient.

    The row holds the V logits from token id FIRST on, out of TOTAL_V.
    """
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_z_r
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        _row_zero(z_ptr, V, BLOCK_V)
    else:
        g = tl.load(dloss_ptr + row * stride_dloss)
        if weight_ptr is not None:
            g *= tl.load(weight_ptr + row)
        m, l = tl.load(stats_ptr + 2 * row), tl.load(stats_ptr + 2 * row + 1)
        _row_gradient(z_ptr, target - FIRST, m, l, g, smoothing, z_loss, softcap, V, TOTAL_V, BLOCK_V)


@triton.jit
def linear_cross_entropy_scale(x_ptr, scale_ptr, y_ptr, N, BLOCK_N: tl.constexpr):
    """Store y = x * scale, multiplied in float32; torch would first round a scale in device memory to x's dtype."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.load(x_ptr + at, mask=at < N, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < N)
