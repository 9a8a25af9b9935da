"""Linear layer with a low-rank adapter on the GPU: cuBLAS through torch, whose epilogues add the low-rank products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peakgpt.kernels.gpu import launch
from peakgpt.kernels.gpu.gemm.linear import linear_out
from peakgpt.kernels.ops.linear_lora import split


def objection(x: Tensor, w: Tensor, *_, **__) -> str | None:
    return launch.objection(x, w)


def forward(outputs, saved, x, w, b, lora_a, lora_b, dropped, *, scale, rows):
    flat = x.reshape(-1, x.shape[-1])
    y = outputs[0].view(-1, w.shape[0])
    linear_out(flat, w, b, y)
    z = y.new_empty(len(y), len(lora_a)) if not saved else saved[0].view(len(y), len(lora_a))
    torch.mm(flat if dropped is None else dropped.reshape(flat.shape), lora_a.t(), out=z).mul_(scale)
    for part, part_z, part_b in split(rows, z, lora_b, w.shape[0]):
        y[:, part].addmm_(part_z, part_b.t())


def backward(grads, inputs, outputs, saved, needs, *, scale, rows):
    x, w, _, lora_a, lora_b, dropped = inputs
    need_x, need_w, need_b, need_lora_a, need_lora_b, need_dropped = needs
    dy, flat = grads[0].reshape(-1, w.shape[0]), x.reshape(-1, x.shape[-1])
    z = saved[0].view(len(dy), len(lora_a))
    dz, dlora_b = _gradients(dy, z, lora_b, scale, rows)
    u = flat if dropped is None else dropped.reshape(flat.shape)
    dx = dy @ w if need_x else None
    if need_x and dropped is None:
        dx.addmm_(dz, lora_a)
    return (
        dx.view(x.shape) if need_x else None,
        torch.mm(dy.t(), flat, out=torch.empty_like(w)) if need_w else None,
        dy.sum(0) if need_b else None,
        dz.t() @ u if need_lora_a else None,
        dlora_b if need_lora_b else None,
        (dz @ lora_a).view(x.shape) if need_dropped else None,
    )


def _gradients(dy: Tensor, z: Tensor, b: Tensor, scale: float, rows: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of x A^T, which is z / scale, and of B."""
    dz, db = torch.empty_like(z), torch.empty_like(b)
    grads = zip(split(rows, dz, b, dy.shape[1]), split(rows, z, db, dy.shape[1]), strict=True)
    for (part, part_dz, part_b), (_, part_z, part_db) in grads:
        torch.mm(dy[:, part], part_b, out=part_dz)
        torch.mm(dy[:, part].t(), part_z, out=part_db)
    return dz.mul_(scale), db
