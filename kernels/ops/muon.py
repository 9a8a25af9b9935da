"""Muon: the update of one matrix in place, with gradient clipping. core/foreach.py runs it on many matrices.

    g = grad * min(1, max_norm / (norm + 1e-6))        m = momentum m + (1 - momentum) g
    u = momentum m + (1 - momentum) g  with nesterov, else m
    p = p (1 - lr * weight_decay) - lr * s * orthogonal(u)       lr = lr * rate

orthogonal(u) sets all singular values of u to about 1. From x = u / |u|, each Newton-Schulz step computes

    A = x x^T      x = (a I + b A + c A A) x        |u|: Frobenius norm

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", kellerjordan.github.io/posts/muon. The
default coefficients are theirs. They let 5 steps reach singular values of 0.7 to 1.2, not exactly 1.

s depends on the shape (M, N) of the matrix, as in torch.optim.Muon:

    original           sqrt(max(1, M / N))
    match_rms_adamw    0.2 sqrt(max(M, N)): the update has the root mean square of AdamW's, so both share lr and
                       weight_decay. Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv:2502.16982, eq. 4.

The products are in the dtype of the parameter; torch.optim.Muon computes them in bfloat16 for every dtype. A bfloat16
parameter has an int16 remainder, and a norm that is not finite skips the update, as in kernels/ops/adamw.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peakgpt.kernels.core import check
from peakgpt.kernels.core.dispatch import Cost, op
from peakgpt.kernels.ops.adamw import DTYPES, join, split

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5
EPS = 1e-7  # the least norm by which a matrix is divided, as in torch.optim.Muon
ADJUST_LR = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


def update_lr(lr: float, adjust_lr_fn: str, shape: torch.Size) -> float:
    """Return lr * s, the factor on the orthogonal update of a matrix of this shape."""
    return float(lr) * ADJUST_LR[adjust_lr_fn](*shape)


def orthogonalize(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Set the singular values of matrices to about 1.

    Args:
        x: (B, M, N) floating point.
        coefficients: (a, b, c).
        steps: of Newton-Schulz.
    Returns:
        (B, M, N), dtype of x.
    """
    a, b, c = coefficients
    is_wide = x.shape[1] <= x.shape[2]
    wide = torch.promote_types(x.dtype, torch.float32)
    x = (x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=wide).clamp_min(EPS)).to(x.dtype)
    for _ in range(steps):
        gram = x @ x.mT if is_wide else x.mT @ x
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, *((polynomial, x) if is_wide else (x, polynomial)), beta=a)
    return x


def _check(param, grad, remainder, momentum_buffer, norm, rate, *, lr, momentum, nesterov, weight_decay,
           ns_coefficients, ns_steps, adjust_lr_fn, max_norm):  # fmt: skip
    if param.dtype not in DTYPES:
        raise ValueError(f"muon: param has dtype {param.dtype}, expected float32, bfloat16 or float64")
    check.shape("muon", "param", param, None, None)
    for name, tensor in (("grad", grad), ("remainder", remainder), ("momentum_buffer", momentum_buffer)):
        check.shape("muon", name, tensor, *param.shape)
    check.contiguous("muon", param=param, remainder=remainder, momentum_buffer=momentum_buffer)
    check.same("muon", "param", param, grad=grad)
    check.same("muon", "momentum_buffer", momentum_buffer, norm=norm, rate=rate)
    check.shape("muon", "rate", rate)
    got = None if remainder is None else remainder.dtype
    expected = torch.int16 if param.dtype == torch.bfloat16 else None
    if got != expected:
        raise ValueError(f"muon: remainder has dtype {got}, expected {expected} if param is {param.dtype}")
    for name, tensor in (("remainder", remainder), ("momentum_buffer", momentum_buffer)):
        if tensor is not None and tensor.device != param.device:
            raise ValueError(f"muon: {name} is on {tensor.device}, expected param's device {param.device}")
    if (max_norm is None) != (norm is None):
        raise ValueError(f"muon: max_norm is {max_norm} and norm is {norm}, expected both or neither")
    if adjust_lr_fn not in ADJUST_LR:
        raise ValueError(f"muon: adjust_lr_fn is {adjust_lr_fn!r}, expected one of {', '.join(ADJUST_LR)}")
    if len(ns_coefficients) != 3 or ns_steps < 0:
        raise ValueError(f"muon: ns_coefficients are {ns_coefficients} and ns_steps is {ns_steps}, expected three "
                         "numbers and at least 0")  # fmt: skip


def _cost(param, grad, remainder=None, momentum_buffer=None, *_, ns_steps=NS_STEPS, **__):
    """The products of symmetric matrices count half. Reads and writes param, remainder and momentum, reads grad."""
    n, (side, depth) = param.numel(), sorted(param.shape)
    products = ns_steps * (side * side * depth + side**3 + 2 * side * side * depth)
    written = n * sum(t.element_size() for t in (param, remainder, momentum_buffer) if t is not None)
    return Cost(products + 12 * n, 2 * written + n * grad.element_size(), 0, 0, written, 0)


def _sample(rows: int = 768, columns: int = 3072, **like):
    """A parameter with its gradient and momentum."""
    wide = {**like, "dtype": torch.float32}
    has_remainder = like.get("dtype") == torch.bfloat16
    value = torch.randn(rows, columns, **wide) * 0.02
    param, remainder = split(value) if has_remainder else (value.to(like.get("dtype")), None)
    return param, torch.randn(rows, columns, **like), remainder, torch.randn(rows, columns, **wide)


@op(
    cost=_cost, sample=_sample, typical={"lr": 1e-2}, check=_check,
    mutates=("param", "remainder", "momentum_buffer"),
)  # fmt: skip
def muon(
    param: Tensor,
    grad: Tensor,
    remainder: Tensor | None,
    momentum_buffer: Tensor,
    norm: Tensor | None = None,
    rate: Tensor | None = None,
    *,
    lr: float,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.1,
    ns_coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
    ns_steps: int = NS_STEPS,
    adjust_lr_fn: str = "match_rms_adamw",
    max_norm: float | None = None,
) -> None:
    """Update param, its remainder and momentum in place by one Muon step.

    Args:
        param, grad: (M, N) float32 or bfloat16 (float64 with a float64 momentum, eager only). All tensors that the op
            changes must be contiguous.
        remainder: (M, N) int16, the lower half of the float32 master if param is bfloat16, else None.
        momentum_buffer: (M, N) float32.
        norm: () float32, global norm of all gradients; required with max_norm, else None.
        rate: () float32, factor on lr, read on the device: a CUDA graph can follow a learning rate schedule.
        lr, momentum, nesterov, weight_decay, ns_coefficients, ns_steps, adjust_lr_fn: as in torch.optim.Muon.
        max_norm: scale the gradient down to this global norm if its norm is larger.
    Raises:
        ValueError: shapes, dtypes, devices, strides or options do not fit.
        NotImplementedError: the forced backend does not support the call; the message says why.
    """
    rate = 1.0 if rate is None else rate
    wide = param if remainder is None else join(param, remainder)
    live = True if norm is None else norm.isfinite()
    scale = 1.0 if norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    g = grad.to(momentum_buffer.dtype) * scale
    m = torch.lerp(momentum_buffer, g, 1 - momentum)
    u = torch.lerp(g, m, momentum) if nesterov else m
    x = orthogonalize(u.to(param.dtype).unsqueeze(0), ns_coefficients, ns_steps).squeeze(0).to(wide.dtype)
    new = wide * (1 - rate * lr * weight_decay) - rate * update_lr(lr, adjust_lr_fn, param.shape) * x
    for old, value in ((momentum_buffer, m), (wide, new)):
        old.copy_(value if live is True else torch.where(live, value, old))
    if remainder is not None:
        for old, value in zip((param, remainder), split(wide), strict=True):
            old.copy_(value)
