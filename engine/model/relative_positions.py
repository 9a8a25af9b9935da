"""Relative positions that are learned: what a query adds to its scores for a key d = i - j tokens before it.

    Transformer-XL:  s_ij = ((q_i + u) k_j + (q_i + v) r_d) scale      r = W R,  R_d the sinusoids of d
    T5:              s_ij = q_i k_j scale + table[bucket(d)]

Both reach attention as its additive bias of (B or 1, H, T, S): T^2 memory, which is what they cost beside rotary angles
and slopes. u, v and W, or the table, are a layer's own. Dai et al. 2019, "Transformer-XL", arXiv:1901.02860, section
3.3 and appendix B; Raffel et al. 2019, "Exploring the Limits of Transfer Learning", arXiv:1910.10683, section 2.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from peakgpt.engine.model.config import GPTConfig
from peakgpt.kernels.ops.embedding import embedding
from peakgpt.kernels.ops.linear import linear

BUCKETS, FARTHEST = 32, 128  # T5's: half of them a distance each, the others grow to the distance where the last begins


def distances(config: GPTConfig, keys: int, device: torch.device | str) -> Tensor | None:
    """What the layers read of the distances keys - 1 .. 0: sinusoids (S, C) float32, or buckets (S,) int64."""
    reach = torch.arange(keys - 1, -1, -1, device=device)
    return {"transformer_xl": _sinusoids, "relative_bias": _buckets}[config.position](reach, config.n_embd)


def _sinusoids(distance: Tensor, width: int) -> Tensor:
    pair = torch.arange(0, width, 2, dtype=torch.float32, device=distance.device) / width
    angle = distance[:, None] * (1.0 / 10000.0**pair)
    return torch.cat((angle.sin(), angle.cos()), -1)


def _buckets(distance: Tensor, width: int) -> Tensor:
    exact = BUCKETS // 2
    ratio = torch.log(distance.clamp(min=exact).float() / exact) / math.log(FARTHEST / exact)
    far = exact + (ratio * (BUCKETS - exact)).long()
    return torch.where(distance < exact, distance, far.clamp(max=BUCKETS - 1))


class RelativeKeys(nn.Module):
    """Transformer-XL's relative keys of one layer."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_rel = nn.Linear(config.n_embd, config.n_head * config.head_dim, bias=False)
        self.u = nn.Parameter(torch.empty(config.n_head, config.head_dim))
        self.v = nn.Parameter(torch.empty(config.n_head, config.head_dim))

    def forward(self, q: Tensor, sinusoids: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """What stands for q, (B, T, H, D), and the bias of its scores, (B, H, T, S)."""
        keys = linear(sinusoids.to(q.dtype), self.c_rel.weight).unflatten(-1, self.u.shape)  # (S, H, D)
        scores = (q + self.v).transpose(1, 2) @ keys.permute(1, 2, 0)  # (B, H, T, S)
        return q + self.u, aligned(scores * scale)


class RelativeBias(nn.Module):
    """T5's bias by distance of one layer."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(BUCKETS, config.n_head))

    def forward(self, q: Tensor, buckets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """q, (B, T, H, D), as it is, and the bias of its scores, (1, H, T, S)."""
        bias = embedding(buckets[None], self.weight).permute(0, 2, 1)[:, :, None]  # (1, H, 1, S)
        return q, aligned(bias.expand(-1, -1, q.shape[1], -1))


RELATIVE = {"transformer_xl": RelativeKeys, "relative_bias": RelativeBias}


def aligned(scores: Tensor) -> Tensor:
    """Scores (..., T, S) by distance, S - 1 .. 0, as scores by key; those of keys to come are from other rows.

    Entry (i, m) belongs to key j = m - (T - 1 - i): a column of padding in front, and rows are read one too short.
    """
    *outer, queries, keys = scores.shape
    padded = torch.cat((scores.new_zeros(*outer, queries, 1), scores), -1).flatten(-2)
    return padded[..., queries:].unflatten(-1, (queries, keys))
