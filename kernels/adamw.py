"""AdamW over one flat buffer: every parameter of a group in one call, clipping folded in.

    g = grad * min(1, max_norm / (norm + 1e-6))        t = step + 1
    m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2
    p = p (1 - lr * weight_decay) - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

Loshchilov, Hutter 2019, "Decoupled Weight Decay Regularization", arXiv:1711.05101, algorithm 2. With max_norm the
whole update, the step count included, is skipped where norm is not finite, decided on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels import check
from peakgpt.kernels.dispatch import Cost, op


def _check(param, grad, master, exp_avg, exp_avg_sq, step, norm, *, lr, beta1, beta2, eps, weight_decay, max_norm):
    n = param.numel()
    for name, tensor in (("param", param), ("grad", grad), ("master", master), ("exp_avg", exp_avg),
                         ("exp_avg_sq", exp_avg_sq)):  # fmt: skip
        check.shape("adamw", name, tensor, n)
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"adamw: {name} has stride {tensor.stride()}, expected (1,)")
    check.same("adamw", "param", param, grad=grad)
    check.same("adamw", "exp_avg", exp_avg, exp_avg_sq=exp_avg_sq, master=master, step=step, norm=norm)
    if (max_norm is None) != (norm is None):
        raise ValueError(f"adamw: max_norm is {max_norm} and norm is {norm}, expected both or neither")


def _cost(param, grad, master=None, *_, **__):
    """15 FLOPs an element; reads and writes param (or master), m and v, reads grad, writes the low-precision copy;
    and the step."""
    n, size = param.numel(), param.element_size()
    written = n * (3 * 4 if master is None else 3 * 4 + size) + 4
    return Cost(15 * n, n * (3 * 4 + size) + 4 + written, 0, 0, written, 0)


def _sample(count: int = 1 << 24, **like):
    """A parameter with gradient, moments as after some steps, and, in a half precision, its float32 master."""
    param, wide = torch.randn(count, **like), {**like, "dtype": torch.float32}
    master = None if param.dtype == torch.float32 else param.float()
    moments = torch.randn(count, **wide) * 0.1, torch.rand(count, **wide) * 0.1
    return param, torch.randn(count, **like), master, *moments, torch.full((), 3.0, **wide), None


@op(
    cost=_cost, sample=_sample, typical={"lr": 1e-3}, check=_check,
    mutates=("param", "master", "exp_avg", "exp_avg_sq", "step"),
)  # fmt: skip
def adamw(
    param: Tensor,
    grad: Tensor,
    master: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    norm: Tensor | None = None,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    max_norm: float | None = None,
) -> None:
    """Update param, its master and moments in place by one AdamW step.

    Args:
        param, grad: (N,) contiguous, float32 or bfloat16.
        master: (N,) float32, the parameter at full precision; None where param is float32 itself.
        exp_avg, exp_avg_sq: (N,) float32 moments.
        step: () float32, updates made so far; incremented.
        norm: () float32, global norm of all gradients; given with max_norm and only then.
        lr, beta1, beta2, eps, weight_decay: as in torch.optim.AdamW.
        max_norm: the gradient is scaled down to this global norm.
    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit.
        NotImplementedError: a forced backend objects; the message says why.
    """
    wide = param if master is None else master
    live = torch.ones_like(step, dtype=torch.bool) if norm is None else norm.isfinite()
    scale = 1.0 if norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    g = grad.to(exp_avg.dtype) * scale
    t = step + 1
    m = torch.lerp(exp_avg, g, 1 - beta1)
    v = beta2 * exp_avg_sq + (1 - beta2) * g * g
    update = m / ((v / (1 - beta2**t)).sqrt() + eps) * (lr / (1 - beta1**t))
    for old, new in ((exp_avg, m), (exp_avg_sq, v), (wide, wide * (1 - lr * weight_decay) - update), (step, t)):
        old.copy_(torch.where(live, new, old))
    if master is not None:
        param.copy_(master)
