"""Embedding on the CPU: csrc/ops/embedding.cpp. The backward pass sorts the ids, so that one thread sums each row."""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import _C, DTYPES, dtype_objection, rows, threads


def objection(ids: Tensor, wte: Tensor, wpe: Tensor | None, positions: Tensor | None, **_) -> str | None:
    return dtype_objection(wte) if positions is None else "takes consecutive positions, got a tensor of positions"


def forward(outputs, saved, ids, wte, wpe, positions, *, start):
    ids, wte = ids.long(), rows(wte)
    batch, tokens = ids.shape
    wpe = None if wpe is None else rows(wpe)[start : start + tokens]
    _C.embedding_forward(
        dtype=DTYPES[wte.dtype],
        batch=batch,
        tokens=tokens,
        width=wte.shape[1],
        ids=ids,
        wte=wte,
        wte_stride=wte.stride(0),
        out=outputs[0],
        wpe=wpe,
        wpe_stride=0 if wpe is None else wpe.stride(0),
        threads=threads(),
    )


def backward(grads, inputs, outputs, saved, needs, *, start, into=(None,) * 4):
    ids, wte, wpe, _ = inputs
    ids, dy = ids.long(), grads[0]
    batch, tokens = ids.shape
    dwte, dwpe = (
        buffer if buffer is not None or not need else torch.zeros(t.shape, dtype=t.dtype, device=t.device)
        for t, need, buffer in zip((wte, wpe), needs[1:3], into[1:3], strict=True)
    )
    _C.embedding_backward(
        dtype=DTYPES[dy.dtype],
        batch=batch,
        tokens=tokens,
        width=wte.shape[1],
        ids=ids,
        dy=dy,
        dwte=dwte,
        dwpe=None if dwpe is None else dwpe[start : start + tokens],
        threads=threads(),
    )
    return None, dwte, dwpe, None
