"""Embedding: gather token rows and add position rows.

    y[b, t] = wte[ids[b, t]] + wpe[start + t], or + wpe[places[b, t]]
    dwte[v] = sum of dy where ids = v      dwpe[start + t] = sum_b dy[b, t], or dwpe[p] = sum of dy where places = p

The backward adds in a fixed order, so it is the same from run to run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.kernels.core import check
from peakgpt.kernels.core.dispatch import Cost, op


def _check(ids, wte, wpe, places, *, start):
    check.shape("embedding", "ids", ids, None, None)
    check.shape("embedding", "wte", wte, None, None)
    check.shape("embedding", "wpe", wpe, None, wte.shape[1])
    check.same("embedding", "wte", wte, wpe=wpe)
    check.indices("embedding", "ids", ids, wte.shape[0], wte.device)
    if places is not None:
        if wpe is None or start != 0:
            got = "no wpe" if wpe is None else f"start {start}"
            raise ValueError(f"embedding: got places with {got}, expected wpe and no start beside them")
        check.shape("embedding", "places", places, *ids.shape)
        check.indices("embedding", "places", places, wpe.shape[0], wte.device)
    elif wpe is not None and not 0 <= start <= wpe.shape[0] - ids.shape[1]:
        raise ValueError(
            f"embedding: positions {start} to {start + ids.shape[1] - 1} asked, expected 0 to {wpe.shape[0] - 1}"
        )


def _cost(ids, wte, wpe=None, places=None, **_):
    """One add an element; reads a token row and writes a row each token; backward reads dy and writes both tables."""
    n, size, indices = ids.numel() * wte.shape[1], wte.element_size(), ids.numel() * ids.element_size()
    indices += 0 if places is None else places.numel() * places.element_size()
    tables = wte.numel() + (0 if wpe is None else wpe.numel())
    rows = 0 if wpe is None else ids.shape[1] if places is None else min(ids.numel(), wpe.shape[0])
    positions = rows * wte.shape[1]
    return Cost(
        n, (2 * n + positions) * size + indices, 2 * n, (n + tables) * size + indices, n * size, tables * size
    )


def _sample(
    batch: int = 4, tokens: int = 256, vocab: int = 50304, width: int = 768, positions: int | None = None, **like
):
    """With a place for each token where `positions` says how many rows there are."""
    ids = torch.randint(vocab, (batch, tokens), device=like.get("device"))
    tables = torch.randn(vocab, width, **like), torch.randn(positions or tokens, width, **like)
    return ids, *tables, *(() if positions is None else (torch.randint(positions, ids.shape, device=ids.device),))


def _alloc(ids, wte, wpe, places, *, needs, start):
    return (wte.new_empty((*ids.shape, wte.shape[1])),), ()


@op(cost=_cost, sample=_sample, check=_check, alloc=_alloc, saved_for_backward=("ids", "wte", "wpe", "places"))
def embedding(
    ids: Tensor, wte: Tensor, wpe: Tensor | None = None, places: Tensor | None = None, *, start: int = 0
) -> Tensor:
    """Look up token rows and add the position rows from `start` on, or those of `places`.

    Args:
        ids: (B, T) int64 or int32.
        wte: (V, C) float32, bfloat16 or float16.
        wpe: (P, C) dtype of wte, or None.
        places: (B, T) int64 or int32, the position of each token; None: one after the other.
        start: position of the first token.
    Returns:
        (B, T, C), dtype of wte.
    Raises:
        ValueError: shapes, dtypes, devices or positions do not fit; on CPU also an id or a place out of range.
        NotImplementedError: a forced backend objects; the message says why.
    """
    rows = F.embedding(ids, wte)
    if wpe is None:
        return rows
    return rows + (wpe[start : start + ids.shape[1]] if places is None else F.embedding(places, wpe))
