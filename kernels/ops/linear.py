"""Linear layer: multiply by a weight and add a bias.

    y = x w^T + b      dx = dy w      dw = dy^T x      db = sum_rows(dy)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.kernels.core import check
from peakgpt.kernels.core.dispatch import Cost, op, short_lived


def _check(x, w, b):
    check.shape("linear", "w", w, None, check.width("linear", "x", x))
    check.shape("linear", "b", b, w.shape[0])
    check.same("linear", "x", x, w=w, b=b)


def _cost(x, w, b):
    """2 FLOPs per weight and token, twice that backward. Moves every operand once."""
    tokens, size = x.numel() // x.shape[-1], x.element_size()
    out, bias = tokens * w.shape[0], 0 if b is None else b.numel()
    operands = x.numel() + w.numel() + bias  # and their gradients
    return Cost(
        2 * tokens * w.numel(), (operands + out) * size,
        4 * tokens * w.numel(), (out + x.numel() + w.numel() + operands) * size,
        out * size, operands * size,
    )  # fmt: skip


def _sample(rows: int = 1024, width: int = 768, out: int = 2304, **like):
    w = torch.randn(out, width, **like) * width**-0.5
    return torch.randn(rows, width, **like), w, torch.randn(out, **like)


def _alloc(x, w, b, *, needs):
    shape = (*x.shape[:-1], w.shape[0])
    return (short_lived(x, *shape) if any(needs) else x.new_empty(shape),), ()


@op(
    cost=_cost, sample=_sample, check=_check, alloc=_alloc, saved_for_backward=("x", "w"), strided=("x", "w", "out"),
    autocast="lower",
)  # fmt: skip
def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Multiply the last axis of x by a weight and add a bias.

    Args:
        x: (..., C) float32, bfloat16 or float16.
        w: (F, C), dtype of x, as F.linear takes it; any strides; copied if none is 1 (Conv1D passes `w.t()`).
        b: (F,) or None.
    Returns:
        (..., F), dtype of x. The weight's gradient has the weight's strides.
    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        NotImplementedError: the forced backend does not support the call; the message says why.
    """
    return F.linear(x, w, b)
