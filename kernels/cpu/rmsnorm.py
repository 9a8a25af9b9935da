"""RMSNorm on the CPU: csrc/layernorm.cpp without the mean."""

from __future__ import annotations

from torch import Tensor

from peakgpt.kernels.cpu import layernorm


def objection(x: Tensor, w: Tensor, **_) -> str | None:
    return layernorm.objection(x, w, None)


def forward(outputs, saved, x, w, *, eps):
    layernorm.normalise(x, None, w, None, None, outputs[0], (None, *saved), eps)


def backward(grads, inputs, outputs, saved, needs, *, eps):
    x, w = inputs
    return layernorm.gradients(grads[0], None, x, w, (None, *saved), (*needs, False))[:2]
