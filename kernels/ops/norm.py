"""LayerNorm and RMSNorm, each also with a residual addition in the same pass over memory.

LayerNorm: normalize each row, then scale and shift.

    mu = mean(x)    r = 1 / sqrt(mean((x - mu)^2) + eps)    z = (x - mu) * r
    y  = z * w + b
    dx = r * (g - mean(g) - z * mean(g * z))    where g = dy * w
    dw = sum_rows(dy * z)      db = sum_rows(dy)

RMSNorm: scale each row to a root mean square of 1, then by a weight, to which a constant may be added.

    r  = 1 / sqrt(mean(x^2) + eps)      z = x * r      y = z * (offset + w)
    dx = r * (g - z * mean(g * z))      dw = sum_rows(dy * z)      where g = dy * (offset + w)

Ba, Kiros, Hinton 2016, "Layer Normalization", arXiv:1607.06450, eq. 3-4. Zhang, Sennrich 2019, "Root Mean Square Layer
Normalization", arXiv:1910.07467, eq. 4, with eps inside the root as in LayerNorm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.kernels.core import check
from peakgpt.kernels.core.dispatch import Cost, op, short_lived


def _check(name: str, x: Tensor, residual: Tensor | None, w: Tensor, b: Tensor | None) -> None:
    check.shape(name, "w", w, check.width(name, "x", x))
    if residual is not None:
        check.shape(name, "residual", residual, *x.shape)
        check.same(name, "x", x, residual=residual)
    if b is None:
        check.same(name, "x", x, mixed=True, w=w)
    else:
        check.shape(name, "b", b, x.shape[-1])
        check.same(name, "x", x, mixed=True, w=w, b=b)


def _cost(
    x: Tensor, w: Tensor, b: Tensor | None, *, statistics: int, flops: int, backward_flops: int, added: bool
) -> Cost:
    """Count one call.

    `flops` are per element, `statistics` are float32 numbers per row. Forward reads x and writes y, backward reads x
    and dy and writes dx. With a residual each pass reads one tensor more, and forward writes one more.
    """
    n, moved = x.numel(), x.numel() * x.element_size()
    parameters = sum(t.numel() * t.element_size() for t in (w, b) if t is not None)
    weight, saved = w.numel() * w.element_size(), statistics * 4 * (n // x.shape[-1])
    backward_written = moved + parameters + saved
    return Cost(
        flops * n, (4 if added else 2) * moved + parameters, backward_flops * n,
        (3 if added else 2) * moved + weight + saved + backward_written,
        (2 if added else 1) * moved, backward_written,
    )  # fmt: skip


def _sample(rows: int = 1024, width: int = 768, **like):
    """Inputs with mean 3: an input with mean 0 would hide a wrong mean."""
    return 3 + torch.randn(rows, width, **like), torch.randn(width, **like), torch.randn(width, **like)


def _sample_add(rows: int = 1024, width: int = 768, **like):
    x, w, b = _sample(rows, width, **like)
    return x, torch.randn(rows, width, **like), w, b


def _restore_add(inputs, outputs):
    """The gradients are those of x = sum and residual = 0."""
    return outputs[0], torch.zeros_like(outputs[0]), *inputs[2:]


def _statistic(x: Tensor) -> Tensor:
    """A float32 number per row."""
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _layernorm(x: Tensor, w: Tensor, b: Tensor | None, eps: float) -> Tensor:
    # torch supports a wider w only if b has its dtype, and only on CPU. Computing in float32 works everywhere.
    if w.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return F.layer_norm(x.float(), x.shape[-1:], w, None if b is None else b.float(), eps).to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], w, b, eps)


def default_eps(dtype: torch.dtype, eps: float | None) -> float:
    """eps, or the machine epsilon of the dtype in which RMSNorm computes: float32 for narrower inputs, as in torch."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps if eps is None else eps


def rms_normalize(x: Tensor, w: Tensor, eps: float | None, offset: float) -> Tensor:
    """RMSNorm in at least float32, rounded once to the dtype of x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    w = w.to(wide) + offset if offset else w.to(wide)
    return F.rms_norm(x.to(wide), x.shape[-1:], w, default_eps(x.dtype, eps)).to(x.dtype)


@op(
    check=lambda x, w, b, *, eps: _check("layernorm", x, None, w, b),
    cost=lambda x, w, b=None, **_: _cost(x, w, b, statistics=2, flops=8, backward_flops=14, added=False),
    sample=_sample,
    alloc=lambda x, w, b, *, needs, eps: ((short_lived(x, *x.shape),), (_statistic(x), _statistic(x))),
    saved_for_backward=("x", "w"),
    strided=("x", "out"),
    autocast="norm",
)
def layernorm(x: Tensor, w: Tensor, b: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Normalize the last axis of x to mean 0 and variance 1, then scale by w and shift by b.

    Args:
        x: (..., C) float32, bfloat16 or float16, any strides.
        w, b: (C,) dtype of x, or float32.
        eps: added to the variance.
    Returns:
        (..., C), dtype of x. Fused backends compute the statistics in float32.
    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        NotImplementedError: the forced backend does not support the call; the message says why.
    """
    return _layernorm(x, w, b, eps)


@op(
    check=lambda x, w, **_: _check("rmsnorm", x, None, w, None),
    cost=lambda x, w, **_: _cost(x, w, None, statistics=1, flops=4, backward_flops=9, added=False),
    sample=lambda rows=1024, width=768, **like: _sample(rows, width, **like)[:2],
    alloc=lambda x, *_, **__: ((_empty(x),), (_statistic(x),)),
    saved_for_backward=("x", "w"),
    strided=("x", "out"),
    autocast="norm",
)
def rmsnorm(x: Tensor, w: Tensor, *, eps: float | None = None, offset: float = 0.0) -> Tensor:
    """Scale the last axis of x to a root mean square of 1, then by offset + w.

    Args:
        x: (..., C) float32, bfloat16 or float16, any strides.
        w: (C,) dtype of x, or float32.
        eps: added to the mean square. Default: `default_eps`, as in F.rms_norm.
        offset: added to w, in float32.
    Returns:
        (..., C), dtype of x. Computed in float32, rounded once: code that also rounds before the product with w differs
        in the last bit.
    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        NotImplementedError: the forced backend does not support the call; the message says why.
    """
    return rms_normalize(x, w, eps, offset)


@op(
    check=lambda x, residual, w, b, *, eps: _check("add_layernorm", x, residual, w, b),
    cost=lambda x, residual, w, b=None, **_: _cost(x, w, b, statistics=2, flops=9, backward_flops=15, added=True),
    sample=_sample_add,
    alloc=lambda x, residual, w, b, *, needs, eps: (
        (_empty(x), short_lived(x, *x.shape)),
        (_statistic(x), _statistic(x)),
    ),
    saved_for_backward=("w", "sum"),
    restore=_restore_add,
    strided=("x", "residual", "sum", "normed"),
    outputs=("sum", "normed"),
    autocast="norm",
)
def add_layernorm(
    x: Tensor, residual: Tensor, w: Tensor, b: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add the residual to x and apply LayerNorm to the sum, in one pass over memory.

    Args:
        x, residual: (..., C) float32, bfloat16 or float16, same shape and dtype, any strides.
        w, b: (C,) dtype of x, or float32.
        eps: added to the variance.
    Returns:
        (sum, normed): both (..., C), dtype of x. normed is computed from the sum rounded to that dtype.
    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        NotImplementedError: the forced backend does not support the call; the message says why.
    """
    total = x + residual
    return total, _layernorm(total, w, b, eps)


@op(
    check=lambda x, residual, w, **_: _check("add_rmsnorm", x, residual, w, None),
    cost=lambda x, residual, w, **_: _cost(x, w, None, statistics=1, flops=5, backward_flops=10, added=True),
    sample=lambda rows=1024, width=768, **like: _sample_add(rows, width, **like)[:3],
    alloc=lambda x, *_, **__: ((_empty(x), _empty(x)), (_statistic(x),)),
    saved_for_backward=("w", "sum"),
    restore=_restore_add,
    strided=("x", "residual", "sum", "normed"),
    outputs=("sum", "normed"),
    autocast="norm",
)
def add_rmsnorm(
    x: Tensor, residual: Tensor, w: Tensor, *, eps: float | None = None, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Add the residual to x and apply RMSNorm to the sum, in one pass over memory.

    Args:
        x, residual: (..., C) float32, bfloat16 or float16, same shape and dtype, any strides.
        w: (C,) dtype of x, or float32.
        eps: added to the mean square. Default: `default_eps`, as in F.rms_norm.
        offset: added to w, in float32.
    Returns:
        (sum, normed): both (..., C), dtype of x. normed is computed from the sum rounded to that dtype.
    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        NotImplementedError: the forced backend does not support the call; the message says why.
    """
    total = x + residual
    return total, rms_normalize(total, w, eps, offset)
