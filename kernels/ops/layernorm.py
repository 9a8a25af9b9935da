"""LayerNorm: normalise each row, then scale and shift; plain, and with the residual added in the same pass.

    mu = mean(x)    r = 1 / sqrt(mean((x - mu)^2) + eps)    z = (x - mu) * r
    y  = z * w + b
    dx = r * (g - mean(g) - z * mean(g * z))    where g = dy * w
    dw = sum_rows(dy * z)      db = sum_rows(dy)

Ba, Kiros, Hinton 2016, "Layer Normalization", arXiv:1607.06450, eq. 3-4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.kernels.core import check
from peakgpt.kernels.core.dispatch import Cost, op, short_lived


def _check_norm(x, w, b, *, eps):
    check.shape("layernorm", "w", w, check.width("layernorm", "x", x))
    check.shape("layernorm", "b", b, x.shape[-1])
    check.same("layernorm", "x", x, mixed=True, w=w, b=b)


def _cost(x, w, b=None, **_):
    """8 FLOPs an element forward, 14 backward; forward reads x and writes y, backward reads x, dy and writes dx."""
    return norm_cost(x, w, b, statistics=2, flops=8, backward_flops=14, reads=1, writes=1, backward_reads=2)


def norm_cost(x, w, b, *, statistics, flops, backward_flops, reads, writes, backward_reads):
    """FLOPs an element and passes over tensors of x's size; backward writes dx. And the parameters and statistics."""
    n, moved = x.numel(), x.numel() * x.element_size()
    parameters = sum(t.numel() * t.element_size() for t in (w, b) if t is not None)
    weight, kept = w.numel() * w.element_size(), statistics * 4 * (n // x.shape[-1])
    written = moved + parameters + kept  # backward
    return Cost(
        flops * n, (reads + writes) * moved + parameters, backward_flops * n,
        backward_reads * moved + weight + kept + written, writes * moved, written,
    )  # fmt: skip


def _sample(rows: int = 1024, width: int = 768, **like):
    """Inputs off zero: a centred x hides a wrong mean."""
    return 3 + torch.randn(rows, width, **like), torch.randn(width, **like), torch.randn(width, **like)


def _alloc(x, w, b, *, needs, eps):
    return (short_lived(x, *x.shape),), _statistics(x)


def _statistics(x):
    """mu and r, float32, one of each a row."""
    return x.new_empty(x.shape[:-1], dtype=torch.float32), x.new_empty(x.shape[:-1], dtype=torch.float32)


@op(cost=_cost, sample=_sample, check=_check_norm, alloc=_alloc, saved_for_backward=("x", "w"), autocast="norm")
def layernorm(x: Tensor, w: Tensor, b: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Normalise the last axis of x.

    Args:
        x: (..., C) float32, bfloat16 or float16, any strides.
        w, b: (C,) dtype of x, or float32.
        eps: added to the variance; same unit as x squared.
    Returns:
        (..., C), dtype of x. Fused backends keep statistics in float32.
    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        NotImplementedError: a forced backend objects; the message says why.
    """
    return _norm(x, w, b, eps)


def _norm(x, w, b, eps):
    # torch takes x in a lower precision than w only when w and b agree, and only on CPU; anywhere this is exact enough.
    if w.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return F.layer_norm(x.float(), x.shape[-1:], w, None if b is None else b.float(), eps).to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], w, b, eps)


def _check_add(x, residual, w, b, *, eps):
    check.shape("add_layernorm", "residual", residual, *x.shape)
    check.shape("add_layernorm", "w", w, check.width("add_layernorm", "x", x))
    check.shape("add_layernorm", "b", b, x.shape[-1])
    check.same("add_layernorm", "x", x, residual=residual)
    check.same("add_layernorm", "x", x, mixed=True, w=w, b=b)


def _cost_add(x, residual, w, b=None, **_):
    """9 FLOPs an element forward, 15 backward; moves four tensors each way."""
    return norm_cost(x, w, b, statistics=2, flops=9, backward_flops=15, reads=2, writes=2, backward_reads=3)


def _sample_add(rows: int = 1024, width: int = 768, **like):
    x, w, b = _sample(rows, width, **like)
    return x, torch.randn(rows, width, **like), w, b


def _alloc_add(x, residual, w, b, *, needs, eps):
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return (total, short_lived(x, *x.shape)), _statistics(x)


@op(
    cost=_cost_add, sample=_sample_add, check=_check_add, alloc=_alloc_add,
    saved_for_backward=("w", "sum"), outputs=("sum", "normed"), autocast="norm",
)  # fmt: skip
def add_layernorm(
    x: Tensor, residual: Tensor, w: Tensor, b: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add the residual to x and normalise the sum, in one pass over memory.

    Args:
        x, residual: (..., C) float32, bfloat16 or float16, same shape and dtype, any strides.
        w, b: (C,) dtype of x, or float32.
        eps: added to the variance; same unit as x squared.
    Returns:
        (sum, normed): both (..., C), dtype of x; normed is taken from the sum as rounded to that dtype.
    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        NotImplementedError: a forced backend objects; the message says why.
    """
    total = x + residual
    return total, _norm(total, w, b, eps)
