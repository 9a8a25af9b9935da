"""Sum of squares of a tensor, added to a running total: the global gradient norm without a device sync.

    total = total + sum_i x_i^2

Partial sums are added in a fixed order, so the result is the same from run to run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.core import check
from peakgpt.kernels.core.dispatch import Cost, op

PIECE = 1 << 20  # elements; limits the float32 copy of the eager function


def _check(x, total):
    check.shape("sum_of_squares", "total", total)
    check.same("sum_of_squares", "x", x)
    if total.device != x.device or total.dtype != torch.promote_types(x.dtype, torch.float32):
        raise ValueError(f"sum_of_squares: total is {total.dtype} on {total.device}, expected float32 on {x.device}")


def _cost(x, total):
    """2 FLOPs per element. Reads x once, reads and writes the total."""
    return Cost(2 * x.numel(), x.numel() * x.element_size() + 2 * total.element_size(), 0, 0, total.element_size(), 0)


def _sample(count: int = 1 << 24, **like):
    x = torch.randn(count, **like)
    return x, x.new_full((), 3.0, dtype=torch.promote_types(x.dtype, torch.float32))


@op(cost=_cost, sample=_sample, check=_check, mutates=("total",))
def sum_of_squares(x: Tensor, total: Tensor) -> None:
    """Add the squares of x to total, in place.

    Args:
        x: of any shape, float32, bfloat16 or float16.
        total: () float32 on x's device.
    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        NotImplementedError: the forced backend does not support the call; the message says why.
    """
    for piece in x.reshape(-1).split(PIECE):
        # Not vector_norm or dot: on CPUs they sum in one float32 chain, an error of 1 % after 124 million elements.
        total += piece.to(total.dtype).square().sum()
