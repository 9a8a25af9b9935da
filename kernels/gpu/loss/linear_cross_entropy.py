"""Linear cross-entropy on the GPU: cuBLAS computes blocks of logits, Triton kernels the loss and the logits' gradient.

    z = x w^T     loss and dz by the kernels, dz in the memory of z     dx = dz w     dw (float32) += dz^T x

BLOCK_BYTES has two strategies: logits in blocks of rows, with dw summed in float32, or all logits at once, which gives
the largest products. The count that a mean divides by stays on the device. For a mean, bfloat16 and float32 divide dz
by the count. float16 divides the finished dx and dw instead: its dz would lose small probabilities times 1 / count.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from peakgpt.kernels.gpu import launch
from peakgpt.kernels.gpu.launch import AotCase, Tile
from peakgpt.kernels.gpu.loss.cross_entropy_kernels import (
    linear_cross_entropy_bwd,
    linear_cross_entropy_fwd,
    linear_cross_entropy_scale,
    linear_cross_entropy_shard,
)
from peakgpt.kernels.ops.vocab_parallel import Shard, shard_of

# Not measured on hardware: 16 elements a thread at a time.
BLOCK_V, TILE = 4096, Tile(warps=8)
SCALE_BLOCK_N, SCALE_TILE = 1024, Tile(warps=4)
# Bytes of logits in memory at once. "memory": large enough for products and dw's float32 sum at full rate, and less
# than a tenth of eager's memory at 32k tokens. "time": all logits. Not measured on hardware.
BLOCK_BYTES = {"memory": 512 << 20, "time": 1 << 62}
# prefer="auto" takes "time" up to this size, which holds GPT-2's vocabulary at 32k tokens.
AT_ONCE_BYTES = 4 << 30
# Every row of the logits starts at a multiple of this, for any V: cuBLAS is slow on unaligned rows.
ALIGN_BYTES = 128


NO_GRADIENT = ("weight",)


def objection(x: Tensor, w: Tensor, *_, **__) -> str | None:
    return launch.objection(x, w)


class RowLosses:
    """Launch the kernels on one block of rows at a time, with the targets, weights and terms of the call."""

    def __init__(self, target, weight, shard: Shard | None, *, softcap: float | None, **terms):
        self.target, self.shard, self.terms = target.flatten(), shard, terms
        self.softcap = None if softcap is None else float(softcap)
        self.weight = None if weight is None else weight.flatten().float()

    def total(self) -> Tensor:
        """Return the divisor of a mean: the number of targets that are not ignored, or the sum of their weights."""
        live = self.target != self.terms["ignore_index"]
        return live.sum() if self.weight is None else torch.where(live, self.weight, 0.0).sum()

    def losses(self, z: Tensor, block: slice, loss, stats, scale, grad: bool) -> None:
        """Fill a block of loss, and of stats (m, l) unless None. With grad, overwrite z with scale * dz."""
        if self.shard is not None:
            self._sharded_losses(z, block, loss, stats, scale, grad)
            return
        linear_cross_entropy_fwd[(z.shape[0],)](
            loss_ptr=loss[block], stats_ptr=None if stats is None else stats[block], scale_ptr=scale, GRAD=grad,
            SMOOTH=self._smoothing() != 0.0, **self._row(z, block), **self._gradient_terms(block),
        )  # fmt: skip

    def gradients(self, z: Tensor, block: slice, stats, dloss) -> None:
        """Overwrite the block's logits z with their gradient; stats (m and l) and dloss are those of the block."""
        first, total_v = (0, z.shape[1]) if self.shard is None else (self.shard.first, self.shard.vocab)
        linear_cross_entropy_bwd[(z.shape[0],)](
            stats_ptr=stats, dloss_ptr=dloss, stride_dloss=dloss.stride(0), FIRST=first, TOTAL_V=total_v,
            **self._row(z, block), **self._gradient_terms(block),
        )  # fmt: skip

    def _sharded_losses(self, z: Tensor, block: slice, loss, stats, scale, grad: bool) -> None:
        """Run `losses` for a shard's logits; the ranks exchange m, l and the target's logit before the gradient."""
        smooth = self._smoothing() != 0.0
        parts = torch.empty((z.shape[0], 4 if smooth else 3), dtype=torch.float32, device=z.device)
        linear_cross_entropy_shard[(z.shape[0],)](
            parts_ptr=parts, FIRST=self.shard.first, SMOOTH=smooth, **self._row(z, block)
        )
        losses, global_stats = self.shard.losses(parts, self.target[block], **self.terms)
        loss[block] = losses if self.weight is None else losses * self.weight[block]
        if stats is not None:
            stats[block] = global_stats
        if grad:
            dloss = torch.ones((), dtype=torch.float32, device=z.device) if scale is None else scale
            self.gradients(z, block, global_stats, dloss.expand(z.shape[0]))

    def _smoothing(self) -> float:
        return float(self.terms["label_smoothing"])

    def _row(self, z: Tensor, block: slice) -> dict[str, Any]:
        """Return the arguments that all kernels share."""
        return {
            "z_ptr": z, "target_ptr": self.target[block], "stride_z_r": z.stride(0), "V": z.shape[1],
            "ignore_index": self.terms["ignore_index"], "softcap": self.softcap,
            "BLOCK_V": BLOCK_V, "num_warps": TILE.warps, "num_stages": TILE.stages,
        }  # fmt: skip

    def _gradient_terms(self, block: slice) -> dict[str, Any]:
        return {
            "weight_ptr": None if self.weight is None else self.weight[block],
            "smoothing": self._smoothing(), "z_loss": float(self.terms["z_loss"]),
        }  # fmt: skip


def forward(outputs, saved, x, w, target, weight, *, reduction, prefer, group, first, vocab, **terms):
    x, rows = x.reshape(-1, x.shape[-1]), RowLosses(target, weight, shard_of(group, first, vocab), **terms)
    with launch.device_of(x):
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
    with launch.device_of(dloss):
        if reduction != "none":
            return *(_scaled(t, dloss, x.dtype) if n else None for t, n in zip(saved, needs, strict=False)), None, None
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
        dw = torch.empty_like(w) if needs[1] else None
        flat, rows = x.reshape(-1, x.shape[-1]), RowLosses(target, weight, shard_of(group, first, vocab), **terms)
        stats, dloss = saved[0].view(-1, 2), dloss.reshape(-1)
        for block, z in _blocks(flat, w, None if dx is None else dx.view(flat.shape), dw, prefer, rows.shard):
            rows.gradients(z, block, stats[block], dloss[block])
    return dx, dw, None, None


def _losses(rows: RowLosses, x, w, loss, stats, prefer: str) -> None:
    for block, z in _blocks(x, w, None, None, prefer, rows.shard):
        rows.losses(z, block, loss, stats, None, False)


def _losses_and_gradients(rows: RowLosses, x, w, loss, dx, dw, total: Tensor | None, prefer: str) -> None:
    """Fill loss, and dx and dw of sum(loss) / total; for float16 dx and dw are float32 and divided at the end."""
    scale = None if total is None else torch.where(total == 0, 0.0, 1.0 / total)
    scale_last = x.dtype == torch.float16
    for block, z in _blocks(x, w, dx, dw, prefer, rows.shard):
        rows.losses(z, block, loss, None, None if scale_last else scale, True)
    if scale_last and scale is not None:
        for gradient in (dx, dw):
            if gradient is not None:
                gradient.mul_(scale)


def _blocks(
    x: Tensor, w: Tensor, dx: Tensor | None, dw: Tensor | None, prefer: str, shard: Shard | None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield equal blocks of rows and their logits z. The caller may overwrite z with dz.

    After each block dx[block] = z w is filled and z^T x is added to dw, unless dx or dw is None. For a shard dx is then
    summed over the ranks.
    """
    rows, vocab = x.shape[0], w.shape[0]
    alignment = ALIGN_BYTES // x.element_size()
    stride = triton.cdiv(vocab, alignment) * alignment
    width = stride if shard is None else triton.cdiv(shard.width, alignment) * alignment
    row_bytes = width * x.element_size()
    if prefer == "auto":
        prefer = "time" if rows * row_bytes <= AT_ONCE_BYTES else "memory"
    count = triton.cdiv(rows, max(1, BLOCK_BYTES[prefer] // row_bytes))
    logits = x.new_empty((triton.cdiv(rows, max(count, 1)), stride))
    total = dw
    if dw is not None and dw.dtype == x.dtype != torch.float32 and count > 1:
        total = torch.empty_like(dw, dtype=torch.float32)  # a half-precision sum would round after every block
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
    """Compute out = a b if fresh, else out += a b; out may have a wider dtype than a and b."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=0 if fresh else 1, out=out)
    elif fresh:
        out.copy_(a @ b)
    else:
        out.add_(a @ b)


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(gradient, dtype=dtype)
    linear_cross_entropy_scale[(triton.cdiv(out.numel(), SCALE_BLOCK_N),)](
        x_ptr=gradient, scale_ptr=scale, y_ptr=out, N=out.numel(),
        BLOCK_N=SCALE_BLOCK_N, num_warps=SCALE_TILE.warps, num_stages=SCALE_TILE.stages,
    )  # fmt: skip
    return out


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Yield the static check's cases."""
    wide = ("weight_ptr", "loss_ptr", "stats_ptr", "scale_ptr", "dloss_ptr", "parts_ptr")
    floats = dict.fromkeys(("smoothing", "z_loss", "softcap"), "fp32")
    types = {"target_ptr": "*i64", **floats, **dict.fromkeys(wide, "*fp32")}
    for softcap, label in (({"softcap": None}, ""), ({}, ", softcap")):
        block, hot = {"BLOCK_V": BLOCK_V, **softcap}, bool(softcap)
        with_gradient = {"stats_ptr": None, "GRAD": True, "SMOOTH": True, **block}
        loss_only = {"scale_ptr": None, "weight_ptr": None, "GRAD": False, "SMOOTH": False, **block}
        for kernel, name, sizes in (
            (linear_cross_entropy_fwd, "loss and gradient", with_gradient),
            (linear_cross_entropy_fwd, "loss", loss_only),
            (linear_cross_entropy_shard, "shard", {"SMOOTH": True, **block}),
            (linear_cross_entropy_bwd, "gradient", {"stride_dloss": 1, **block}),
        ):  # fmt: skip
            yield launch.case(kernel, f"bf16 {name}{label}", TILE, "bf16", sizes, hot=hot, **types)
    yield launch.case(linear_cross_entropy_scale, "bf16", SCALE_TILE, "bf16", {"BLOCK_N": SCALE_BLOCK_N}, **types)
