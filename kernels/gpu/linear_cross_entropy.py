"""Linear cross-entropy on the GPU: logits by blocks of rows from cuBLAS, loss and gradient in place, a program a row.

    z = x w^T     fwd: loss = lse - z_target, lse online; z becomes dz     dx = dz w     dw (float32) += dz^T x

A row is read twice, the second time largely from L2 cache, and written once. The count of the mean stays on the
device. Halves round dz at the loss's own scale; float16 would lose small probabilities times 1 / count, so there the
count divides the finished dx and dw.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.gpu import launch
from peakgpt.kernels.gpu.launch import AotCase, Tile

# Unmeasured on hardware: 16 elements a thread at a time.
BLOCK_V, ROW = 4096, Tile(warps=8)
BLOCK_N, SCALE = 1024, Tile(warps=4)
# Logits at a time: large enough that the products and dw's float32 sum run at their full rate, small beside the card.
BLOCK_BYTES = 512 << 20
# Rows of the logits start on 128 bytes, whatever V is: cuBLAS is slow on unaligned rows.
ALIGN_BYTES = 128


@triton.jit
def _row_gradient(z_ptr, target, lse, g, V, BLOCK_V: tl.constexpr):
    """Overwrite a row of logits with (softmax - onehot) g."""
    for first in range(0, V, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        z = tl.load(z_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
        dz = (tl.exp(z - lse) - tl.where(v == target, 1.0, 0.0)) * g
        tl.store(z_ptr + v, dz.to(z_ptr.dtype.element_ty), mask=v < V)


@triton.jit
def _row_zero(z_ptr, V, BLOCK_V: tl.constexpr):
    for first in range(0, V, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        tl.store(z_ptr + v, tl.zeros([BLOCK_V], z_ptr.dtype.element_ty), mask=v < V)


@triton.jit
def linear_cross_entropy_fwd(
    z_ptr, target_ptr, loss_ptr, lse_ptr, scale_ptr, stride_z_r, V, ignore_index, GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Loss of one row; with GRAD the row becomes its gradient at dloss = scale (None: 1)."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_z_r
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if lse_ptr is not None:
            tl.store(lse_ptr + row, 0.0)
        if GRAD:
            _row_zero(z_ptr, V, BLOCK_V)
    else:
        known = (target >= 0) & (target < V)  # a target out of range gives NaN, not foreign memory
        # Before the loop, whose reductions are barriers: no warp overwrites the row while another still reads this.
        z_target = tl.load(z_ptr + target, mask=known, other=float("nan")).to(tl.float32)
        m = float("-inf")
        total = 0.0
        for first in range(0, V, BLOCK_V):
            v = first + tl.arange(0, BLOCK_V)
            z = tl.load(z_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
            m_new = tl.maximum(m, tl.max(z, 0))
            base = tl.where(m_new == float("-inf"), 0.0, m_new)  # no finite logit so far
            total = total * tl.exp(m - base) + tl.sum(tl.exp(z - base), 0)
            m = m_new
        lse = m + tl.log(total)
        tl.store(loss_ptr + row, lse - z_target)
        if lse_ptr is not None:
            tl.store(lse_ptr + row, lse)
        if GRAD:
            g = 1.0
            if scale_ptr is not None:
                g = tl.load(scale_ptr)
            _row_gradient(z_ptr, target, lse, g, V, BLOCK_V)


@triton.jit
def linear_cross_entropy_bwd(
    z_ptr, target_ptr, lse_ptr, dloss_ptr, stride_z_r, stride_dloss, V, ignore_index, BLOCK_V: tl.constexpr
):
    """A row of logits becomes its gradient, from the kept lse and the row's own upstream gradient."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_z_r
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        _row_zero(z_ptr, V, BLOCK_V)
    else:
        g = tl.load(dloss_ptr + row * stride_dloss)
        _row_gradient(z_ptr, target, tl.load(lse_ptr + row), g, V, BLOCK_V)


@triton.jit
def linear_cross_entropy_scale(x_ptr, scale_ptr, y_ptr, N, BLOCK_N: tl.constexpr):
    """y = x scale in float32; torch would round a scalar on the device to x's dtype first."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.load(x_ptr + at, mask=at < N, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < N)


def objection(x: Tensor, *_, **__) -> str | None:
    return launch.objection(x)


def forward(outputs, saved, x, w, target, *, ignore_index, reduction):
    x, target = x.reshape(-1, x.shape[-1]), target.flatten()
    with launch.on(x):
        if reduction == "none":
            _losses(x, w, target, outputs[0].view(-1), saved[0].view(-1) if saved else None, ignore_index)
            return
        loss = torch.empty(target.shape, dtype=torch.float32, device=x.device)
        count = (target != ignore_index).sum() if reduction == "mean" else 1
        if saved:
            dx, dw = (t if t.numel() else None for t in saved)
            dx = None if dx is None else dx.view(x.shape)
            _losses_and_gradients(x, w, target, loss, dx, dw, ignore_index, count)
        else:
            _losses(x, w, target, loss, None, ignore_index)
        torch.div(loss.sum(), count, out=outputs[0])


def backward(grads, inputs, outputs, saved, needs, *, ignore_index, reduction):
    x, w, target = inputs
    dloss = grads[0]
    with launch.on(dloss):
        if reduction != "none":
            return *(_scaled(t, dloss, x.dtype) if n else None for t, n in zip(saved, needs, strict=False)), None
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
        dw = torch.empty_like(w) if needs[1] else None
        flat, target, lse, dloss = x.reshape(-1, x.shape[-1]), target.flatten(), saved[0].view(-1), dloss.reshape(-1)
        for block, z in _blocks(flat, w, None if dx is None else dx.view(flat.shape), dw):
            linear_cross_entropy_bwd[(z.shape[0],)](
                z_ptr=z, target_ptr=target[block], lse_ptr=lse[block], dloss_ptr=dloss[block], stride_z_r=z.stride(0),
                stride_dloss=dloss.stride(0), V=z.shape[1], ignore_index=ignore_index,
                BLOCK_V=BLOCK_V, num_warps=ROW.warps, num_stages=ROW.stages,
            )  # fmt: skip
    return dx, dw, None


def _losses(x, w, target, loss, lse, ignore_index) -> None:
    for block, z in _blocks(x, w, None, None):
        _row_losses(z, target[block], loss[block], None if lse is None else lse[block], None, ignore_index, False)


def _losses_and_gradients(x, w, target, loss, dx, dw, ignore_index, count: Tensor | int) -> None:
    """Fill loss, and dx and dw of sum(loss) / count; float16's are float32 (see the contract) and divided last."""
    share = None if isinstance(count, int) else 1.0 / count.clamp(min=1)
    late = x.dtype == torch.float16
    for block, z in _blocks(x, w, dx, dw):
        _row_losses(z, target[block], loss[block], None, None if late else share, ignore_index, True)
    if late and share is not None:
        for gradient in (dx, dw):
            if gradient is not None:
                gradient.mul_(share)


def _row_losses(z, target, loss, lse, scale, ignore_index, grad: bool) -> None:
    linear_cross_entropy_fwd[(z.shape[0],)](
        z_ptr=z, target_ptr=target, loss_ptr=loss, lse_ptr=lse, scale_ptr=scale, stride_z_r=z.stride(0),
        V=z.shape[1], ignore_index=ignore_index, GRAD=grad,
        BLOCK_V=BLOCK_V, num_warps=ROW.warps, num_stages=ROW.stages,
    )  # fmt: skip


def _blocks(x: Tensor, w: Tensor, dx: Tensor | None, dw: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield equal blocks of rows and their logits z; what the caller then leaves in z makes dx = z w, dw = z^T x."""
    rows, vocab = x.shape[0], w.shape[0]
    lanes = ALIGN_BYTES // x.element_size()
    stride = triton.cdiv(vocab, lanes) * lanes
    count = triton.cdiv(rows, max(1, BLOCK_BYTES // (stride * x.element_size())))
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
    types = {"target_ptr": "*i64", "loss_ptr": "*fp32", "lse_ptr": "*fp32", "scale_ptr": "*fp32", "dloss_ptr": "*fp32"}
    block = {"BLOCK_V": BLOCK_V}
    with_gradient = {"lse_ptr": None, "GRAD": True, **block}
    loss_only = {"scale_ptr": None, "GRAD": False, **block}
    yield launch.case(linear_cross_entropy_fwd, "bf16 loss and gradient", ROW, "bf16", with_gradient, **types)
    yield launch.case(linear_cross_entropy_fwd, "bf16 loss", ROW, "bf16", loss_only, **types)
    yield launch.case(linear_cross_entropy_bwd, "bf16", ROW, "bf16", {"stride_dloss": 1, **block}, **types)
    yield launch.case(linear_cross_entropy_scale, "bf16", SCALE, "bf16", {"BLOCK_N": BLOCK_N}, **types)
