"""Linear cross-entropy: the head's product and the loss over the vocabulary, logits never at full size.

    z = x w^T      m = max_v z_v      t = sum_v exp(z_v - m)      lse = m + log t      e = label_smoothing
    loss = log t - (z_target - m) + e (z_target - mean_v z_v) + z_loss lse^2
    dz   = dloss (exp(z - m) / t (1 + 2 z_loss lse) - (1 - e) onehot(target) - e / V)      dx = dz w      dw = dz^T x

m and t stay apart: their lse in float32 is off by half an ulp, 4e-6 for logits of 100, and all of exp(z - lse) with it.

With weights a token's loss is multiplied by its own, and the mean is over their sum. For a scalar loss the gradients of
x and w are formed in the forward pass at dloss = 1 and only scaled in backward (6 C V FLOPs a token); for
reduction="none" the upstream gradient differs by token, so backward forms the logits again, beside the kept m and t
(8 C V).
Under no_grad neither is formed. Rows are processed in blocks; the idea is from Hsu et al. 2024, "Liger Kernel",
arXiv:2410.10989, section 3.2, and Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models",
arXiv:2411.09009. The z-loss is Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, section 5; label smoothing Szegedy et
al. 2015, "Rethinking the Inception Architecture", arXiv:1512.00567, section 7. A head that is cut over ranks:
kernels/ops/vocab_parallel.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.kernels.core import check
from peakgpt.kernels.core.dispatch import Cost, op
from peakgpt.kernels.ops.vocab_parallel import shard_of

CHOICES = {"reduction": ("mean", "sum", "none"), "prefer": ("auto", "memory", "time")}


def _check(x, w, target, weight, *, ignore_index, label_smoothing, z_loss, group, first, vocab, **chosen):
    for name, allowed in CHOICES.items():
        if chosen[name] not in allowed:
            raise ValueError(
                f"linear_cross_entropy: {name} is {chosen[name]!r}, expected one of {', '.join(allowed)}"
            )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"linear_cross_entropy: label_smoothing is {label_smoothing}, expected 0 to 1")
    if not z_loss >= 0.0:
        raise ValueError(f"linear_cross_entropy: z_loss is {z_loss}, expected at least 0")
    check.shape("linear_cross_entropy", "weight", weight, *target.shape)
    check.same("linear_cross_entropy", "x", x, mixed=True, weight=weight)
    check.shape("linear_cross_entropy", "w", w, None, check.width("linear_cross_entropy", "x", x))
    check.shape("linear_cross_entropy", "target", target, *x.shape[:-1])
    check.same("linear_cross_entropy", "x", x, w=w)
    last = first + w.shape[0]
    if not (0 <= first < last <= vocab if group else first == vocab == 0):
        raise ValueError(
            f"linear_cross_entropy: first is {first} and vocab {vocab} for {w.shape[0]} rows of w in group {group!r}, "
            "expected what vocab_shard gives, or none of them"
        )
    check.indices("linear_cross_entropy", "target", target, vocab or w.shape[0], x.device, ignore=ignore_index)


def _cost(x, w, target, weight=None, *, reduction="mean", **_):
    """2 C V FLOPs a token forward and 4 C V for both gradients; every operand and gradient once, no logits."""
    tokens, operands = target.numel(), (x.numel() + w.numel()) * x.element_size()
    product, targets = 2 * tokens * w.numel(), tokens * target.element_size()
    loss, kept = (4 * tokens, 8 * tokens) if reduction == "none" else (4, 0)
    return Cost(product, operands + targets + loss, 2 * product, operands + kept, loss, operands + kept)


def _sample(
    rows: int = 1024, width: int = 768, vocab: int = 50304, weighted: int = 0, spread: int = 1, level: int = 0, **like
):
    """With `weighted` each token has a weight of its own; logits have a deviation of `spread` about `level`."""
    target = torch.randint(vocab, (rows,), device=like.get("device"))
    weight = (torch.rand(rows, **{**like, "dtype": torch.float32}),) if weighted else ()
    x, w = torch.randn(rows, width, **like), torch.randn(vocab, width, **like) * width**-0.5
    if spread != 1 or level:
        # So few digits that float32 adds the logits up without rounding: what is off then is the loss's own doing.
        x, w = (x * 8).round() * (spread / 8), (w * 16).round() / 16
        x[:, 0], w[:, 0] = level, 1.0
    return x, w, target, *weight


def _alloc(x, w, target, weight=None, *, needs, reduction, **_):
    """Kept: m and t (float32, two a token) for "none"; for scalars dx and dw at dloss = 1, empty where not wanted.

    Those of float16 are kept in float32: at dloss = 1 no loss scaling protects them yet.
    """
    if reduction == "none":
        loss = x.new_empty(target.shape, dtype=torch.float32)
        return (loss,), (loss.new_empty(*loss.shape, 2),) if any(needs) else ()
    loss = (x.new_empty((), dtype=torch.float32),)
    if not any(needs):
        return loss, ()
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    dx = x.new_empty(x.shape if needs[0] else 0, dtype=dtype)
    return loss, (dx, torch.empty_like(w, dtype=dtype) if needs[1] else w.new_empty(0, dtype=dtype))


@op(
    cost=_cost, sample=_sample, check=_check, alloc=_alloc, saved_for_backward=("x", "w", "target", "weight"), autocast="lower",
    autocast_exempt=("weight",), grad_in_forward=lambda *, reduction, **_: () if reduction == "none" else ("w",),
)  # fmt: skip
def linear_cross_entropy(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    prefer: str = "auto",
    group: str = "",
    first: int = 0,
    vocab: int = 0,
) -> Tensor:
    """Cross-entropy of the logits x w^T against target.

    Args:
        x: (..., C) float32, bfloat16 or float16.
        w: (V, C) the head's weight, dtype of x.
        target: (...) int64 or int32, already shifted.
        weight: (...) of target, float32, a factor on each token's loss; fused backends give it no gradient.
        ignore_index: targets of this value give zero loss and no gradient, and do not count in the mean.
        reduction: "mean" over the targets that count (over their weights, where given), "sum", or "none".
        label_smoothing: share of the target that is spread over the whole vocabulary, 0 to 1.
        z_loss: factor on the square of the log of the softmax's denominator.
        prefer: "memory" takes the logits by blocks, "time" all of them at once in the dtype of x where the GPU backend
            runs, "auto" decides by their size; nothing else depends on it.
        group, first, vocab: where w is this rank's rows of a head that is cut over the ranks of a torch.distributed
            group, what `vocab_shard(w)` gives. Then x, target and weight are the same on every rank, target counts over
            the whole vocabulary, and every rank calls. Each gets the whole loss and the whole gradient of x, summed
            over the ranks here, and the gradient of its own rows.
    Returns:
        float32: a scalar, or (...) for "none". The mean over no targets is NaN, as in torch.
    Raises:
        ValueError: shapes, dtypes, devices or the reduction do not fit; on CPU also a target out of range.
        NotImplementedError: a forced backend objects; the message says why.
    """
    labels = {"target": target.flatten().long(), "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if shard := shard_of(group, first, vocab):
        loss = shard.eager_losses(x.reshape(-1, x.shape[-1]), w, z_loss=z_loss, **labels)
    else:
        logits = F.linear(x, w)
        logits = logits.flatten(0, -2) if logits.dtype == torch.float64 else logits.flatten(0, -2).float()
        if weight is None and z_loss == 0.0:
            loss = F.cross_entropy(logits, **labels, reduction=reduction)
            return loss.view(target.shape) if reduction == "none" else loss
        loss = F.cross_entropy(logits, **labels, reduction="none") + z_loss * logits.logsumexp(-1).square()
    live = (target != ignore_index).flatten()
    shares = live.to(loss.dtype) if weight is None else torch.where(live, weight.flatten().to(loss.dtype), 0.0)
    loss = torch.where(live, loss * shares, 0.0)
    if reduction == "none":
        return loss.view(target.shape)
    return loss.sum() / shares.sum() if reduction == "mean" else loss.sum()
