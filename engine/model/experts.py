"""Mixture of experts: a router sends each token to k of E MLPs.

    p = softmax(x W_r)      y = sum over the k largest p_e of  p_e / (their sum) * expert_e(x)
    balance loss = E * sum_e f_e P_e      f_e: share of tokens whose first choice is e, P_e: mean of p_e over the tokens

No token is dropped, and the output of a token does not depend on the other tokens of the batch. The rows are sorted by
expert, each expert runs on its own rows, and the results return to the order of the tokens. Each step is a gather, so
that sums have a fixed order. The host reads the number of rows of each expert, once a layer. Lepikhin et al. 2020,
"GShard", arXiv:2006.16668, algorithm 1 (without its capacity); the balance loss with the scale of Fedus, Zoph, Shazeer
2021, "Switch Transformers", arXiv:2101.03961, eq. 4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from peakgpt.engine.model.plain import fusable, is_plain
from peakgpt.kernels.ops.embedding import embedding
from peakgpt.kernels.ops.linear import linear


@fusable
class Experts(nn.Module):
    """A mixture of experts in place of a block's MLP."""

    def __init__(self, n_embd: int, experts: int, per_token: int, make: Callable[[], nn.Module]):
        """
        Args:
            n_embd: C.
            experts: E.
            per_token: k.
            make: builds one expert, which maps (N, C) to (N, C).
        """
        super().__init__()
        self.router = nn.Linear(n_embd, experts, bias=False)
        self.experts = nn.ModuleList(make() for _ in range(experts))
        self.per_token = per_token

    def forward(self, x: Tensor, balance_losses: list[Tensor] | None = None, start: Tensor | None = None) -> Tensor:
        """Map x, (..., C), to (..., C).

        Args:
            x: (..., C).
            balance_losses: the balance loss of this layer, a float32 scalar, is appended.
            start: (B,) integers, first token of each left-padded sequence of x, (B, T, C). Padding does not count in
                the balance loss.
        """
        flat, k, count = x.flatten(0, -2), self.per_token, len(self.experts)
        p = self._route(flat).softmax(-1)  # (N, E)
        top_p, top_experts = p.topk(k)
        if balance_losses is not None:
            first_choice = torch.nn.functional.one_hot(top_experts[:, 0], count).float()
            balance_losses.append(_balance_loss(first_choice, p, x, start))
        expert, order = top_experts.flatten().sort(stable=True)  # sorted row i is entry order[i] of the N k choices
        parts = _gather_rows(flat, order // k).split(torch.bincount(expert, minlength=count).tolist())
        y = torch.cat([run(rows) for run, rows in zip(self.experts, parts, strict=True)])
        y = _gather_rows(y, order.argsort()).unflatten(0, (-1, k))  # (N, k, C)
        weights = (top_p / top_p.sum(-1, keepdim=True)).to(y.dtype)
        return (y * weights[..., None]).sum(1).view(x.shape)

    def _route(self, x: Tensor) -> Tensor:
        """Return the router's logits, (N, E) float32, of x, (N, C)."""
        if is_plain(self.router, nn.Linear):
            bias = self.router.bias  # of another router than __init__ makes
            return linear(x.float(), self.router.weight.float(), None if bias is None else bias.float())
        return self.router(x).float()


def _balance_loss(first_choice: Tensor, p: Tensor, x: Tensor, start: Tensor | None) -> Tensor:
    """Compute E * sum_e f_e P_e of one-hot first choices and router probabilities, both (N, E)."""
    if start is not None:
        is_token = (torch.arange(x.shape[1], device=x.device) >= start[:, None]).flatten()
        share = is_token * (len(is_token) / is_token.sum())
        first_choice, p = first_choice * share[:, None], p * share[:, None]
    return p.shape[1] * (first_choice.mean(0) * p.mean(0)).sum()


def _gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return x[index] by the embedding op, whose backward adds up gradients in a fixed order."""
    return embedding(index[None], x)[0]
