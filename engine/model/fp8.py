"""Products in 8-bit floats: e4m3 forward, e5m2 for the gradients that come back, each tensor with a scale of its own.

    scale = amax(|t|) / max(dtype)      q = t / scale, rounded      y = (q_x q_w^T) scale_x scale_w

Scales are taken from the tensors that they scale, on the device, at every call. For the linear layers of attention and
MLP and for the head; off by default. It changes the loss: `python -m peakgpt.bench fp8` shows it beside bfloat16's.
Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv:2209.05433. Products are torch._scaled_mm's: on sm_89
and newer the GPU's own, on a CPU an emulation to test with.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peakgpt.kernels.ops.linear import linear

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # of every size of a product, by torch._scaled_mm


def quantize(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round a tensor to 8 bits.

    Args:
        t: floating.
        dtype: FORWARD or BACKWARD.
    Returns:
        (q, scale): t is about q * scale; scale is a float32 scalar on t's device, 1 for a tensor of zeros.
    """
    largest = torch.finfo(dtype).max
    amax = t.abs().amax().float()
    scale = torch.where(amax == 0, 1.0, amax / largest)
    return (t.float() / scale).clamp(-largest, largest).to(dtype), scale


def _product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """(M, K) (K, N): the first by rows, the second by columns. `fast` adds up in fewer bits, good enough forward."""
    return torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        (q_x, s_x), (q_w, s_w) = quantize(x, FORWARD), quantize(w, FORWARD)
        ctx.save_for_backward(q_x, s_x, q_w, s_w)
        ctx.w_dtype = w.dtype
        return _product(q_x, s_x, q_w.t(), s_w, x.dtype, fast=True)

    @staticmethod
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
    """x w^T + b with 8-bit operands; in full where a size is no multiple of 16.

    Args:
        x: (..., C) float32, bfloat16 or float16.
        w: (F, C), b: (F,) or None, dtype of x.
    Returns:
        (..., F), dtype of x.
    """
    rows = x.reshape(-1, x.shape[-1])
    if any(size % MULTIPLE for size in (*rows.shape, *w.shape)) or not rows.numel():
        return linear(x, w, b)
    y = _Linear.apply(rows, w).view(*x.shape[:-1], w.shape[0])
    return y if b is None else y + b


def set_fp8(model: nn.Module, on: bool) -> None:
    """Switch a GPT's products to 8 bits, or back.

    Raises:
        ValueError: its device has no 8-bit products, or a size of the model is no multiple of 16.
    """
    parts = [module for module in model.modules() if hasattr(module, "fp8")]
    device = next(model.parameters()).device
    if on and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"fp8: got {name}, expected a GPU of sm_89 or newer")
    if on and not parts:
        raise ValueError(f"fp8: got {type(model).__name__}, expected a GPT of peakgpt")
    for name, p in model.named_parameters() if on else ():
        if p.dim() == 2 and "wpe" not in name and any(size % MULTIPLE for size in p.shape):
            raise ValueError(f"fp8: {name} has shape {tuple(p.shape)}, expected multiples of {MULTIPLE}")
    for part in parts:
        part.fp8 = on
