"""Mixture of experts: a router sends each token to k of E MLPs.

    p = softmax(x W_r)      y = sum over the k largest p_e of  w_e expert_e(x)      w_e = p_e, or p_e / (their sum)

No token is dropped, and the output of a token does not depend on the other tokens of the batch. The router computes in
float32, the experts are the op `experts`. Lepikhin et al. 2020, "GShard", arXiv:2006.16668, algorithm 1, without its
capacity. Two balance losses keep the experts equally busy, see `balance_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.plain import PARAMETERS, fusable, is_plain, plain_parameters
from peakgpt.engine.model.recompute import checkpoint_block
from peakgpt.engine.model.state_dicts import stack_experts
from peakgpt.kernels.ops.embedding import embedding
from peakgpt.kernels.ops.experts import experts
from peakgpt.kernels.ops.linear import linear
from peakgpt.kernels.ops.mlp import ACTIVATIONS, gated

NO_LAYER = {"weight": None, "bias": None}


@fusable
class ExpertLinear(nn.Module):
    """One linear layer for each of E experts. Its parameters are stacked: weight (E, F, C), bias (E, F) or None."""

    def __init__(self, count: int, inputs: int, outputs: int, *, bias: bool = True):
        """
        Args:
            count: E.
            inputs: C.
            outputs: F.
            bias: whether the layers have biases.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, outputs, inputs))
        self.register_parameter("bias", nn.Parameter(torch.empty(count, outputs)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize every layer as nn.Linear does."""
        bound = self.weight.shape[2] ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Map rows of all experts, (S, C), to (S, F). The op `experts` is faster: it does not read offsets on the host.

        Args:
            rows: sorted by expert.
            offsets: (E + 1,) integers, the first row of each expert.
        """
        biases = (None,) * len(self.weight) if self.bias is None else self.bias.unbind()
        return torch.cat([linear(part, w, b) for part, w, b in zip(
            rows.split(offsets.diff().tolist()), self.weight.unbind(), biases, strict=True)])  # fmt: skip


PARAMETERS[ExpertLinear] = PARAMETERS[nn.Linear]


@fusable
class ExpertMLPs(nn.Module):
    """The MLPs of all experts of a layer: c_gate if they are gated, c_fc and c_proj."""

    def __init__(
        self, n_embd: int, n_inner: int, count: int, *, gated: bool = False, bias: bool = True,
        activation: str = "gelu_tanh",
    ):  # fmt: skip
        """
        Args:
            n_embd: C.
            n_inner: F, the width of one expert.
            count: E.
            gated: whether the activation is applied to a third projection, the gate.
            bias: whether all linear layers have a bias.
            activation: "gelu_tanh", "gelu_erf" or "relu"; gated also "silu" or "clamped_swiglu".
        """
        super().__init__()
        if gated:
            self.c_gate = ExpertLinear(count, n_embd, n_inner, bias=bias)
        self.c_fc = ExpertLinear(count, n_embd, n_inner, bias=bias)
        self.c_proj = ExpertLinear(count, n_inner, n_embd, bias=bias)
        self.count, self.activation, self.recompute = count, activation, False

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Load also the parameters of E separate MLPs."""
        stacked = stack_experts(state_dict)
        state_dict.clear()
        state_dict.update(stacked)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts, (N, C).

        Args:
            x: (N, C).
            topk_ids: (N, k) integers, the experts of each token.
            topk_weights: (N, k) float32.
        """
        parameters = self._plain_parameters()
        if parameters is not None:
            return experts(
                x, topk_ids, topk_weights, *parameters, activation=self.activation, recompute=self.recompute
            )  # fmt: skip
        if self.recompute and torch.is_grad_enabled():
            return checkpoint_block(self.by_layers, x, topk_ids, topk_weights)
        return self.by_layers(x, topk_ids, topk_weights)

    def _plain_parameters(self) -> list[Tensor | None] | None:
        """Return weight and bias of c_gate, c_fc and c_proj if all are plain, else None."""
        parameters: list[Tensor | None] = []
        for name in ("c_gate", "c_fc", "c_proj"):
            layer = self._modules.get(name)
            p = NO_LAYER if layer is None else plain_parameters(layer, ExpertLinear)
            if p is None:
                return None
            parameters += (p["weight"], p["bias"])
        return parameters

    def by_layers(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Compute the same layer by layer, with layers that run their own forward. The host reads the counts."""
        k = topk_ids.shape[1]
        expert, order = topk_ids.flatten().sort(stable=True)  # sorted row i is choice order[i] of the N k choices
        offsets = torch.searchsorted(expert, torch.arange(self.count + 1, device=x.device))
        rows = _gather_rows(x, order // k)
        if "c_gate" in self._modules:
            hidden = gated(self.activation, self.c_gate(rows, offsets), self.c_fc(rows, offsets))
        else:
            hidden = ACTIVATIONS[self.activation](self.c_fc(rows, offsets))
        y = _gather_rows(self.c_proj(hidden, offsets), order.argsort()).unflatten(0, (-1, k))  # (N, k, C)
        return (y * topk_weights[..., None]).sum(1).to(x.dtype)


@fusable
class Experts(nn.Module):
    """A mixture of experts in place of a block's MLP."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        c = config
        self.router = nn.Linear(c.n_embd, c.experts, bias=c.router_bias)
        self.experts = ExpertMLPs(
            c.n_embd, c.expert_inner, c.experts, gated=c.gated_experts, bias=c.has_bias("mlp"), activation=c.activation
        )
        self.per_token, self.normalize = c.experts_per_token, c.normalize_experts
        self.balanced_choices = c.experts_per_token if c.balance_over == "model" else 1

    def forward(self, x: Tensor, balance: list[Tensor] | None = None, start: Tensor | None = None) -> Tensor:
        """Map x, (..., C), to (..., C).

        Args:
            x: (..., C).
            balance: how this layer uses its experts is appended, (2, E) float32: see `balance_loss`.
            start: (B,) integers, first token of each left-padded sequence of x, (B, T, C). Padding does not count in
                the balance.
        """
        flat = x.flatten(0, -2)
        p = self._route(flat).softmax(-1)  # (N, E)
        weights, ids = p.topk(self.per_token)
        if balance is not None:
            balance.append(_usage(ids[:, : self.balanced_choices], p, x, start))
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return self.experts(flat, ids, weights).view(x.shape)

    def _route(self, x: Tensor) -> Tensor:
        """Return the router's logits, (N, E) float32, of x, (N, C)."""
        if is_plain(self.router, nn.Linear):
            bias = self.router.bias
            return linear(x.float(), self.router.weight.float(), None if bias is None else bias.float())
        return self.router(x).float()


def balance_loss(usage: Sequence[Tensor], over: str) -> Tensor:
    """Compute the balance loss of a model, a float32 scalar.

        "layer"   sum over the layers of E sum_e f_e P_e, with f_e of first choices
        "model"   E sum_e mean(f_e) mean(P_e), means over the layers, with f_e of all choices

    f_e is the number of choices of e for each token, P_e the mean of the router's p_e. "layer" is arXiv:2006.16668 with
    the scale of Fedus, Zoph, Shazeer 2021, "Switch Transformers", arXiv:2101.03961, eq. 4. "model" is
    load_balancing_loss_func of transformers' Mixtral.

    Args:
        usage: (f, P) of each layer, (2, E) float32.
        over: "layer" or "model".
    """
    f, p = torch.stack(list(usage), 1)  # (L, E)
    if over == "model":
        f, p = f.mean(0), p.mean(0)
    return f.shape[-1] * (f * p).sum()


def _usage(ids: Tensor, p: Tensor, x: Tensor, start: Tensor | None) -> Tensor:
    """Return (f, P), (2, E), from the counted choices, (N, n), and the router's probabilities, (N, E)."""
    chosen = torch.zeros_like(p).scatter_(1, ids, 1.0)
    if start is not None:
        is_token = (torch.arange(x.shape[1], device=x.device) >= start[:, None]).flatten()
        share = (is_token * (len(is_token) / is_token.sum()))[:, None]
        chosen, p = chosen * share, p * share
    return torch.stack((chosen.mean(0), p.mean(0)))


def _gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return x[index] by the embedding op, whose backward adds up gradients in a fixed order."""
    return embedding(index[None], x)[0]
