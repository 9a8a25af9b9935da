"""Linear cross-entropy on the GPU: logits by blocks of rows from cuBLAS, loss and gradient in place, a program a row.

    z = x w^T     fwd: loss = log t - (z_target - m), online; z becomes dz     dx = dz w     dw (float32) += dz^T x

A row is read twice, the second time largely from L2 cache, and written once. Two rows of BLOCK_BYTES: blocks of the
logits, with dw summed in float32, or all of them at once, whose products are as large as they can be. The count of
the mean stays on the device. Halves round dz at the loss's own scale; float16 would lose small probabilities times
1 / count, so there the count divides the finished dx and dw.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.gpu import launch
from peakgpt.kernels.gpu.launch import AotCase, Tile
from peakgpt.kernels.ops.vocab_parallel import Shard, shard_of

# Unmeasured on hardware: 16 elements a thread at a time.
BLOCK_V, ROW = 4096, Tile(warps=8)
BLOCK_N, SCALE = 1024, Tile(warps=4)
# Logits at a time. Blocks: large enough that the products and dw's float32 sum run at their full rate, under a tenth of
# what eager holds at 32k tokens. At once: where "auto" may, up to GPT-2's vocabulary at 32k tokens. Both unmeasured.
BLOCK_BYTES = {"memory": 512 << 20, "time": 1 << 62}
AT_ONCE_BYTES = 4 << 30
# Rows of the logits start on 128 bytes, whatever V is: cuBLAS is slow on unaligned rows.
ALIGN_BYTES = 128


@triton.jit
def _row_sums(z_ptr, V, SMOOTH: tl.constexpr, BLOCK_V: tl.constexpr):
    """m and t of a row of logits, and with SMOOTH the sum of the logits."""
    m = float("-inf")
    total = 0.0
    summed = 0.0
    for first in range(0, V, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        z = tl.load(z_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(z, 0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # no finite logit so far
        total = total * tl.exp(m - base) + tl.sum(tl.exp(z - base), 0)
        m = m_new
        if SMOOTH:
            summed += tl.sum(tl.where(v < V, z, 0.0), 0)
    return m, total, summed


@triton.jit
def _row_gradient(z_ptr, target, m, total, g, smoothing, z_loss, V, TOTAL, BLOCK_V: tl.constexpr):
    """Overwrite a row of logits with (softmax (1 + 2 z_loss lse) - (1 - smoothing) onehot - smoothing / TOTAL) g."""
    share = (1.0 + 2.0 * z_loss * (m + tl.log(total))) * g / total
    even = smoothing / TOTAL * g
    hit = (1.0 - smoothing) * g
    for first in range(0, V, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        z = tl.load(z_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
        dz = tl.exp(z - m) * share - tl.where(v == target, hit + even, even)
        tl.store(z_ptr + v, dz.to(z_ptr.dtype.element_ty), mask=v < V)


@triton.jit
def _row_zero(z_ptr, V, BLOCK_V: tl.constexpr):
    for first in range(0, V, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        tl.store(z_ptr + v, tl.zeros([BLOCK_V], z_ptr.dtype.element_ty), mask=v < V)


@triton.jit
def _store_stats(stats_ptr, row, m, total):
    tl.store(stats_ptr + 2 * row, m)
    tl.store(stats_ptr + 2 * row + 1, total)


@triton.jit
def linear_cross_entropy_fwd(
    z_ptr, target_ptr, weight_ptr, loss_ptr, stats_ptr, scale_ptr, stride_z_r, V, ignore_index, smoothing, z_loss,
    GRAD: tl.constexpr, SMOOTH: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Loss of one row, times its weight; with GRAD the row becomes its gradient at dloss = scale (None: 1)."""
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
        known = (target >= 0) & (target < V)  # a target out of range gives NaN, not foreign memory
        # Before the loop, whose reductions are barriers: no warp overwrites the row while another still reads this.
        z_target = tl.load(z_ptr + target, mask=known, other=float("nan")).to(tl.float32)
        m, total, summed = _row_sums(z_ptr, V, SMOOTH, BLOCK_V)
        lse = m + tl.log(total)
        loss = tl.log(total) - (z_target - m) + z_loss * lse * lse
        if SMOOTH:
            loss += smoothing * (z_target - summed / V)
        g = 1.0
        if weight_ptr is not None:
            g = tl.load(weight_ptr + row)
        tl.store(loss_ptr + row, loss * g)
        if stats_ptr is not None:
            _store_stats(stats_ptr, row, m, total)
        if GRAD:
            if scale_ptr is not None:
                g *= tl.load(scale_ptr)
            _row_gradient(z_ptr, target, m, total, g, smoothing, z_loss, V, V, BLOCK_V)


@triton.jit
def linear_cross_entropy_parts(
    z_ptr, target_ptr, parts_ptr, stride_z_r, V, ignore_index, FIRST, SMOOTH: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Of one row of a shard whose first logit is FIRST: m, t, the target's logit if it is here, with SMOOTH the sum."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_z_r
    target = tl.load(target_ptr + row)
    m = 0.0
    total = 0.0
    hit = 0.0
    summed = 0.0
    if target != ignore_index:
        at = target - FIRST
        here = (at >= 0) & (at < V)
        # Triton's interpreter takes a scalar `other` of 0 for none.
        hit = tl.where(here, tl.load(z_ptr + at, mask=here), 0.0).to(tl.float32)
        m, total, summed = _row_sums(z_ptr, V, SMOOTH, BLOCK_V)
    parts_ptr += row * (4 if SMOOTH else 3)
    tl.store(parts_ptr, m)
    tl.store(parts_ptr + 1, total)
    tl.store(parts_ptr + 2, hit)
    if SMOOTH:
        tl.store(parts_ptr + 3, summed)


@triton.jit
def linear_cross_entropy_bwd(
    z_ptr, target_ptr, weight_ptr, stats_ptr, dloss_ptr, stride_z_r, stride_dloss, V, ignore_index, FIRST, TOTAL,
    smoothing, z_loss, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A row of logits becomes its gradient, from the kept m and t and the row's own upstream gradient.

    The logits are those from FIRST of TOTAL ones, where w is a shard.
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
        m, total = tl.load(stats_ptr + 2 * row), tl.load(stats_ptr + 2 * row + 1)
        _row_gradient(z_ptr, target - FIRST, m, total, g, smoothing, z_loss, V, TOTAL, BLOCK_V)


@triton.jit
def linear_cross_entropy_scale(x_ptr, scale_ptr, y_ptr, N, BLOCK_N: tl.constexpr):
    """y = x scale in float32; torch would round a scalar on the device to x's dtype first."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.load(x_ptr + at, mask=at < N, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < N)


NO_GRADIENT = ("weight",)


def objection(x: Tensor, *_, **__) -> str | None:
    return launch.objection(x)


class Rows:
    """The targets, weights and terms of a call, handed to the kernels a block of rows at a time."""

    def __init__(self, target, weight, shard: Shard | None, **terms):
        self.target, self.shard, self.terms = target.flatten(), shard, terms
        self.weight = None if weight is None else weight.flatten().float().contiguous()

    def total(self) -> Tensor:
        """What a mean divides by: the count or the weights of the targets that are not ignored."""
        live = self.target != self.terms["ignore_index"]
        return live.sum() if self.weight is None else torch.where(live, self.weight, 0.0).sum()

    def losses(self, z: Tensor, block: slice, loss, stats, scale, grad: bool) -> None:
        """Fill a block of loss, and of m and t where wanted; with grad z becomes its gradient at dloss = scale."""
        if self.shard is not None:
            self._losses_of_all(z, block, loss, stats, scale, grad)
            return
        linear_cross_entropy_fwd[(z.shape[0],)](
            loss_ptr=loss[block], stats_ptr=None if stats is None else stats[block], scale_ptr=scale, GRAD=grad,
            SMOOTH=self._smoothing() != 0.0, **self._row(z, block), **self._gradient_terms(block),
        )  # fmt: skip

    def gradients(self, z: Tensor, block: slice, stats, dloss) -> None:
        """z becomes its gradient at each row's dloss; stats (m and t) and dloss are the block's."""
        first, total = (0, z.shape[1]) if self.shard is None else (self.shard.first, self.shard.vocab)
        linear_cross_entropy_bwd[(z.shape[0],)](
            stats_ptr=stats, dloss_ptr=dloss, stride_dloss=dloss.stride(0), FIRST=first, TOTAL=total,
            **self._row(z, block), **self._gradient_terms(block),
        )  # fmt: skip

    def _losses_of_all(self, z: Tensor, block: slice, loss, stats, scale, grad: bool) -> None:
        """`losses` where z are a shard's logits: two passes, the ranks' message between them."""
        smooth = self._smoothing() != 0.0
        parts = torch.empty((z.shape[0], 4 if smooth else 3), dtype=torch.float32, device=z.device)
        linear_cross_entropy_parts[(z.shape[0],)](
            parts_ptr=parts, FIRST=self.shard.first, SMOOTH=smooth, **self._row(z, block)
        )
        found, stats_of_all = self.shard.losses(parts, self.target[block], **self.terms)
        loss[block] = found if self.weight is None else found * self.weight[block]
        if stats is not None:
            stats[block] = stats_of_all
        if grad:
            dloss = torch.ones((), dtype=torch.float32, device=z.device) if scale is None else scale
            self.gradients(z, block, stats_of_all, dloss.expand(z.shape[0]))

    def _smoothing(self) -> float:
        return float(self.terms["label_smoothing"])

    def _row(self, z: Tensor, block: slice) -> dict[str, Any]:
        """What every kernel takes."""
        return {
            "z_ptr": z, "target_ptr": self.target[block], "stride_z_r": z.stride(0), "V": z.shape[1],
            "ignore_index": self.terms["ignore_index"],
            "BLOCK_V": BLOCK_V, "num_warps": ROW.warps, "num_stages": ROW.stages,
        }  # fmt: skip

    def _gradient_terms(self, block: slice) -> dict[str, Any]:
        return {
            "weight_ptr": None if self.weight is None else self.weight[block],
            "smoothing": self._smoothing(), "z_loss": float(self.terms["z_loss"]),
        }  # fmt: skip


def forward(outputs, saved, x, w, target, weight, *, reduction, prefer, group, first, vocab, **terms):
    x, rows = x.reshape(-1, x.shape[-1]), Rows(target, weight, shard_of(group, first, vocab), **terms)
    with launch.on(x):
        if reduction == "none":
            _losses(rows, x, w, outputs[0].view(-1), saved[0].view(-1, 2) if saved else None, prefer)
            return
        loss = torch.empty(rows.target.shape, dtype=torch.float32, device=x.device)
        total = rows.total() if reduction == "mean" else None
        if saved:
            dx, dw = (t if t.numel() else None for t in saved)
            dx = None if dx is None else dx.view(x.shape)
            _losses_and_gradients(rows, x, w, loss, dx, dw, total, prefer)
        else:
            _losses(rows, x, w, loss, None, prefer)
        torch.div(loss.sum(), 1 if total is None else total, out=outputs[0])


def backward(grads, inputs, outputs, saved, needs, *, reduction, prefer, group, first, vocab, **terms):
    x, w, target, weight = inputs
    dloss = grads[0]
    with launch.on(dloss):
        if reduction != "none":
            return *(_scaled(t, dloss, x.dtype) if n else None for t, n in zip(saved, needs, strict=False)), None, None
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
        dw = torch.empty_like(w) if needs[1] else None
        flat, rows = x.reshape(-1, x.shape[-1]), Rows(target, weight, shard_of(group, first, vocab), **terms)
        stats, dloss = saved[0].view(-1, 2), dloss.reshape(-1)
        for block, z in _blocks(flat, w, None if dx is None else dx.view(flat.shape), dw, prefer, rows.shard):
            rows.gradients(z, block, stats[block], dloss[block])
    return dx, dw, None, None


def _losses(rows: Rows, x, w, loss, stats, prefer: str) -> None:
    for block, z in _blocks(x, w, None, None, prefer, rows.shard):
        rows.losses(z, block, loss, stats, None, False)


def _losses_and_gradients(rows: Rows, x, w, loss, dx, dw, total: Tensor | None, prefer: str) -> None:
    """Fill loss, and dx and dw of sum(loss) / total; float16's are float32 (see the contract) and divided last."""
    share = None if total is None else torch.where(total == 0, 0.0, 1.0 / total)
    late = x.dtype == torch.float16
    for block, z in _blocks(x, w, dx, dw, prefer, rows.shard):
        rows.losses(z, block, loss, None, None if late else share, True)
    if late and share is not None:
        for gradient in (dx, dw):
            if gradient is not None:
                gradient.mul_(share)


def _blocks(
    x: Tensor, w: Tensor, dx: Tensor | None, dw: Tensor | None, prefer: str, shard: Shard | None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield equal blocks of rows and their logits z; what the caller then leaves in z makes dx = z w, dw = z^T x.

    Where w is a shard, dx is the sum over its ranks.
    """
    rows, vocab = x.shape[0], w.shape[0]
    lanes = ALIGN_BYTES // x.element_size()
    stride = triton.cdiv(vocab, lanes) * lanes
    width = stride if shard is None else triton.cdiv(shard.width, lanes) * lanes
    row_bytes = width * x.element_size()
    if prefer == "auto":
        prefer = "time" if rows * row_bytes <= AT_ONCE_BYTES else "memory"
    count = triton.cdiv(rows, max(1, BLOCK_BYTES[prefer] // row_bytes))
    logits = x.new_empty((triton.cdiv(rows, max(count, 1)), stride))
    total = dw
    if dw is not None and dw.dtype == x.dtype != torch.float32 and count > 1:
        total = torch.empty_like(dw, dtype=torch.float32)  # half sums would round once a block
    for k in range(count):
        block = slice(rows * k // count, rows * (k + 1) // count)
        z = torch.mm(x[block], w.t(), out=logits[: block.stop - block.start, :vocab])
        yield block, z
        if dx is not None:
            _accumulate(dx[block], z, w, fresh=True)
        if dw is not None:
            _accumulate(total, z.t(), x[block], fresh=k == 0)
    if dx is not None and shard is not None:
        shard.all_reduce(dx)
    if dw is not None and not count:
        dw.zero_()
    elif total is not dw:
        dw.copy_(total)


def _accumulate(out: Tensor, a: Tensor, b: Tensor, *, fresh: bool) -> None:
    """out (+)= a b; out may be wider than a and b."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=0 if fresh else 1, out=out)
    elif fresh:
        out.copy_(a @ b)
    else:
        out.add_(a @ b)


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(gradient, dtype=dtype)
    linear_cross_entropy_scale[(triton.cdiv(out.numel(), BLOCK_N),)](
        x_ptr=gradient, scale_ptr=scale, y_ptr=out, N=out.numel(),
        BLOCK_N=BLOCK_N, num_warps=SCALE.warps, num_stages=SCALE.stages,
    )  # fmt: skip
    return out


def aot_cases(arch: str) -> Iterator[AotCase]:
    """The static check's cases."""
    wide = ("weight_ptr", "loss_ptr", "stats_ptr", "scale_ptr", "dloss_ptr", "parts_ptr")
    types = {"target_ptr": "*i64", "smoothing": "fp32", "z_loss": "fp32", **dict.fromkeys(wide, "*fp32")}
    block = {"BLOCK_V": BLOCK_V}
    with_gradient = {"stats_ptr": None, "GRAD": True, "SMOOTH": True, **block}
    loss_only = {"scale_ptr": None, "weight_ptr": None, "GRAD": False, "SMOOTH": False, **block}
    yield launch.case(linear_cross_entropy_fwd, "bf16 loss and gradient", ROW, "bf16", with_gradient, **types)
    yield launch.case(linear_cross_entropy_fwd, "bf16 loss", ROW, "bf16", loss_only, **types)
    yield launch.case(linear_cross_entropy_parts, "bf16", ROW, "bf16", {"SMOOTH": True, **block}, **types)
    yield launch.case(linear_cross_entropy_bwd, "bf16", ROW, "bf16", {"stride_dloss": 1, **block}, **types)
    yield launch.case(linear_cross_entropy_scale, "bf16", SCALE, "bf16", {"BLOCK_N": BLOCK_N}, **types)
