"""Embedding on the CPU: csrc/embedding.cpp; backward sorts the ids, so that each row has one owner."""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import _C, DTYPES, address, dtype_objection, rows, threads


def objection(ids: Tensor, wte: Tensor, wpe: Tensor | None, places: Tensor | None, **_) -> str | None:
    return dtype_objection(wte) if places is None else "takes consecutive positions only, got positions"


def forward(outputs, saved, ids, wte, wpe, places, *, start):
    ids, wte = ids.long().contiguous(), rows(wte)
    wpe = None if wpe is None else rows(wpe)[start : start + ids.shape[1]]
    _C.embedding_forward(
        DTYPES[wte.dtype], *ids.shape, wte.shape[1], address(ids), address(wte), wte.stride(0),
        address(wpe), 0 if wpe is None else wpe.stride(0), address(outputs[0]), 0, threads(),
    )  # fmt: skip


def backward(grads, inputs, outputs, saved, needs, *, start, into=(None,) * 4):
    ids, wte, wpe, _ = inputs
    ids, dy = ids.long().contiguous(), grads[0].contiguous()
    dwte, dwpe = (
        sink if sink is not None or not need else torch.zeros(t.shape, dtype=t.dtype, device=t.device)
        for t, need, sink in zip((wte, wpe), needs[1:3], into[1:3], strict=True)
    )
    positions = None if dwpe is None else dwpe[start : start + ids.shape[1]]
    _C.embedding_backward(
        DTYPES[dy.dtype], *ids.shape, wte.shape[1], address(ids), address(dy),
        address(dwte), address(positions), threads(),
    )  # fmt: skip
    return None, dwte, dwpe, None
