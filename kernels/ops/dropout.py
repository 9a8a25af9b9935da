"""Dropout: zero each element with probability p, scale the others by 1 / (1 - p).

    y = m x      dx = m dy      m = 0 or 1 / (1 - p)

The mask is a function of a seed: only the seed is saved for backward, and a recomputed forward gets the same mask.
Element n, in contiguous order, is kept if word (n / 16) % 4 of Philox with counter n / 64 * 16 + n % 16 is at least
p * 2^32. 16 consecutive elements fill whole vector registers on every machine. Srivastava, Hinton, Krizhevsky,
Sutskever, Salakhutdinov 2014, "Dropout", JMLR 15:1929-1958.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.kernels.core import check
from peakgpt.kernels.core.dispatch import Cost, op
from peakgpt.kernels.ops.philox import philox

LANES, WORDS = 16, 4


def keep_mask(seed: Tensor, p: float, count: int) -> Tensor:
    """Mask of the elements that dropout keeps: bool (count,)."""
    counter = torch.arange(-(-count // (LANES * WORDS)) * LANES, device=seed.device)
    words = torch.stack(philox((counter & 0xFFFFFFFF, counter >> 32, 0, 0), seed.long()), 0)
    return words.view(WORDS, -1, LANES).transpose(0, 1).flatten()[:count] >= int(p * 2**32)


def _check(x, seed, *, p):
    check.same("dropout", "x", x)
    check.integers("dropout", "seed", seed, x.device)
    check.shape("dropout", "seed", seed, 1)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout: p is {p}, expected 0 <= p < 1")


def _cost(x, seed=None, **_):
    """1 FLOP per element, forward and backward. Reads and writes one tensor of x's size."""
    moved = x.numel() * x.element_size()
    return Cost(x.numel(), 2 * moved, x.numel(), 2 * moved, moved, moved)


def _sample(rows: int = 1024, width: int = 768, **like):
    return torch.randn(rows, width, **like), torch.full((1,), 7, dtype=torch.int64, device=like.get("device"))


def _alloc(x, seed, *, needs, p):
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device),), ()


@op(
    cost=_cost, sample=_sample, typical={"p": 0.1}, check=_check, alloc=_alloc, saved_for_backward=("seed",),
    random_param="p",
)  # fmt: skip
def dropout(x: Tensor, seed: Tensor | None = None, *, p: float) -> Tensor:
    """Zero elements of x at random.

    Args:
        x: any shape, float32, bfloat16 or float16, any strides.
        seed: (1,) int64. Default: drawn from torch's generator. With one seed all backends drop the same elements.
            Without a seed the eager backend uses torch's dropout.
        p: probability of dropping an element, from 0 to below 1.
    Returns:
        Shape and dtype of x.
    Raises:
        ValueError: shapes, dtypes, devices or p do not fit.
        NotImplementedError: the forced backend does not support the call; the message says why.
    """
    if seed is None:
        return F.dropout(x, p)
    return x * (keep_mask(seed, p, x.numel()).view(x.shape).to(x.dtype) / (1 - p))
