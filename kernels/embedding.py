"""Embedding: gather token rows and add position rows.

    y[b, t] = wte[ids[b, t]] + wpe[start + t]
    dwte[v] = sum of dy over the places where ids = v      dwpe[start + t] = sum_b dy[b, t]

The backward adds in a fixed order, so it is the same from run to run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.kernels import check
from peakgpt.kernels.dispatch import Cost, op


def _check(ids, wte, wpe, *, start):
    check.shape("embedding", "ids", ids, None, None)
    check.shape("embedding", "wte", wte, None, None)
    check.shape("embedding", "wpe", wpe, None, wte.shape[1])
    check.same("embedding", "wte", wte, wpe=wpe)
    check.indices("embedding", "ids", ids, wte.shape[0], wte.device)
    if wpe is not None and not 0 <= start <= wpe.shape[0] - ids.shape[1]:
        raise ValueError(
            f"embedding: positions {start} to {start + ids.shape[1] - 1} asked, expected 0 to {wpe.shape[0] - 1}"
        )


def _cost(ids, wte, wpe=None, **_):
    """One add an element; reads a token row and writes a row each token; backward reads dy and writes both tables."""
    n, size, indices = ids.numel() * wte.shape[1], wte.element_size(), ids.numel() * ids.element_size()
    tables = wte.numel() + (0 if wpe is None else wpe.numel())
    positions = 0 if wpe is None else ids.shape[1] * wte.shape[1]
    return Cost(
        n, (2 * n + positions) * size + indices, 2 * n, (n + tables) * size + indices, n * size, tables * size
    )


def _sample(batch: int = 4, tokens: int = 256, vocab: int = 50304, width: int = 768, **like):
    ids = torch.randint(vocab, (batch, tokens), device=like.get("device"))
    return ids, torch.randn(vocab, width, **like), torch.randn(tokens, width, **like)


def _alloc(ids, wte, wpe, *, needs, start):
    return (wte.new_empty((*ids.shape, wte.shape[1])),), ()


@op(cost=_cost, sample=_sample, check=_check, alloc=_alloc, keeps=("ids", "wte", "wpe"))
def embedding(ids: Tensor, wte: Tensor, wpe: Tensor | None = None, *, start: int = 0) -> Tensor:
    """Look up token rows and add the position rows from `start` on.

    Args:
        ids: (B, T) int64 or int32.
        wte: (V, C) float32, bfloat16 or float16.
        wpe: (P, C) dtype of wte, or None.
        start: position of the first token.
    Returns:
        (B, T, C), dtype of wte.
    Raises:
        ValueError: shapes, dtypes, devices or positions do not fit; on CPU also an id out of range.
        NotImplementedError: a forced backend objects; the message says why.
    """
    rows = F.embedding(ids, wte)
    return rows if wpe is None else rows + wpe[start : start + ids.shape[1]]
