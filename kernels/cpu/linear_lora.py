"""Linear layer with a low-rank adapter on the CPU: the products of csrc/gemm/gemm.cpp, added in their epilogues."""

from __future__ import annotations

from torch import Tensor

from peakgpt.kernels.cpu import low_rank
from peakgpt.kernels.cpu.ext import dtype_objection
from peakgpt.kernels.cpu.ext import rows as flat_rows
from peakgpt.kernels.cpu.gemm import ADD, gemm, linear_backward


def objection(x: Tensor, *_, **__) -> str | None:
    return dtype_objection(x)


def forward(outputs, saved, x, w, b, lora_a, lora_b, dropped, *, scale, rows):
    flat = flat_rows(x)
    y = gemm(flat, w.t(), outputs[0].view(flat.shape[0], w.shape[0]), bias=b)
    z = low_rank.project(flat if dropped is None else flat_rows(dropped), lora_a, scale, saved[0] if saved else None)
    low_rank.add_product(y, z, lora_b, rows)


def backward(grads, inputs, outputs, saved, needs, *, scale, rows, into=(None,) * 6):
    x, w, _, lora_a, lora_b, dropped = inputs
    dy, flat, (z,) = flat_rows(grads[0]), flat_rows(x), saved
    u = flat if dropped is None else flat_rows(dropped)
    dx, dw, db = linear_backward(dy, flat, w, needs[:3], into[:3])
    dz, da, dlora_b = low_rank.backward(
        dy, u, z.view(len(flat), len(lora_a)), lora_a, lora_b, scale, rows, needs[3:5], into[3:5]
    )
    du = None
    if dropped is not None and needs[5]:
        du = gemm(dz, lora_a, u.new_empty(u.shape)).view(x.shape)
    elif dropped is None and dx is not None:
        gemm(dz, lora_a, dx, epilogue=ADD)
    return None if dx is None else dx.view(x.shape), dw, db, da, dlora_b, du

