"""Learned relative positions: a term of the attention score that depends on the distance d = i - j of query and key.

    Transformer-XL:  s_ij = ((q_i + u) k_j + (q_i + v) r_d) scale      r = W R,  R_d the sinusoids of d
    T5:              s_ij = q_i k_j scale + table[bucket(d)]

Attention takes both as an additive bias (B or 1, H, T, S). This needs T^2 memory, which rotary and ALiBi do not. Each
layer has its own u, v and W, or its own table. Dai et al. 2019, "Transformer-XL", arXiv:1901.02860, section
3.3 and appendix B; Raffel et al. 2019, "Exploring the Limits of Transfer Learning", arXiv:1910.10683, section 2.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.plain import fusable, run_linear
from peakgpt.kernels.ops.embedding import embedding

# T5: distances 0 .. 15 have a bucket each, the next 16 buckets grow logarithmically up to distance 128.
BUCKETS, MAX_DISTANCE = 32, 128


def distances(config: GPTConfig, keys: int, device: torch.device | str) -> Tensor:
    """Encode the distances keys - 1 .. 0 for the layers: sinusoids (S, C) float32, or T5 buckets (S,) int64."""
    distance = torch.arange(keys - 1, -1, -1, device=device)
    return {"transformer_xl": _sinusoids, "relative_bias": _buckets}[config.position](distance, config.n_embd)


def _sinusoids(distance: Tensor, width: int) -> Tensor:
    pair = torch.arange(0, width, 2, dtype=torch.float32, device=distance.device) / width
    angle = distance[:, None] * (1.0 / 10000.0**pair)
    return torch.cat((angle.sin(), angle.cos()), -1)


def _buckets(distance: Tensor, width: int) -> Tensor:
    exact = BUCKETS // 2
    ratio = torch.log(distance.clamp(min=exact).float() / exact) / math.log(MAX_DISTANCE / exact)
    far = exact + (ratio * (BUCKETS - exact)).long()
    return torch.where(distance < exact, distance, far.clamp(max=BUCKETS - 1))


@fusable
class RelativeKeys(nn.Module):
    """Transformer-XL's relative keys, for one layer."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_rel = nn.Linear(config.n_embd, config.n_head * config.head_dim, bias=False)
        self.u = nn.Parameter(torch.empty(config.n_head, config.head_dim))
        self.v = nn.Parameter(torch.empty(config.n_head, config.head_dim))

    def forward(self, q: Tensor, sinusoids: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return the queries plus u, (B, T, H, D), and the bias of the scores, (B, H, T, S)."""
        keys = run_linear(self.c_rel, sinusoids.to(q.dtype)).unflatten(-1, self.u.shape)  # (S, H, D)
        scores = (q + self.v).transpose(1, 2) @ keys.permute(1, 2, 0)  # (B, H, T, S)
        return q + self.u, _by_key(scores * scale)


@fusable
class RelativeBias(nn.Module):
    """T5's bias by distance, for one layer."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(BUCKETS, config.n_head))

    def forward(self, q: Tensor, buckets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return q, (B, T, H, D), unchanged, and the bias of the scores, (1, H, T, S)."""
        bias = embedding(buckets[None], self.weight).permute(0, 2, 1)[:, :, None]  # (1, H, 1, S)
        return q, _by_key(bias.expand(-1, -1, q.shape[1], -1))


RELATIVE = {"transformer_xl": RelativeKeys, "relative_bias": RelativeBias}


def _by_key(scores: Tensor) -> Tensor:
    """Convert scores (..., T, S) from columns by distance, S - 1 .. 0, to columns by key (the relative shift).

    Entry (i, m) belongs to key j = m - (T - 1 - i). Pad one column on the left and read the memory as rows that are one
    element shorter. Entries of masked keys are values of other rows.
    """
    *outer, queries, keys = scores.shape
    padded = torch.cat((scores.new_zeros(*outer, queries, 1), scores), -1).flatten(-2)
    return padded[..., queries:].unflatten(-1, (queries, keys))
