"""Embedding: gather token rows and add position rows.

    y[b, t] = wte[ids[b, t]] + wpe[start + t], or + wpe[positions[b, t]]
    dwte[v] = sum of dy where ids = v      dwpe[start + t] = sum_b dy[b, t], or dwpe[p] = sum of dy where positions = p

Backward adds in a fixed order, so its results are the same from run to run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.kernels.core import check
from peakgpt.kernels.core.dispatch import Cost, op


def _check(ids, wte, wpe, positions, *, start):
    check.shape("embedding", "ids", ids, None, None)
    check.shape("embedding", "wte", wte, None, None)
    check.shape("embedding", "wpe", wpe, None, wte.shape[1])
    check.same("embedding", "wte", wte, wpe=wpe)
    check.indices("embedding", "ids", ids, wte.shape[0], wte.device)
    if positions is not None:
        if wpe is None or start != 0:
            got = "no wpe" if wpe is None else f"start {start}"
            raise ValueError(f"embedding: got positions with {got}, expected wpe and start 0")
        check.shape("embedding", "positions", positions, *ids.shape)
        check.indices("embedding", "positions", positions, wpe.shape[0], wte.device)
    elif wpe is not None and not 0 <= start <= wpe.shape[0] - ids.shape[1]:
        raise ValueError(
            f"embedding: got positions {start} to {start + ids.shape[1] - 1}, expected 0 to {wpe.shape[0] - 1}"
        )


def _cost(ids, wte, wpe=None, positions=None, **_):
    """1 addition per element. Forward reads and writes a row per token, backward reads dy and writes both tables."""
    n, size, indices = ids.numel() * wte.shape[1], wte.element_size(), ids.numel() * ids.element_size()
    indices += 0 if positions is None else positions.numel() * positions.element_size()
    tables = wte.numel() + (0 if wpe is None else wpe.numel())
    rows = 0 if wpe is None else ids.shape[1] if positions is None else min(ids.numel(), wpe.shape[0])
    return Cost(
        n, (2 * n + rows * wte.shape[1]) * size + indices, 2 * n, (n + tables) * size + indices, n * size, tables * size
    )


def _sample(
    batch: int = 4, tokens: int = 256, vocab: int = 50304, width: int = 768, positions: int | None = None, **like
):
    """Add a position per token if `positions`, the number of rows of wpe, is given."""
    ids = torch.randint(vocab, (batch, tokens), device=like.get("device"))
    tables = torch.randn(vocab, width, **like), torch.randn(positions or tokens, width, **like)
    return ids, *tables, *(() if positions is None else (torch.randint(positions, ids.shape, device=ids.device),))


def _alloc(ids, wte, wpe, positions, *, needs, start):
    return (wte.new_empty((*ids.shape, wte.shape[1])),), ()


@op(
    cost=_cost, sample=_sample, check=_check, alloc=_alloc, saved_for_backward=("ids", "wte", "wpe", "positions"),
    strided=("wte", "wpe"),
)  # fmt: skip
def embedding(
    ids: Tensor, wte: Tensor, wpe: Tensor | None = None, positions: Tensor | None = None, *, start: int = 0
) -> Tensor:
    """Look up token rows and add position rows: those from `start` on, or those of `positions`.

    Args:
        ids: (B, T) int64 or int32.
        wte: (V, C) float32, bfloat16 or float16.
        wpe: (P, C) dtype of wte, or None.
        positions: (B, T) int64 or int32, the position of each token. Default: start, start + 1, ...
        start: position of the first token.
    Returns:
        (B, T, C), dtype of wte.
    Raises:
        ValueError: shapes, dtypes, devices or positions do not fit; on CPU also an id or a position out of range.
        NotImplementedError: the forced backend does not support the call; the message says why.
    """
    rows = F.embedding(ids, wte)
    if wpe is None:
        return rows
    return rows + (wpe[start : start + ids.shape[1]] if positions is None else F.embedding(positions, wpe))
