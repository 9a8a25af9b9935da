"""Rotary position embedding: rotate pairs of features of each head by an angle proportional to the position.

    y1 = x1 cos - x2 sin      y2 = x2 cos + x1 sin      (x1, x2) the two features of pair i, of R / 2
    dx: the same with -sin

A pair is features (i, i + R / 2), or (2 i, 2 i + 1) if interleaved. Features from R on and the other heads are copied.
Su et al. 2021, "RoFormer", arXiv:2104.09864, eq. 34. RoFormer and GPT-J use interleaved pairs, GPT-NeoX uses halves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.core import check
from peakgpt.kernels.core.dispatch import Cost, op


def check_tables(op: str, name: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Check that the tables fit the tokens and the width of x (B, T, N, D), the argument `name` of `op`."""
    check.shape(op, "cos", cos, x.shape[1], None)
    check.shape(op, "sin", sin, *cos.shape)
    check.same(op, name, x, mixed=True, cos=cos, sin=sin)
    if 2 * cos.shape[1] > x.shape[3]:
        raise ValueError(f"{op}: cos has {cos.shape[1]} pairs, expected at most {x.shape[3] // 2} of D = {x.shape[3]}")


def _check(x, cos, sin, *, heads, interleaved):
    check.shape("rotary", "x", x, None, None, None, None)
    check_tables("rotary", "x", x, cos, sin)
    if not 0 <= heads <= x.shape[2]:
        raise ValueError(f"rotary: heads is {heads}, expected 0 to {x.shape[2]}")


def _cost(x, cos, sin, *, heads, **_):
    """3 FLOPs per rotated feature, forward and backward. Reads x and the tables, writes y."""
    flops = 3 * x.shape[0] * x.shape[1] * heads * 2 * cos.shape[1]
    tensor, tables = x.numel() * x.element_size(), 2 * cos.numel() * cos.element_size()
    return Cost(flops, 2 * tensor + tables, flops, 2 * tensor + tables, tensor, tensor)


def sample_tables(tokens: int, pairs: int, **like) -> tuple[Tensor, Tensor]:
    """cos and sin of random angles, (T, R / 2) float32."""
    angle = torch.rand(tokens, pairs, device=like.get("device")) * 6.3
    return angle.cos(), angle.sin()


def _sample(batch: int = 4, tokens: int = 256, heads: int = 36, head_dim: int = 64, pairs: int = 32, **like):
    return torch.randn(batch, tokens, heads, head_dim, **like), *sample_tables(tokens, pairs, **like)


def _alloc(x, cos, sin, *, needs, **_):
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device),), ()


@op(
    cost=_cost, sample=_sample, typical={"heads": 24}, check=_check, alloc=_alloc, saved_for_backward=("cos", "sin"),
    strided=("x", "out"),
)  # fmt: skip
def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, heads: int, interleaved: bool = False) -> Tensor:
    """Rotate the first heads of a packed projection (queries and keys) and copy the others (values).

    Args:
        x: (B, T, N, D) float32, bfloat16 or float16, any strides: H query heads, K key heads, K value heads.
        cos, sin: (T, R / 2) dtype of x, or float32: of the angle at each position. Fused backends give no gradient.
        heads: H + K, the number of heads to rotate.
        interleaved: a pair is two neighboring features, else two features R / 2 apart.
    Returns:
        (B, T, N, D), dtype of x, contiguous. Computed in float32, rounded once.
    Raises:
        ValueError: shapes, dtypes, devices or parameters do not fit.
        NotImplementedError: the forced backend does not support the call; the message says why.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = cos.shape[1]
    rotated, rest = x[:, :, :heads, : 2 * pairs].to(wide), x[:, :, :heads, 2 * pairs :]
    cos, sin = (table.to(wide)[:, None] for table in (cos, sin))  # (T, 1, R / 2)
    axis = -1 if interleaved else -2
    x1, x2 = rotated.unflatten(-1, (pairs, 2) if interleaved else (2, pairs)).unbind(axis)
    rotated = torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), axis).flatten(-2).to(x.dtype)
    return torch.cat((torch.cat((rotated, rest), -1), x[:, :, heads:]), 2)
