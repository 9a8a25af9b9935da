"""Linear cross-entropy: the head's product and the loss over the vocabulary, logits never at full size.

    z = x w^T      lse = log sum_v exp z_v      loss = lse - z_target
    dz = (exp(z - lse) - onehot(target)) * dloss      dx = dz w      dw = dz^T x

For a scalar loss the gradients of x and w are formed in the forward pass at dloss = 1 and only scaled in backward
(6 C V FLOPs a token); for reduction="none" the upstream gradient differs by token, so backward forms the logits
again from the kept lse (8 C V). Under no_grad neither is formed. Rows are processed in blocks; the idea is from
Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989, section 3.2, and Wijmans et al. 2024, "Cut Your Losses in
Large-Vocabulary Language Models", arXiv:2411.09009.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.kernels import check
from peakgpt.kernels.dispatch import Cost, op

REDUCTIONS = ("mean", "sum", "none")


def _check(x, w, target, *, ignore_index, reduction):
    if reduction not in REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction is {reduction!r}, expected one of {', '.join(REDUCTIONS)}")
    check.shape("linear_cross_entropy", "w", w, None, check.width("linear_cross_entropy", "x", x))
    check.shape("linear_cross_entropy", "target", target, *x.shape[:-1])
    check.same("linear_cross_entropy", "x", x, w=w)
    check.indices("linear_cross_entropy", "target", target, w.shape[0], x.device, ignore=ignore_index)


def _cost(x, w, target, *, reduction="mean", **_):
    """2 C V FLOPs a token forward and 4 C V for both gradients; every operand and gradient once, no logits."""
    tokens, operands = target.numel(), (x.numel() + w.numel()) * x.element_size()
    product, targets = 2 * tokens * w.numel(), tokens * target.element_size()
    loss, lse = (4 * tokens, 4 * tokens) if reduction == "none" else (4, 0)
    return Cost(product, operands + targets + loss, 2 * product, operands + lse, loss, operands + lse)


def _sample(rows: int = 1024, width: int = 768, vocab: int = 50304, **like):
    target = torch.randint(vocab, (rows,), device=like.get("device"))
    return torch.randn(rows, width, **like), torch.randn(vocab, width, **like) * width**-0.5, target


def _alloc(x, w, target, *, needs, ignore_index, reduction):
    """Kept: lse (float32, one a token) for "none"; for scalars dx and dw at dloss = 1, empty where not wanted.

    Those of float16 are kept in float32: at dloss = 1 no loss scaling protects them yet.
    """
    if reduction == "none":
        loss = x.new_empty(target.shape, dtype=torch.float32)
        return (loss,), (torch.empty_like(loss),) if any(needs) else ()
    loss = (x.new_empty((), dtype=torch.float32),)
    if not any(needs):
        return loss, ()
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    dx = x.new_empty(x.shape if needs[0] else 0, dtype=dtype)
    return loss, (dx, torch.empty_like(w, dtype=dtype) if needs[1] else w.new_empty(0, dtype=dtype))


@op(cost=_cost, sample=_sample, check=_check, alloc=_alloc, keeps=("x", "w", "target"), autocast="lower",
    early=lambda *, reduction, **_: () if reduction == "none" else ("w",))  # fmt: skip
def linear_cross_entropy(
    x: Tensor, w: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of the logits x w^T against target.

    Args:
        x: (..., C) float32, bfloat16 or float16.
        w: (V, C) the head's weight, dtype of x.
        target: (...) int64 or int32, already shifted.
        ignore_index: targets of this value give zero loss and no gradient, and do not count in the mean.
        reduction: "mean" over the targets that count, "sum", or "none".
    Returns:
        float32: a scalar, or (...) for "none". The mean over no targets is NaN, as in torch.
    Raises:
        ValueError: shapes, dtypes, devices or the reduction do not fit; on CPU also a target out of range.
        NotImplementedError: a forced backend objects; the message says why.
    """
    logits = F.linear(x, w)
    logits = logits.flatten(0, -2) if logits.dtype == torch.float64 else logits.flatten(0, -2).float()
    loss = F.cross_entropy(logits, target.flatten().long(), ignore_index=ignore_index, reduction=reduction)
    return loss.view(target.shape) if reduction == "none" else loss
