"""RMSNorm of queries and keys with their rotary embedding on the CPU: csrc/ops/qk_norm.cpp, one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.cpu import rotary
from peakgpt.kernels.cpu.ext import _C, DTYPES, dtype_objection, threads, unit_last
from peakgpt.kernels.ops.norm import default_eps
from peakgpt.kernels.ops.qk_norm import is_joint

NO_GRADIENT = rotary.NO_GRADIENT


def objection(x: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor | None = None, *_, **__) -> str | None:
    if q_norm.dtype != k_norm.dtype:
        return f"takes q_norm and k_norm of one dtype, got {q_norm.dtype} and {k_norm.dtype}"
    reason = None if cos is None else rotary.objection(x, cos)
    return reason or dtype_objection(x, q_norm)


def forward(outputs, saved, *tensors, **params):
    normalize(outputs[0], saved[0], *tensors, **params)


def backward(grads, inputs, outputs, saved, needs, **params):
    x, q_norm, k_norm, *tables = inputs
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    return dx, *gradients(dx, grads[0], saved[0], x, q_norm, k_norm, *tables, needs=needs[1:3], **params), None, None


def normalize(y, r, x, q_norm, k_norm, cos, sin, *, eps, **options) -> None:
    """Fill y (B, T, H + K, D), contiguous, and r with the results of the op `qk_norm`."""
    problem = _problem(unit_last(x), q_norm, k_norm, cos, sin, **options)
    _C.qk_norm_forward(**problem, eps=default_eps(x.dtype, eps), y=y, r=r, threads=threads())


def gradients(dx, dy, r, x, q_norm, k_norm, cos, sin, *, needs, eps=None, **options) -> list[Tensor | None]:
    """Fill dx, unless it is None, and return the gradients of both weights, None if not needed.

    Args:
        dx, dy: (B, T, H + K, D) with contiguous heads; dx may be dy.
        r: of the forward pass.
    """
    dw = [torch.empty_like(w) if need else None for w, need in zip((q_norm, k_norm), needs, strict=True)]
    problem = _problem(unit_last(x), q_norm, k_norm, cos, None if sin is None else -sin, **options)
    _C.qk_norm_backward(**problem, r=r, dy=unit_last(dy), dx=dx, dq_norm=dw[0], dk_norm=dw[1], threads=threads())
    return dw


def _problem(x, q_norm, k_norm, cos, sin, *, n_head, interleaved, offset) -> dict[str, object]:
    """Return the fields of QKNormProblem in csrc/ops/qk_norm.h."""
    batch, tokens, heads, width = x.shape
    rotation = {}
    if cos is not None:
        tables = {"cos": cos.float(), "sin": sin.float(), "pairs": cos.shape[1]}
        rotation = {**tables, "interleaved": interleaved}
    return {
        "dtype": DTYPES[x.dtype],
        "w_dtype": DTYPES[q_norm.dtype],
        "batch": batch,
        "tokens": tokens,
        "q_heads": n_head,
        "k_heads": heads - n_head,
        "width": width,
        "joint": is_joint(q_norm, k_norm, width),
        "x": x,
        "q_norm": q_norm,
        "k_norm": k_norm,
        "offset": offset,
        **rotation,
    }
