"""RMSNorm of queries and keys and their rotary embedding, in one pass over a packed projection.

    r = 1 / sqrt(mean(x^2) + eps)     z = x r     n = z (offset + w)     y = rotary(n)
    dn = rotary^-1(dy)     g = dn (offset + w)     dx = r (g - z mean(g z))     dw = sum(dn z)

Each head has a mean of its own, and all query heads share one weight (D,), as all key heads do. Or all query heads of a
token have one mean and a weight (H D,) together, and so have all its key heads. dw sums over the tokens, and over the
heads that share the weight.

Henry et al. 2020, "Query-Key Normalization for Transformers", arXiv:2010.04245; with a learned weight for each feature:
Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters", arXiv:2302.05442, section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.core import check
from peakgpt.kernels.core.dispatch import Cost, op
from peakgpt.kernels.ops.norm import rms_normalize
from peakgpt.kernels.ops.rotary import check_tables, rotary, sample_tables


def check_norms(op: str, name: str, x: Tensor, q_norm: Tensor, k_norm: Tensor, n_head: int, n_kv_head: int) -> None:
    """Check the weights of both norms for x (B, T, N, D), the argument `name` of `op`."""
    width = x.shape[3]
    got, expected = [tuple(w.shape) for w in (q_norm, k_norm)], [(n_head * width,), (n_kv_head * width,)]
    if got not in ([(width,), (width,)], expected):
        raise ValueError(
            f"{op}: q_norm and k_norm have shapes {got[0]} and {got[1]}, expected ({width},) twice, or {expected[0]} "
            f"and {expected[1]}"
        )
    check.same(op, name, x, mixed=True, q_norm=q_norm, k_norm=k_norm)


def is_joint(q_norm: Tensor, k_norm: Tensor, head_dim: int) -> bool:
    """Whether all query heads of a token share one mean, and all its key heads: else each head has its own."""
    return q_norm.shape[0] != head_dim or k_norm.shape[0] != head_dim


def statistics(x: Tensor, q_norm: Tensor, k_norm: Tensor) -> Tensor:
    """Allocate r of the heads to normalize, (B, T, N, D): (B, T, N) float32, or (B, T, 2) for joint means."""
    batch, tokens, heads, width = x.shape
    return x.new_empty((batch, tokens, 2 if is_joint(q_norm, k_norm, width) else heads), dtype=torch.float32)


def sample_norms(kind: int, heads: int, kv_heads: int, head_dim: int, **like) -> tuple[Tensor, Tensor]:
    """Random weights: kind 1 for a mean of each head, 2 for joint means."""
    return tuple(torch.randn(head_dim * (n if kind == 2 else 1), **like) for n in (heads, kv_heads))


def _check(x, q_norm, k_norm, cos, sin, *, n_head, **_):
    check.shape("qk_norm", "x", x, None, None, None, None)
    if not 1 <= n_head < x.shape[2]:
        raise ValueError(f"qk_norm: n_head is {n_head}, expected 1 to {x.shape[2] - 1}: below the heads of x")
    check_norms("qk_norm", "x", x, q_norm, k_norm, n_head, x.shape[2] - n_head)
    check.both("qk_norm", "cos", cos, "sin", sin)
    if cos is not None:
        check_tables("qk_norm", "x", x, cos, sin)


def _cost(x, q_norm, k_norm, cos=None, sin=None, **_):
    """4 FLOPs per element forward and 9 backward, as in rmsnorm, and 3 per rotated feature. Moves x, y, dy, dx once."""
    moved, parameters = x.numel() * x.element_size(), sum(w.numel() * w.element_size() for w in (q_norm, k_norm))
    tables = 0 if cos is None else 2 * cos.numel() * cos.element_size()
    rotation = 0 if cos is None else 3 * x.numel() // x.shape[3] * 2 * cos.shape[1]
    saved = 4 * statistics(x, q_norm, k_norm).numel()
    backward_written = moved + parameters + saved
    return Cost(
        4 * x.numel() + rotation, 2 * moved + parameters + tables, 9 * x.numel() + rotation,
        2 * moved + parameters + tables + saved + backward_written, moved, backward_written,
    )  # fmt: skip


def _sample(
    batch: int = 4, tokens: int = 256, heads: int = 12, head_dim: int = 64, kv_heads: int | None = None,
    pairs: int | None = None, norms: int = 1, **like,
):  # fmt: skip
    """Return random inputs. `pairs` adds the rotary tables, `norms` is the kind of `sample_norms`."""
    kv_heads = kv_heads or heads
    x = torch.randn(batch, tokens, heads + kv_heads, head_dim, **like)
    tables = () if pairs is None else sample_tables(tokens, pairs, **like)
    return x, *sample_norms(norms, heads, kv_heads, head_dim, **like), *tables


def _alloc(x, q_norm, k_norm, *_, needs, **__):
    """Saves r."""
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device),), (statistics(x, q_norm, k_norm),)


def _normalize(x: Tensor, w: Tensor, eps: float | None, offset: float) -> Tensor:
    """RMSNorm of heads (B, T, N, D) with a weight (D,), or (N D,) for one mean of all heads."""
    rows = x if w.shape[0] == x.shape[3] else x.flatten(2)
    return rms_normalize(rows, w, eps, offset).view(x.shape)


@op(
    cost=_cost, sample=_sample, typical={"n_head": 12}, check=_check, alloc=_alloc,
    saved_for_backward=("x", "q_norm", "k_norm", "cos", "sin"), strided=("x", "out"),
)  # fmt: skip
def qk_norm(
    x: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, *,
    n_head: int, interleaved: bool = False, eps: float | None = None, offset: float = 0.0,
) -> Tensor:  # fmt: skip
    """Normalize queries and keys by RMSNorm, then rotate them as by `rotary`.

    Args:
        x: (B, T, H + K, D) float32, bfloat16 or float16, any strides: H query heads, then K key heads.
        q_norm, k_norm: weights, dtype of x, or float32: (D,) each to normalize each head by itself, or (H D,) and
            (K D,) to normalize all query heads of a token together, and all its key heads.
        cos, sin: (T, R / 2) dtype of x, or float32, as in `rotary`; both or neither. Fused backends give no gradient.
        n_head: H.
        interleaved: the layout of feature pairs, as in `rotary`.
        eps: added to the mean square. Default: `default_eps` of kernels/ops/norm.py.
        offset: added to the weights, in float32.
    Returns:
        (B, T, H + K, D), dtype of x, contiguous. Computed in float32, rounded once.
    Raises:
        ValueError: shapes, dtypes, devices or parameters do not fit.
        NotImplementedError: the forced backend does not support the call; the message says why.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    parts = zip(wide.split((n_head, x.shape[2] - n_head), 2), (q_norm, k_norm), strict=True)
    y = torch.cat([_normalize(part, w, eps, offset) for part, w in parts], 2)
    if cos is not None:
        y = rotary.eager(y, cos, sin, heads=x.shape[2], interleaved=interleaved)
    return y.to(x.dtype)
