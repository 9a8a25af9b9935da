"""Embedding on the CPU: csrc/ops/embedding.cpp. The backward pass sorts the ids, so that one thread sums each row.

A tensor of positions is a second lookup of ids, in the table of positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import _C, DTYPES, dtype_objection, rows, threads


def objection(ids: Tensor, wte: Tensor, *_, **__) -> str | None:
    return dtype_objection(wte)


def forward(outputs, saved, ids, wte, wpe, positions, *, start):
    (out,) = outputs
    consecutive = None if wpe is None or positions is not None else rows(wpe)[start : start + ids.shape[1]]
    _look_up(out, ids, rows(wte), consecutive)
    if wpe is not None and positions is not None:
        out += _look_up(torch.empty_like(out), positions, rows(wpe))


def backward(grads, inputs, outputs, saved, needs, *, start, into=(None,) * 4):
    ids, wte, wpe, positions = inputs
    dwte, dwpe = (
        buffer if buffer is not None or not need else torch.zeros(t.shape, dtype=t.dtype, device=t.device)
        for t, need, buffer in zip((wte, wpe), needs[1:3], into[1:3], strict=True)
    )
    consecutive = None if dwpe is None or positions is not None else dwpe[start : start + ids.shape[1]]
    _add_gradients(grads[0], ids, dwte, consecutive)
    if dwpe is not None and positions is not None:
        _add_gradients(grads[0], positions, dwpe)
    return None, dwte, dwpe, None


def _look_up(out: Tensor, ids: Tensor, table: Tensor, added: Tensor | None = None) -> Tensor:
    """Fill out (B, T, C) with the rows of a table, plus the rows (T, C) of `added`; return it."""
    batch, tokens = ids.shape
    _C.embedding_forward(
        dtype=DTYPES[table.dtype],
        batch=batch,
        tokens=tokens,
        width=table.shape[1],
        ids=ids.long(),
        wte=table,
        wte_stride=table.stride(0),
        out=out,
        wpe=added,
        wpe_stride=0 if added is None else added.stride(0),
        threads=threads(),
    )
    return out


def _add_gradients(dy: Tensor, ids: Tensor, dtable: Tensor | None, dadded: Tensor | None = None) -> None:
    """Add dy (B, T, C) to the rows of a table's gradient, and to `dadded`, (T, C)."""
    batch, tokens = ids.shape
    _C.embedding_backward(
        dtype=DTYPES[dy.dtype],
        batch=batch,
        tokens=tokens,
        width=dy.shape[2],
        ids=ids.long(),
        dy=dy,
        dwte=dtable,
        dwpe=dadded,
        threads=threads(),
    )
