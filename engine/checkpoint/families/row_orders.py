"""Orders of the rows of packed projections: for each row of the layout's tensor, the row of ours.

Ours has the queries of all heads, then the keys, then the values, with head_dim rows each. Of experts it has the gate,
then c_fc.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from peakgpt.engine.model.config import GPTConfig

CODEGEN_PARTS = 4


def grouped_heads(config: GPTConfig) -> Tensor:
    """Return the order of the layout with one group per key and value head: its queries, its key, its value."""
    heads, groups = config.n_head, config.n_kv_head
    queries = heads // groups
    return _rows(
        config,
        (
            head
            for group in range(groups)
            for head in (*range(group * queries, (group + 1) * queries), heads + group, heads + groups + group)
        ),
    )


def codegen_heads(config: GPTConfig) -> Tensor:
    """Return the order of CodeGen: 4 parts, one per core of the machine that trained it: queries, values, keys."""
    heads = config.n_head
    width = heads // CODEGEN_PARTS
    return _rows(
        config,
        (
            kind * heads + head
            for part in range(CODEGEN_PARTS)
            for kind in (0, 2, 1)
            for head in range(part * width, (part + 1) * width)
        ),
    )


def alternating_gate_and_up(config: GPTConfig) -> Tensor:
    """Return the order in which row 2 i is row i of the experts' gate, and row 2 i + 1 is row i of c_fc."""
    return torch.arange(2 * config.expert_inner).view(2, -1).t().flatten()


def _rows(config: GPTConfig, heads: Iterable[int]) -> Tensor:
    """Return the rows of heads, (rows,) int64."""
    first = torch.tensor([*heads]) * config.head_dim
    return (first[:, None] + torch.arange(config.head_dim)).flatten()
