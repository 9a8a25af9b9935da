"""A head cut by rows over ranks: what a rank finds in its part of the vocabulary, and what follows from all parts.

    rank r has w[first : first + V_r]:
    m_r = max_v z_v    t_r = sum_v exp(z_v - m_r)    z_r = z_target, 0 if elsewhere    s_r = sum_v z_v
    of all ranks: m = max_r m_r    t = sum_r t_r exp(m_r - m)    z_target = sum_r z_r    mean_v z_v = sum_r s_r / V
    dx = sum_r dz_r w_r    dw_r = dz_r^T x

Loss and dz are those of kernels/ops/linear_cross_entropy.py with this m and t and the V of all. Ranks tell each
other four floats a token (three without smoothing) in one all_gather, whose sums have the same order on every rank
and in every run, and add dx up in one all_reduce: in bfloat16 16 bytes a token beside 2 C. A scalar loss asks once a
block of rows and makes the gradients of the block's logits in their place, 6 C V_r FLOPs a token; to ask once a call would form the
logits twice, 8 C V_r. A block of 512 MiB in bfloat16 costs 6 C 2^28 FLOPs, 2 ms of a GPU at C 768 and 600 TFLOP/s, and
its second forming 0.7 ms, against one message of a few MB.

Shoeybi et al. 2019, "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism",
arXiv:1909.08053, section 3, whose f (x passes, dx is summed) this is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def vocab_shard(w: Tensor, group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """What `linear_cross_entropy` must know of a head that is cut over ranks; every rank asks, once for a head.

    Args:
        w: (V_r, C) this rank's rows of the head's weight; the ranks hold them in their order, any number each.
        group: the ranks; None: all of them.
    Returns:
        group, first and vocab, as linear_cross_entropy(x, w, target, **vocab_shard(w)) takes them.
    Raises:
        ValueError: the ranks' rows differ in width, or a rank has none; on every rank.
    """
    group = dist.group.WORLD if group is None else group
    mine = torch.tensor(w.shape, device=w.device)
    sizes = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(sizes, mine, group=group)
    rows, widths = zip(*(size.tolist() for size in sizes), strict=True)
    if len(set(widths)) > 1:
        raise ValueError(f"vocab_shard: w has widths {', '.join(map(str, widths))} by rank, expected one")
    if 0 in rows:
        raise ValueError(f"vocab_shard: w has {', '.join(map(str, rows))} rows by rank, expected at least 1")
    return {"group": group.group_name, "first": sum(rows[: group.rank()]), "vocab": sum(rows)}


class Shard:
    """This rank's part of the vocabulary, and its way to the others.

    Args:
        group: name of the process group.
        first: id of this rank's first row.
        vocab: rows of all ranks.
    """

    def __init__(self, group: str, first: int, vocab: int):
        self.group = dist.distributed_c10d._resolve_process_group(group)
        self.first, self.vocab = first, vocab
        # Blocks of rows are cut by this, for each is a message and every rank must send as many.
        self.width = -(-vocab // self.group.size())

    def gather(self, mine: Tensor) -> Tensor:
        """(...) of each rank -> (R, ...) on every one."""
        found = mine.new_empty(self.group.size(), *mine.shape)
        dist.all_gather(list(found.unbind()), mine, group=self.group)
        return found

    def add_up(self, tensor: Tensor) -> None:
        """Put the sum over ranks in the tensor's place."""
        dist.all_reduce(tensor, group=self.group)

    def losses(
        self, parts: Tensor, target: Tensor, *, ignore_index: int, label_smoothing: float, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        """Losses of some tokens and what their gradient needs, from what this rank found.

        Args:
            parts: (N, 3 or 4) m_r, t_r, z_r and, for smoothing, s_r; no gradient flows to m_r.
            target: (N) counted over all ranks' rows.
        Returns:
            (N) losses, 0 where ignored and NaN where the target is out of range, and (N, 2) m and t.
        """
        found = _Gather.apply(parts, self)
        each = found.detach()[..., 0]
        m = each.amax(0)
        total, z_target = (found[..., 1] * (each - m).exp()).sum(0), found[..., 2].sum(0)
        loss = total.log() - (z_target - m)
        if label_smoothing:
            loss = loss + label_smoothing * (z_target - found[..., 3].sum(0) / self.vocab)
        if z_loss:
            loss = loss + z_loss * (m + total.log()).square()
        loss = torch.where((target >= 0) & (target < self.vocab), loss, torch.nan)
        return torch.where(target == ignore_index, 0.0, loss), torch.stack((m, total), -1)

    def eager_losses(self, x: Tensor, w: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Losses of all tokens in plain torch.

        Args:
            x: (N, C). w: (V_r, C). target: (N).
        """
        logits = _Replicated.apply(x, self) @ w.t()
        logits = logits if logits.dtype == torch.float64 else logits.float()
        at = target - self.first
        here = (at >= 0) & (at < w.shape[0])
        z_target = logits.gather(1, torch.where(here, at, 0)[:, None])[:, 0]
        m = logits.detach().amax(-1)
        total = (logits - m[:, None]).exp().sum(-1)
        parts = [m, total, torch.where(here, z_target, 0.0), logits.sum(-1)]
        return self.losses(torch.stack(parts, -1), target, **options)[0]


def shard_of(group: str, first: int, vocab: int) -> Shard | None:
    """The shard that a call means, or None where w is the whole head."""
    return Shard(group, first, vocab) if group else None


class _Gather(torch.autograd.Function):
    """Every rank makes the same loss of what it gathered, so that what flows to its own part is all that flows."""

    @staticmethod
    def forward(ctx, mine: Tensor, shard: Shard) -> Tensor:
        ctx.rank = shard.group.rank()
        return shard.gather(mine)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad[ctx.rank], None


class _Replicated(torch.autograd.Function):
    """x as it is; its gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        total = grad.clone(memory_format=torch.contiguous_format)
        ctx.shard.add_up(total)
        return total, None
