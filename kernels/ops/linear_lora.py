"""Linear layer with a low-rank adapter, LoRA.

    z = s u A^T      y = x w^T + b + z B^T       u is x, or x after the adapter's dropout
    dz = s dy B      dx = dy w (+ dz A)      du = dz A      dA = dz^T u      dB = dy^T z

A layer may have several parts, each with an A and a B of its own and its own rows of y, such as those of the queries
and of the values: a has the A of all parts, one below the other, and so has b. z is saved, (..., P r). Hu et al. 2021,
"LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.kernels.core import check
from peakgpt.kernels.core.dispatch import Cost, op, short_lived


def parts(rows: Sequence[int] | None, out: int) -> list[tuple[int, int]]:
    """Return the first row of each part and the row after its last one; None: one part of all `out` rows."""
    return [(0, out)] if rows is None else list(zip(rows[::2], rows[1::2], strict=True))


def split(rows: Sequence[int] | None, z: Tensor, b: Tensor, out: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield the rows of y of each part, its columns of z, (N, P r), and its B."""
    r, first = b.shape[1], 0
    for i, (begin, end) in enumerate(parts(rows, out)):
        yield slice(begin, end), z[:, i * r : (i + 1) * r], b[first : first + end - begin]
        first += end - begin


def _check(x, w, b, lora_a, lora_b, dropped, *, scale, rows):
    width, out = check.width("linear_lora", "x", x), w.shape[0]
    check.shape("linear_lora", "w", w, None, width)
    check.shape("linear_lora", "b", b, out)
    ranges = parts(rows, out) if rows is None or (rows and len(rows) % 2 == 0) else [(1, 0)]
    ends = [0, *(end for _, end in ranges)]
    if any(not last <= begin <= end for last, (begin, end) in zip(ends, ranges, strict=False)) or ends[-1] > out:
        raise ValueError(f"linear_lora: rows is {tuple(rows)}, expected the first row of each part and the row after "
                         f"its last one, in order, up to {out}")  # fmt: skip
    check.shape("linear_lora", "lora_b", lora_b, sum(end - begin for begin, end in ranges), None)
    check.shape("linear_lora", "lora_a", lora_a, len(ranges) * lora_b.shape[1], width)
    check.shape("linear_lora", "dropped", dropped, *x.shape)
    check.same("linear_lora", "x", x, w=w, b=b, lora_a=lora_a, lora_b=lora_b, dropped=dropped)


def _cost(x, w, b, lora_a, lora_b, dropped=None, **_):
    """2 FLOPs per weight and token, twice that backward. Moves every operand once, and writes z for backward."""
    tokens, size = x.numel() // x.shape[-1], x.element_size()
    weights, bias = w.numel() + lora_a.numel() + lora_b.numel(), 0 if b is None else b.numel()
    inputs, out, z = x.numel() * (1 if dropped is None else 2), tokens * w.shape[0], tokens * lora_a.shape[0]
    operands = inputs + weights + bias  # and their gradients
    return Cost(
        2 * tokens * weights, (operands + out) * size,
        4 * tokens * weights, (out + inputs + weights + z + operands + z) * size, out * size, (operands + z) * size,
    )  # fmt: skip


def _sample(rows: int = 1024, width: int = 768, out: int = 2304, rank: int = 16, parts: int = 1, taken: int = 0,
            dropout: bool = False, **like):  # fmt: skip
    """`taken` is the number of rows of all parts, 0 for all rows."""
    x, w = torch.randn(rows, width, **like), torch.randn(out, width, **like) * width**-0.5
    lora_a, lora_b = torch.randn(parts * rank, width, **like), torch.randn(taken or out, rank, **like)
    dropped = x * (torch.arange(width, device=x.device) % 2 * 2) if dropout else None
    return x, w, torch.randn(out, **like), lora_a * width**-0.5, lora_b * rank**-0.5, dropped


def _alloc(x, w, b, lora_a, lora_b, dropped, *, needs, scale, rows):
    shape, is_training = (*x.shape[:-1], w.shape[0]), any(needs)
    saved = (x.new_empty(*x.shape[:-1], lora_a.shape[0]),) if is_training else ()
    return (short_lived(x, *shape) if is_training else x.new_empty(shape),), saved


@op(
    cost=_cost, sample=_sample, check=_check, alloc=_alloc, typical={"scale": 2.0},
    saved_for_backward=("x", "w", "lora_a", "lora_b", "dropped"), strided=("x", "w", "out"), autocast="lower",
)  # fmt: skip
def linear_lora(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    dropped: Tensor | None = None,
    *,
    scale: float,
    rows: tuple[int, ...] | None = None,
) -> Tensor:
    """Multiply the last axis of x by a weight, and by the product of two low-rank matrices; add both, and a bias.

    Args:
        x: (..., C) float32, bfloat16 or float16.
        w: (F, C), dtype of x, as F.linear takes it; any strides; copied if none is 1.
        b: (F,) or None.
        lora_a: (P r, C), A of each of P parts.
        lora_b: (rows of all parts, r), B of each.
        dropped: (..., C), x after the adapter's dropout; None: x.
        scale: s.
        rows: for each part its first row of F and the row after its last one, in order; None is one part of all rows.
    Returns:
        (..., F), dtype of x.
    Raises:
        ValueError: shapes, dtypes, devices or rows do not fit.
        NotImplementedError: the forced backend does not support the call; the message says why.
    """
    y = F.linear(x, w, b)
    z = F.linear(x if dropped is None else dropped, lora_a) * scale
    pieces, at = [], 0
    for part, part_z, part_b in split(rows, z.flatten(0, -2), lora_b, w.shape[0]):
        product = F.linear(part_z, part_b).unflatten(0, z.shape[:-1])
        pieces += [y[..., at : part.start], y[..., part] + product]
        at = part.stop
    return torch.cat([*pieces, y[..., at:]], -1)
