"""AdamW: the update of one parameter in place, with gradient clipping. core/foreach.py runs it on many parameters.

    g = grad * min(1, max_norm / (norm + 1e-6))        t = step + 1
    m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2
    p = p (1 - lr * weight_decay) - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)       lr = lr * rate

Loshchilov, Hutter 2019, "Decoupled Weight Decay Regularization", arXiv:1711.05101, algorithm 2. With max_norm, the
device skips the whole update, including the step count, if norm is not finite.

A float32 master weight is stored as a bfloat16 parameter, its upper half, and an int16 remainder, its lower half:

    bits(master) = (bits(param) << 16) + remainder        param = master to nearest, ties away from zero

The master keeps all its bits and costs 2 bytes more than the parameter, not 4. Rounding to nearest even would give
remainders of +32768, which do not fit in int16. Kalamkar et al. 2020, "Optimizing Deep Learning Recommender Systems'
Training On CPU Cluster Architectures", arXiv:2005.04680, truncate (Split-SGD-BF16). Rounding halves the
distance between the parameter and its master.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.core import check
from peakgpt.kernels.core.dispatch import Cost, op

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split a float32 master into (bfloat16 parameter, int16 remainder). Every NaN gets remainder 0."""
    bits = torch.where(master.isnan(), torch.nan, master).view(torch.int32)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """Return the float32 master of a bfloat16 parameter and its int16 remainder, exactly.

    If the parameter was overwritten after the split, the master is within half a unit in the parameter's last place.
    This needs the clamp: zero plus a negative remainder would be the bits of NaN.
    """
    bits = param.view(torch.int16).to(torch.int32)
    magnitude = (((bits & 0x7FFF) << 16) + remainder).clamp_min(0)
    return (magnitude | ((bits & 0x8000) << 16)).view(torch.float32)


def _check(
    param, grad, remainder, exp_avg, exp_avg_sq, step, norm, rate, *, lr, beta1, beta2, eps, weight_decay, max_norm
):
    if param.dtype not in DTYPES:
        raise ValueError(f"adamw: param has dtype {param.dtype}, expected float32, bfloat16 or float64")
    for name, tensor in (("param", param), ("grad", grad), ("remainder", remainder), ("exp_avg", exp_avg),
                         ("exp_avg_sq", exp_avg_sq)):  # fmt: skip
        check.shape("adamw", name, tensor, *param.shape)
    check.contiguous("adamw", param=param, remainder=remainder, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    check.same("adamw", "param", param, grad=grad)
    check.same("adamw", "exp_avg", exp_avg, exp_avg_sq=exp_avg_sq, step=step, norm=norm, rate=rate)
    check.shape("adamw", "rate", rate)
    got = None if remainder is None else remainder.dtype
    expected = torch.int16 if param.dtype == torch.bfloat16 else None
    if got != expected:
        raise ValueError(f"adamw: remainder has dtype {got}, expected {expected} if param is {param.dtype}")
    if remainder is not None and remainder.device != param.device:
        raise ValueError(f"adamw: remainder is on {remainder.device}, expected param's device {param.device}")
    if (max_norm is None) != (norm is None):
        raise ValueError(f"adamw: max_norm is {max_norm} and norm is {norm}, expected both or neither")


def _cost(param, grad, remainder=None, exp_avg=None, exp_avg_sq=None, *_, **__):
    """15 FLOPs per element. Reads and writes param, remainder, m, v and step, reads grad."""
    n, state = param.numel(), (param, remainder, exp_avg, exp_avg_sq)
    written = n * sum(t.element_size() for t in state if t is not None) + 4
    return Cost(15 * n, 2 * written + n * grad.element_size(), 0, 0, written, 0)


def _sample(count: int = 1 << 24, **like):
    """A parameter with its gradient and the moments after 3 steps."""
    wide = {**like, "dtype": torch.float32}
    has_remainder = like.get("dtype") == torch.bfloat16
    param, remainder = split(torch.randn(count, **wide)) if has_remainder else (torch.randn(count, **like), None)
    moments = torch.randn(count, **wide) * 0.1, torch.rand(count, **wide) * 0.1
    return param, torch.randn(count, **like), remainder, *moments, torch.full((), 3.0, **wide), None


@op(
    cost=_cost, sample=_sample, typical={"lr": 1e-3}, check=_check,
    mutates=("param", "remainder", "exp_avg", "exp_avg_sq", "step"),
)  # fmt: skip
def adamw(
    param: Tensor,
    grad: Tensor,
    remainder: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    norm: Tensor | None = None,
    rate: Tensor | None = None,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    max_norm: float | None = None,
) -> None:
    """Update param, its remainder and moments in place by one AdamW step.

    Args:
        param, grad: one shape, float32 or bfloat16 (float64 with float64 state, eager only). All tensors that the
            op changes must be contiguous.
        remainder: int16, the lower half of the float32 master if param is bfloat16, else None. Shape of param, as are
            the moments.
        exp_avg, exp_avg_sq: float32 moments.
        step: () float32, number of updates so far; incremented.
        norm: () float32, global norm of all gradients; required with max_norm, else None.
        rate: () float32, factor on lr, read on the device: a CUDA graph can follow a learning rate schedule.
        lr, beta1, beta2, eps, weight_decay: as in torch.optim.AdamW.
        max_norm: scale the gradient down to this global norm if its norm is larger.
    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit.
        NotImplementedError: the forced backend does not support the call; the message says why.
    """
    lr = lr if rate is None else lr * rate
    wide = param if remainder is None else join(param, remainder)
    live = torch.ones_like(step, dtype=torch.bool) if norm is None else norm.isfinite()
    scale = 1.0 if norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    g = grad.to(exp_avg.dtype) * scale
    t = step + 1
    m = torch.lerp(exp_avg, g, 1 - beta1)
    v = beta2 * exp_avg_sq + (1 - beta2) * g * g
    update = m / ((v / (1 - beta2**t)).sqrt() + eps) * (lr / (1 - beta1**t))
    for old, new in ((exp_avg, m), (exp_avg_sq, v), (wide, wide * (1 - lr * weight_decay) - update), (step, t)):
        old.copy_(torch.where(live, new, old))
    if remainder is not None:
        for old, new in zip((param, remainder), split(wide), strict=True):
            old.copy_(new)
