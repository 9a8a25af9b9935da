"""RMSNorm: scale each row to a root mean square of one, then by a weight; plain, and with the residual added before.

    r  = 1 / sqrt(mean(x^2) + eps)      z = x * r      y = z * w
    dx = r * (g - z * mean(g * z))      where g = dy * w
    dw = sum_rows(dy * z)

Zhang, Sennrich 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467, eq. 4, with eps as LayerNorm has it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.kernels.core import check
from peakgpt.kernels.core.dispatch import op
from peakgpt.kernels.ops.layernorm import norm_cost


def _check(x, w, *, eps):
    check.shape("rmsnorm", "w", w, check.width("rmsnorm", "x", x))
    check.same("rmsnorm", "x", x, mixed=True, w=w)


def _cost(x, w, **_):
    """4 FLOPs an element forward, 9 backward; forward reads x and writes y, backward reads x, dy and writes dx."""
    return norm_cost(x, w, None, statistics=1, flops=4, backward_flops=9, reads=1, writes=1, backward_reads=2)


def _sample(rows: int = 1024, width: int = 768, **like):
    """Inputs off zero: a kernel that takes a mean out would pass on a centred x."""
    return 3 + torch.randn(rows, width, **like), torch.randn(width, **like)


def _alloc(x, w, *, needs, eps):
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device),), _statistic(x)


def _statistic(x):
    """r, float32, one a row."""
    return (x.new_empty(x.shape[:-1], dtype=torch.float32),)


@op(cost=_cost, sample=_sample, check=_check, alloc=_alloc, saved_for_backward=("x", "w"), autocast="norm")
def rmsnorm(x: Tensor, w: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Scale the last axis of x to a root mean square of one.

    Args:
        x: (..., C) float32, bfloat16 or float16, any strides.
        w: (C,) dtype of x, or float32.
        eps: added to the mean square; same unit as x squared.
    Returns:
        (..., C), dtype of x. Fused backends keep the statistic in float32 and round once.
    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        NotImplementedError: a forced backend objects; the message says why.
    """
    return _norm(x, w, eps)


def _norm(x, w, eps):
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), x.shape[-1:], w.to(wide), eps).to(x.dtype)


def _check_add(x, residual, w, *, eps):
    check.shape("add_rmsnorm", "residual", residual, *x.shape)
    check.shape("add_rmsnorm", "w", w, check.width("add_rmsnorm", "x", x))
    check.same("add_rmsnorm", "x", x, residual=residual)
    check.same("add_rmsnorm", "x", x, mixed=True, w=w)


def _cost_add(x, residual, w, **_):
    """5 FLOPs an element forward, 10 backward; moves four tensors each way."""
    return norm_cost(x, w, None, statistics=1, flops=5, backward_flops=10, reads=2, writes=2, backward_reads=3)


def _sample_add(rows: int = 1024, width: int = 768, **like):
    x, w = _sample(rows, width, **like)
    return x, torch.randn(rows, width, **like), w


def _alloc_add(x, residual, w, *, needs, eps):
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return (total, torch.empty_like(total)), _statistic(x)


@op(
    cost=_cost_add, sample=_sample_add, check=_check_add, alloc=_alloc_add,
    saved_for_backward=("w", "sum"), outputs=("sum", "normed"), autocast="norm",
)  # fmt: skip
def add_rmsnorm(x: Tensor, residual: Tensor, w: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Add the residual to x and normalise the sum, in one pass over memory.

    Args:
        x, residual: (..., C) float32, bfloat16 or float16, same shape and dtype, any strides.
        w: (C,) dtype of x, or float32.
        eps: added to the mean square; same unit as x squared.
    Returns:
        (sum, normed): both (..., C), dtype of x; normed is taken from the sum as rounded to that dtype.
    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        NotImplementedError: a forced backend objects; the message says why.
    """
    total = x + residual
    return total, _norm(total, w, eps)
