"""Vocabulary-parallel cross-entropy: the head is split by rows over ranks, and partial results are combined.

    rank r has the rows w[first : first + V_r]:
    m_r = max_v z_v    t_r = sum_v exp(z_v - m_r)    z_r = z_target, 0 on other ranks    s_r = sum_v z_v
    combined: m = max_r m_r    t = sum_r t_r exp(m_r - m)    z_target = sum_r z_r    mean_v z_v = sum_r s_r / V
    dx = sum_r dz_r w_r    dw_r = dz_r^T x

Loss and dz are those of linear_cross_entropy.py with the combined m and t and the V of all ranks. Ranks exchange 4
floats per token (3 without smoothing) in one all_gather, and sum them in the same order on every rank and in every run.
One all_reduce sums dx. In bfloat16 that is 16 bytes per token, plus 2 C for dx.

A scalar loss exchanges once per block of rows and overwrites the block's logits with their gradients: 6 C V_r FLOPs per
token. One exchange per call would compute the logits twice: 8 C V_r. A block of 512 MiB in bfloat16 costs 6 C 2^28
FLOPs, 2 ms on a GPU at C 768 and 600 TFLOP/s. Recomputing its logits costs 0.7 ms, more than a message of a few MB.

Shoeybi et al. 2019, "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism",
arXiv:1909.08053, section 3: operator f, the identity in forward and an all_reduce of dx in backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peakgpt.kernels.core.autograd import first_order
from peakgpt.kernels.ops.soft_cap import soft_cap


def vocab_shard(w: Tensor, group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Return the options of `linear_cross_entropy` for a head split over ranks. Every rank must call, once per head.

    Args:
        w: (V_r, C) this rank's rows of the head's weight, in the order of the ranks. V_r may differ between ranks.
        group: the process group. Default: all ranks.
    Returns:
        group, first and vocab: linear_cross_entropy(x, w, target, **vocab_shard(w)).
    Raises:
        ValueError: the widths of the ranks differ, or a rank has no rows. Raised on every rank.
    """
    group = dist.group.WORLD if group is None else group
    local = torch.tensor(w.shape, device=w.device)
    sizes = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(sizes, local, group=group)
    rows, widths = zip(*(size.tolist() for size in sizes), strict=True)
    if len(set(widths)) > 1:
        raise ValueError(f"vocab_shard: w has widths {', '.join(map(str, widths))} by rank, expected one")
    if 0 in rows:
        raise ValueError(f"vocab_shard: w has {', '.join(map(str, rows))} rows by rank, expected at least 1")
    return {"group": group.group_name, "first": sum(rows[: group.rank()]), "vocab": sum(rows)}


class Shard:
    """This rank's part of the vocabulary, and the communication with the other ranks.

    Args:
        group: name of the process group.
        first: token id of this rank's first row.
        vocab: number of rows of all ranks.
    """

    def __init__(self, group: str, first: int, vocab: int):
        self.group = dist.distributed_c10d._resolve_process_group(group)
        self.first, self.vocab = first, vocab
        # Determines the number of row blocks. Each block is a message, so the number must be equal on all ranks.
        self.width = -(-vocab // self.group.size())

    def gather(self, local: Tensor) -> Tensor:
        """All-gather: (...) of each rank -> (R, ...) on every rank."""
        gathered = local.new_empty(self.group.size(), *local.shape)
        dist.all_gather(list(gathered.unbind()), local, group=self.group)
        return gathered

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace the tensor by its sum over ranks."""
        dist.all_reduce(tensor, group=self.group)

    def losses(
        self, parts: Tensor, target: Tensor, *, ignore_index: int, label_smoothing: float, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        """Combine the partial results of all ranks to losses, with the m and t that backward needs.

        Args:
            parts: (N, 3 or 4) m_r, t_r, z_r and, with label smoothing, s_r, of the logits after any softcap. m_r gets
                no gradient.
            target: (N) ids of the whole vocabulary.
        Returns:
            (N) losses, 0 for ignored targets and NaN for targets out of range, and (N, 2) m and t.
        """
        gathered = _Gather.apply(parts, self)
        maxima = gathered.detach()[..., 0]
        m = maxima.amax(0)
        total, z_target = (gathered[..., 1] * (maxima - m).exp()).sum(0), gathered[..., 2].sum(0)
        loss = total.log() - (z_target - m)
        if label_smoothing:
            loss = loss + label_smoothing * (z_target - gathered[..., 3].sum(0) / self.vocab)
        if z_loss:
            loss = loss + z_loss * (m + total.log()).square()
        loss = torch.where((target >= 0) & (target < self.vocab), loss, torch.nan)
        return torch.where(target == ignore_index, 0.0, loss), torch.stack((m, total), -1)

    def eager_losses(
        self, x: Tensor, w: Tensor, target: Tensor, *, softcap: float | None, **options: Any
    ) -> Tensor:
        """Compute the losses of all tokens in plain torch.

        Args:
            x: (N, C). w: (V_r, C). target: (N).
        """
        logits = _Replicated.apply(x, self) @ w.t()
        logits = soft_cap(logits if logits.dtype == torch.float64 else logits.float(), softcap)
        row = target - self.first
        local = (row >= 0) & (row < w.shape[0])
        z_target = logits.gather(1, torch.where(local, row, 0)[:, None])[:, 0]
        m = logits.detach().amax(-1)
        total = (logits - m[:, None]).exp().sum(-1)
        parts = [m, total, torch.where(local, z_target, 0.0), logits.sum(-1)]
        return self.losses(torch.stack(parts, -1), target, **options)[0]


def shard_of(group: str, first: int, vocab: int) -> Shard | None:
    """The shard of a call's options, or None if w is the whole head."""
    return Shard(group, first, vocab) if group else None


class _Gather(torch.autograd.Function):
    """All-gather. Every rank computes the same loss, so backward takes its own part of the gradient, without a sum."""

    @staticmethod
    def forward(ctx, local: Tensor, shard: Shard) -> Tensor:
        ctx.rank = shard.group.rank()
        return shard.gather(local)

    @staticmethod
    @first_order
    def backward(ctx, grad):
        return grad[ctx.rank], None


class _Replicated(torch.autograd.Function):
    """The identity in forward. Backward sums the gradient over ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return x.view_as(x)

    @staticmethod
    @first_order
    def backward(ctx, grad):
        total = grad.clone(memory_format=torch.contiguous_format)
        ctx.shard.all_reduce(total)
        return total, None
