"""Linear cross-entropy: the head's matrix product and the loss over the vocabulary, without the full logits.

    z = x w^T, or softcap tanh(x w^T / softcap)
    m = max_v z_v      t = sum_v exp(z_v - m)      lse = m + log t      e = label_smoothing
    loss = log t - (z_target - m) + e (z_target - mean_v z_v) + z_loss lse^2
    dz   = dloss (exp(z - m) / t (1 + 2 z_loss lse) - (1 - e) onehot(target) - e / V)
    dx   = dz w      dw = dz^T x      with a softcap dz is first multiplied by 1 - (z / softcap)^2

m and t are saved separately: a float32 lse has an error of half an ulp, 4e-6 for logits of 100, and so has every
exp(z - lse).

`weight` multiplies each token's loss, and the mean divides by the sum of the weights. For a scalar loss, forward
computes the gradients of x and w for dloss = 1 and backward only scales them (6 C V FLOPs per token). For
reduction="none" the incoming gradient differs by token, so backward recomputes the logits and uses the saved m and t
(8 C V). Under no_grad forward computes no gradient. Rows are processed in blocks, as in Hsu et al. 2024, "Liger
Kernel", arXiv:2410.10989, section 3.2, and Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models",
arXiv:2411.09009. The z-loss is Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, section 5; label smoothing Szegedy et
al. 2015, "Rethinking the Inception Architecture", arXiv:1512.00567, section 7. vocab_parallel.py splits the head over
ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.kernels.core import check
from peakgpt.kernels.core.dispatch import Cost, op
from peakgpt.kernels.ops.soft_cap import soft_cap
from peakgpt.kernels.ops.vocab_parallel import shard_of

IGNORE_INDEX = -100  # a target that does not count, as in F.cross_entropy
ALLOWED = {"reduction": ("mean", "sum", "none"), "prefer": ("auto", "memory", "time")}


def _check(x, w, target, weight, *, ignore_index, label_smoothing, z_loss, softcap, group, first, vocab, **strings):
    for name, allowed in ALLOWED.items():
        if strings[name] not in allowed:
            raise ValueError(f"linear_cross_entropy: {name} is {strings[name]!r}, expected one of {', '.join(allowed)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"linear_cross_entropy: label_smoothing is {label_smoothing}, expected 0 to 1")
    if not z_loss >= 0.0:
        raise ValueError(f"linear_cross_entropy: z_loss is {z_loss}, expected at least 0")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"linear_cross_entropy: softcap is {softcap}, expected more than 0, or None")
    check.shape("linear_cross_entropy", "weight", weight, *target.shape)
    check.same("linear_cross_entropy", "x", x, mixed=True, weight=weight)
    check.shape("linear_cross_entropy", "w", w, None, check.width("linear_cross_entropy", "x", x))
    check.shape("linear_cross_entropy", "target", target, *x.shape[:-1])
    check.same("linear_cross_entropy", "x", x, w=w)
    last = first + w.shape[0]
    if not (0 <= first < last <= vocab if group else first == vocab == 0):
        raise ValueError(
            f"linear_cross_entropy: first is {first} and vocab {vocab} for {w.shape[0]} rows of w in group {group!r}, "
            "expected the values of vocab_shard, or the defaults"
        )
    check.indices("linear_cross_entropy", "target", target, vocab or w.shape[0], x.device, ignore=ignore_index)


def _cost(x, w, target, weight=None, *, reduction="mean", **_):
    """2 C V FLOPs per token forward, 4 C V for both gradients. Moves operands and gradients once, no logits."""
    tokens, operands = target.numel(), (x.numel() + w.numel()) * x.element_size()
    product, targets = 2 * tokens * w.numel(), tokens * target.element_size()
    loss, saved = (4 * tokens, 8 * tokens) if reduction == "none" else (4, 0)
    return Cost(product, operands + targets + loss, 2 * product, operands + saved, loss, operands + saved)


def _sample(
    rows: int = 1024, width: int = 768, vocab: int = 50304, weighted: int = 0, spread: int = 1, level: int = 0, **like
):
    """`weighted` = 1 gives a weight per token. Logits have mean `level` and standard deviation `spread`."""
    target = torch.randint(vocab, (rows,), device=like.get("device"))
    weight = (torch.rand(rows, **{**like, "dtype": torch.float32}),) if weighted else ()
    x, w = torch.randn(rows, width, **like), torch.randn(vocab, width, **like) * width**-0.5
    if spread != 1 or level:
        # Few enough bits that the float32 logits are exact, so any error comes from the loss.
        x, w = (x * 8).round() * (spread / 8), (w * 16).round() / 16
        x[:, 0], w[:, 0] = level, 1.0
    return x, w, target, *weight


def _alloc(x, w, target, weight=None, *, needs, reduction, **_):
    """Saves m and t (2 float32 per token) for "none", else dx and dw for dloss = 1, empty if not required.

    For float16 inputs they are float32: for dloss = 1 no loss scaling protects them from underflow.
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
    cost=_cost, sample=_sample, check=_check, alloc=_alloc, saved_for_backward=("x", "w", "target", "weight"),
    strided=("x", "w"), autocast="lower", autocast_exempt=("weight",),
    counted_as={"group": "", "first": 0, "vocab": 0},
    grad_in_forward=lambda *, reduction, **_: () if reduction == "none" else ("w",),
)  # fmt: skip
def linear_cross_entropy(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
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
        weight: shape of target, dtype of x or float32, a factor on each token's loss. Fused backends give it no
            gradient.
        ignore_index: targets of this value give zero loss and no gradient, and do not count in the mean.
        reduction: "mean" over the targets that are not ignored (weighted if `weight` is given), "sum", or "none".
        label_smoothing: probability that is spread evenly over the whole vocabulary, 0 to 1.
        z_loss: factor on the square of the log of the softmax's denominator.
        softcap: limit of the logits: the loss, with its smoothing and z-loss, is that of softcap tanh(z / softcap).
        prefer: memory use of the GPU backend: "memory" computes the logits in blocks, "time" all at once in the dtype
            of x, "auto" decides by their size.
        group, first, vocab: for a head that is split by rows over the ranks of a torch.distributed group: the values
            of `vocab_shard(w)`, where w is this rank's rows. Then x, target and weight are the same on every rank,
            targets are ids of the whole vocabulary, and every rank must call. Each rank gets the whole loss, the whole
            gradient of x (summed over ranks) and the gradient of its own rows.
    Returns:
        float32: a scalar, or (...) for "none". The mean over no targets is NaN, as in torch.
    Raises:
        ValueError: shapes, dtypes, devices or the reduction do not fit; on CPU also a target out of range.
        NotImplementedError: the forced backend does not support the call; the message says why.
    """
    labels = {"target": target.flatten().long(), "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if shard := shard_of(group, first, vocab):
        loss = shard.eager_losses(x.reshape(-1, x.shape[-1]), w, z_loss=z_loss, softcap=softcap, **labels)
    else:
        logits = F.linear(x, w).reshape(target.numel(), w.shape[0])
        logits = soft_cap(logits if logits.dtype == torch.float64 else logits.float(), softcap)
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
