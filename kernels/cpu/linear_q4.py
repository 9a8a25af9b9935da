"""Linear layer with weights of 4 bits on the CPU: csrc/gemm/quantized.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import dtype_objection
from peakgpt.kernels.cpu.linear_q8 import multiply, scale_objection


def objection(x: Tensor, w: Tensor, scale: Tensor, *_, **__) -> str | None:
    return scale_objection(scale, torch.bfloat16) or dtype_objection(x)


def forward(outputs, saved, x, w, scale, b, *, out, group, activation):
    multiply(4, outputs[0], x, w, scale, b, group, activation)
