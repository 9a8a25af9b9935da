"""Linear layers with 8-bit float products: e4m3 operands in forward, e5m2 output gradients in backward.

    scale = amax(|t|) / max(dtype)      q = t / scale, rounded      y = (q_x q_w^T) scale_x scale_w

Each tensor has one scale, computed from its values on the device in every call. Used by the linear layers of attention
and MLP and by the head, in training; off by default. It changes the loss: `python -m peakgpt.bench fp8` compares it
with bfloat16. Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv:2209.05433. The products are
torch._scaled_mm: native on sm_89 and newer, emulated on a CPU, for tests only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peakgpt.engine.model.experts import ExpertMLPs
from peakgpt.engine.model.plain import is_plain
from peakgpt.kernels.core.autograd import first_order
from peakgpt.kernels.ops.linear import linear

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
LAYERS = ("c_attn", "c_fc", "c_proj", "lm_head")
MULTIPLE = 16  # torch._scaled_mm needs every size of a product to be a multiple of this


def quantize(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round a tensor to 8 bits.

    Args:
        t: floating point.
        dtype: FORWARD or BACKWARD.
    Returns:
        (q, scale), with t close to q * scale. scale is a float32 scalar on the device of t, 1 for a tensor of zeros.
    """
    largest = torch.finfo(dtype).max
    amax = t.abs().amax().float()
    scale = torch.where(amax == 0, 1.0, amax / largest)
    return (t.float() / scale).clamp(-largest, largest).to(dtype), scale


def _product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """Multiply row-major (M, K) by column-major (K, N). `fast` accumulates in fewer bits, enough for forward."""
    return torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast)


class _FP8Linear(torch.autograd.Function):
    """x w^T of x (N, C) and w (F, C). Saves the quantized operands for backward."""

    @staticmethod
    def forward(ctx, x, w):
        (q_x, s_x), (q_w, s_w) = quantize(x, FORWARD), quantize(w, FORWARD)
        ctx.save_for_backward(q_x, s_x, q_w, s_w)
        ctx.w_dtype = w.dtype
        return _product(q_x, s_x, q_w.t(), s_w, x.dtype, fast=True)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        q_x, s_x, q_w, s_w = ctx.saved_tensors
        q_dy, s_dy = quantize(dy, BACKWARD)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _product(q_dy, s_dy, q_w.t().contiguous().t(), s_w, dy.dtype, fast=False)
        if ctx.needs_input_grad[1]:
            dw = _product(q_dy.t().contiguous(), s_dy, q_x.t().contiguous().t(), s_x, ctx.w_dtype, fast=False)
        return dx, dw


def fp8_linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Compute x w^T + b with 8-bit operands; in the dtype of x if a size is not a multiple of 16.

    Args:
        x: (..., C) float32, bfloat16 or float16.
        w: (F, C), b: (F,) or None, dtype of x.
    Returns:
        (..., F), dtype of x.
    """
    rows = x.reshape(-1, x.shape[-1])
    if any(size % MULTIPLE for size in (*rows.shape, *w.shape)) or not rows.numel():
        return linear(x, w, b)
    y = _FP8Linear.apply(rows, w).view(*x.shape[:-1], w.shape[0])
    return y if b is None else y + b


def set_fp8(model: nn.Module, on: bool) -> None:
    """Turn the 8-bit products of a GPT on or off.

    A layer that is hooked or replaced later runs its own forward, without 8-bit products.

    Raises:
        ValueError: the device has no 8-bit products, a size of the model is not a multiple of 16, the model has
            experts, or a layer runs its own forward.
    """
    parts = [module for module in model.modules() if hasattr(module, "fp8")]
    device = next(model.parameters()).device
    if on and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"fp8: got {name}, expected a GPU of sm_89 or newer")
    if on and not parts:
        raise ValueError(f"fp8: got {type(model).__name__}, expected a GPT of peakgpt")
    if on and any(isinstance(module, ExpertMLPs) for module in model.modules()):
        raise ValueError("fp8: got a model with experts, expected one without: their products have no 8-bit form")
    for part in parts if on else ():
        for name, layer in part.named_children():
            if name in LAYERS and not is_plain(layer, nn.Linear):
                raise ValueError(f"fp8: {name} is a {type(layer).__name__} with its own forward, expected plain layers")
    for name, p in model.named_parameters() if on else ():
        if p.dim() == 2 and "wpe" not in name and any(size % MULTIPLE for size in p.shape):
            raise ValueError(f"fp8: {name} has shape {tuple(p.shape)}, expected multiples of {MULTIPLE}")
    for part in parts:
        part.fp8 = on
