"""A mixture of experts: each token goes through the k of E MLPs that its router likes best.

    p = softmax(x W_r)      y = sum over the k largest of p_e / (their sum) * expert_e(x)
    balance = E * sum_e f_e P_e      f_e the tokens whose first choice is e, P_e the mean of p_e, both as shares

No token is dropped and none depends on the others of its batch: rows are sorted by expert, each expert multiplies its
own, and they are put back; every step is a gather, so that sums have one order. How many rows an expert has is read by
the host, once a layer. Lepikhin et al. 2020, "GShard", arXiv:2006.16668, algorithm 1 (without its capacity); the loss
in the scale of Fedus, Zoph, Shazeer 2021, "Switch Transformers", arXiv:2101.03961, eq. 4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from peakgpt.kernels.ops.embedding import embedding
from peakgpt.kernels.ops.linear import linear


class Experts(nn.Module):
    """What stands in a block for its MLP."""

    def __init__(self, n_embd: int, experts: int, per_token: int, make: Callable[[], nn.Module]):
        """
        Args:
            n_embd: C.
            experts: E. per_token: k.
            make: makes one expert, (N, C) to (N, C).
        """
        super().__init__()
        self.router = nn.Linear(n_embd, experts, bias=False)
        self.experts = nn.ModuleList(make() for _ in range(experts))
        self.per_token = per_token

    def forward(self, x: Tensor, balance: list[Tensor] | None = None, start: Tensor | None = None) -> Tensor:
        """Map x, (..., C), to (..., C).

        Args:
            balance: gets this layer's, a float32 scalar.
            start: (B,) integers of x (B, T, C), the tokens before which are padding and do not count in the balance.
        """
        flat, k, count = x.flatten(0, -2), self.per_token, len(self.experts)
        p = linear(flat.float(), self.router.weight.float()).softmax(-1)  # (N, E)
        top, chosen = p.topk(k)
        if balance is not None:
            first, likely = torch.nn.functional.one_hot(chosen[:, 0], count).float(), p
            if start is not None:
                live = (torch.arange(x.shape[1], device=x.device) >= start[:, None]).flatten()
                share = live * (len(live) / live.sum())
                first, likely = first * share[:, None], p * share[:, None]
            balance.append(count * (first.mean(0) * likely.mean(0)).sum())
        expert, order = chosen.flatten().sort(stable=True)  # place i holds choice order[i] of N k
        rows = _rows(flat, order // k).split(torch.bincount(expert, minlength=count).tolist())
        done = torch.cat([run(some) for run, some in zip(self.experts, rows, strict=True)])
        done = _rows(done, order.argsort()).unflatten(0, (-1, k))  # (N, k, C)
        weights = (top / top.sum(-1, keepdim=True)).to(done.dtype)
        return (done * weights[..., None]).sum(1).view(x.shape)


def _rows(x: Tensor, which: Tensor) -> Tensor:
    """Rows of x, by the op whose backward adds them up in a fixed order."""
    return embedding(which[None], x)[0]
