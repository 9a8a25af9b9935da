"""Linear layer with weights of 4 bits in Triton: the kernels of linear_grouped, with its levels and scales."""

from __future__ import annotations

from torch import Tensor

from peakgpt.kernels.gpu.gemm import linear_grouped

NO_GRADIENT = ("scale",)
LEVELS = {"bits": 4, "levels": "normal", "zero_points": False}


def objection(x: Tensor, w: Tensor, scale: Tensor, *_, **__) -> str | None:
    return linear_grouped.objection(x, w, scale)


def forward(outputs, saved, x, w, scale, b, **params):
    linear_grouped.forward(outputs, saved, x, w, scale, None, b, None, **LEVELS, **params)


def backward(grads, inputs, outputs, saved, needs, **params):
    x, w, scale, b = inputs
    inputs, needs = (x, w, scale, None, b, None), (needs[0], False, False, False, needs[3], False)
    dx, *_, db, _ = linear_grouped.backward(grads, inputs, outputs, saved, needs, **LEVELS, **params)
    return dx, None, None, db
