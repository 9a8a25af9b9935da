"""Linear cross-entropy on the CPU, block by block of rows: products and csrc/ops/cross_entropy.cpp.

The logits of a block are computed, then one pass computes the losses and overwrites the logits with their gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peakgpt.kernels.core.autograd import may_overwrite_saved
from peakgpt.kernels.core.recording import is_recording
from peakgpt.kernels.cpu.ext import _C, DTYPES, dtype_objection, rows, scratch, threads, workspace
from peakgpt.kernels.cpu.gemm import ADD, STORE, gemm
from peakgpt.kernels.ops.vocab_parallel import Shard, shard_of

# Products of 512 rows are within 3 % of 1024 rows; products of 256 rows are up to 18 % slower in float32 and as fast in
# bfloat16 (GPT-2's head, 2 cores of Zen 4, 2026-11). A very large vocabulary gets fewer rows.
BLOCK_ROWS, BLOCK_BYTES, LEAST_ROWS = {torch.float32: (512, 512), torch.bfloat16: (256, 512)}, 128 << 20, 64
# Number of blocks whose dw is summed in bfloat16; later blocks are summed in float32. The rounding error of n blocks is
# sqrt((n + 1) / 2) times that of one.
BF16_BLOCKS = 4
NO_GRADIENT = ("weight",)


def objection(x: Tensor, *_, **__) -> str | None:
    return dtype_objection(x)


def forward(outputs, saved, x, w, target, weight, *, ignore_index, reduction, label_smoothing, z_loss, softcap, prefer,
            group, first, vocab, into=(None,) * 4):  # fmt: skip
    flat, target, shard = rows(x), target.reshape(-1).long(), shard_of(group, first, vocab)
    weight = None if weight is None else weight.reshape(-1).float()
    loss = workspace("loss", torch.float32, target.numel()) if reduction != "none" else outputs[0].view(-1)
    dx, dw = None, into[1]
    stats = workspace("stats", torch.float32, target.numel(), 2)  # m and l
    count, scale = _mean_of(target != ignore_index, weight) if reduction == "mean" else (None, None)
    if saved and reduction == "none":
        stats = saved[0].view(-1, 2)
    elif saved:
        dx, saved_dw = (t if t.numel() else None for t in saved)
        dw = saved_dw if dw is None else dw
    terms = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
    products = Products(flat, w, None if dx is None else dx.view(flat.shape), dw, into[1] is None, shard)
    for block, logits in products.blocks():
        if shard is None:
            _C.cross_entropy_forward(
                dtype=DTYPES[x.dtype],
                rows=logits.shape[0],
                vocab=logits.shape[1],
                logits=logits,
                target=target[block],
                ignore_index=ignore_index,
                loss=loss[block],
                stats=stats[block],
                with_gradient=products.needed,
                smoothing=label_smoothing,
                z_loss=z_loss,
                softcap=softcap or 0.0,
                scale=scale,
                weight=None if weight is None else weight[block],
                threads=threads(),
            )
        else:
            loss[block], stats[block] = _losses_over_shards(shard, logits, target[block], **terms)
            if products.needed:
                dloss = torch.ones_like(loss[block]) if weight is None else weight[block]
                dloss = dloss if scale is None else dloss * scale
                _gradients(shard, logits, target[block], stats[block], dloss, **terms)
        products.add(block, logits)
    products.finish()
    if weight is not None:
        loss.mul_(weight)
    if reduction != "none":
        total = loss.sum()
        outputs[0].copy_(total if count is None else total / count)


def backward(grads, inputs, outputs, saved, needs, *, ignore_index, reduction, label_smoothing, z_loss, softcap, prefer,
             group, first, vocab, into=(None,) * 4):  # fmt: skip
    x, w, target, weight = inputs
    if reduction != "none":
        return *(scaled(saved[i], grads[0]) if needs[i] else None for i in (0, 1)), None, None
    flat, target = rows(x), target.reshape(-1).long()
    stats, dloss = saved[0].view(-1, 2), grads[0].reshape(-1)
    dloss = dloss if weight is None else dloss * weight.reshape(-1).float()
    dx = torch.empty_like(flat) if needs[0] else None
    dw = into[1] if into[1] is not None or not needs[1] else torch.empty_like(w)
    terms = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
    shard = shard_of(group, first, vocab)
    products = Products(flat, w, dx, dw, into[1] is None, shard)
    for block, logits in products.blocks():
        _gradients(shard, logits, target[block], stats[block], dloss[block], **terms)
        products.add(block, logits)
    products.finish()
    return None if dx is None else dx.view(x.shape), dw, None, None


def _losses_over_shards(
    shard: Shard, logits: Tensor, target: Tensor, *, softcap: float | None, **terms
) -> tuple[Tensor, Tensor]:
    """Return the losses of a block and its (m, l), over all shards."""
    parts = logits.new_empty(target.numel(), 4 if terms["label_smoothing"] else 3, dtype=torch.float32)
    _C.cross_entropy_shard(
        dtype=DTYPES[logits.dtype],
        rows=logits.shape[0],
        vocab=logits.shape[1],
        logits=logits,
        target=target,
        ignore_index=terms["ignore_index"],
        first=shard.first,
        width=parts.shape[1],
        softcap=softcap or 0.0,
        parts=parts,
        threads=threads(),
    )
    return shard.losses(parts, target, **terms)


def _gradients(
    shard: Shard | None, logits: Tensor, target: Tensor, stats: Tensor, dloss: Tensor, *,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
) -> None:  # fmt: skip
    """Overwrite the logits with their gradient; dloss is the gradient of each row's loss."""
    first, total = (0, logits.shape[1]) if shard is None else (shard.first, shard.vocab)
    _C.cross_entropy_backward(
        dtype=DTYPES[logits.dtype],
        rows=logits.shape[0],
        vocab=logits.shape[1],
        logits=logits,
        target=target,
        ignore_index=ignore_index,
        stats=stats,
        dloss=dloss,
        smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap or 0.0,
        first=first,
        total=total,
        threads=threads(),
    )


def _mean_of(live: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the sum of the weights of the live rows and its reciprocal, 0 if there are none: float32 tensors ()."""
    count = (live.sum() if weight is None else torch.where(live, weight, 0.0).sum()).double()
    return count.float(), torch.where(count == 0.0, 0.0, 1.0 / count).float()


def scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """Return scale * gradient, in place if the saved tensor may be overwritten."""
    if not may_overwrite_saved():
        return gradient * scale
    is_one = not is_recording() and float(scale) == 1.0
    return gradient if is_one else gradient.mul_(scale)


class Products:
    """The three products of the head, computed block by block.

    Args:
        x: (N, C) rows.
        w: (V, C).
        dx, dw: written: dz w and dz^T x; None: not needed.
        fresh: True overwrites dw, False adds to it.
        shard: this rank's part of the vocabulary; dx is then summed over the ranks. None: w is the whole head.
    """

    def __init__(self, x: Tensor, w: Tensor, dx: Tensor | None, dw: Tensor | None, fresh: bool, shard: Shard | None):
        self.x, self.w, self.dx, self.dw, self.fresh, self.shard = x, w, dx, dw, fresh, shard
        self.needed = dx is not None or dw is not None
        low, high = BLOCK_ROWS[x.dtype]
        block_rows = min(max(-(-x.shape[0] // BF16_BLOCKS), low), high)  # more blocks need a float32 copy of dw
        width = w.shape[0] if shard is None else shard.width
        block_rows = max(LEAST_ROWS, min(block_rows, BLOCK_BYTES // (width * w.element_size())))
        self.count = -(-x.shape[0] // block_rows)
        self.done = 0  # blocks added to dw since it was last moved to the float32 sum
        self.total = None  # float32 sum of dw, if the blocks are too many for bfloat16

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield blocks of rows of about equal size and their logits, which the caller may overwrite."""
        n = self.x.shape[0]
        for k in range(self.count):
            block = slice(n * k // self.count, n * (k + 1) // self.count)
            (logits,) = scratch(self.x.dtype, (block.stop - block.start, self.w.shape[0]))
            yield block, gemm(self.x[block], self.w.t(), logits)

    def add(self, block: slice, dz: Tensor) -> None:
        """Compute the gradients of a block; dz is the gradient of its logits."""
        if self.dx is not None:
            gemm(dz, self.w, self.dx[block])
        if self.dw is None:
            return
        if self.done == BF16_BLOCKS and self.dw.dtype != torch.float32:
            self._widen()
        gemm(dz.t(), self.x[block], self.dw, epilogue=STORE if self.fresh else ADD)
        self.fresh, self.done = False, self.done + 1

    def finish(self) -> None:
        """Sum dx over the ranks and write a dw that was summed in float32."""
        if self.dx is not None and self.shard is not None:
            self.shard.all_reduce(self.dx)
        if self.dw is not None and self.fresh:
            self.dw.zero_()
        if self.total is not None:
            self._widen()
            self.dw.copy_(self.total)

    def _widen(self) -> None:
        """Add dw to its float32 sum and start dw again."""
        if self.total is None:
            self.total = workspace("dw", torch.float32, *self.dw.shape).zero_()
        # In slices, because torch converts the second operand to a temporary of its size.
        for total, part in zip(self.total.split(1024), self.dw.split(1024), strict=True):
            total.add_(part)
        self.fresh, self.done = True, 0
