"""Linear layer with weights of 4 bits on the CPU: csrc/gemm/quantized.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import dtype_objection
from peakgpt.kernels.cpu.linear_q8 import gradients, multiply, scale_objection
from peakgpt.kernels.ops.linear_quantized import input_width

NO_GRADIENT = ("scale",)


def objection(x: Tensor, w: Tensor, scale: Tensor, *_, **__) -> str | None:
    return scale_objection(scale, torch.bfloat16) or dtype_objection(x)


def forward(outputs, saved, x, w, scale, b, *, out, group, activation):
    multiply(4, outputs[0], x, w, scale, b, group, activation, saved)


def backward(grads, inputs, outputs, saved, needs, *, out, group, activation):
    x, w, scale, _ = inputs
    width = input_width(x, saved[0])
    dx, db = gradients(4, grads[0], width, saved[0], w, scale, (needs[0], needs[3]), group, activation)
    return dx, None, None, db
