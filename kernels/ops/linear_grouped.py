"""Linear layers whose weights have a scale, and an offset or a zero point, for each group of inputs.

    y = act(pre)     pre = Q(x[order]) W^T + b     Q: round_inputs of kernels/ops/quantize.py
    dx[order] = dpre W     dpre = dy act'(pre)     as in kernels/ops/linear_quantized.py
    W = scale * level + offset        as in .gguf files
    W = scale * (level - zero point)  as in checkpoints of GPTQ and AWQ

A level is an integer of 8 bits, or 4 bits are an index into one of LEVEL_TABLES. Fused backends multiply integers: the
sum of a group is exact, the offset is multiplied by the sum of the group's inputs, and the groups are added in float32
in their order. GPTQ's act-order gives each group inputs from all over the row; sorted by group, they are adjacent, and
x is brought into that order once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.kernels.core import check
from peakgpt.kernels.core.dispatch import Cost, op, short_lived
from peakgpt.kernels.ops.linear_quantized import ACTIVATIONS, cost, outputs, saved_inputs, saved_tensors
from peakgpt.kernels.ops.mlp import OUTPUT_ACTIVATIONS
from peakgpt.kernels.ops.quantize import BLOCK, LEVEL_TABLES, PANEL, dequantize_grouped, round_inputs, unpack_grouped


def _check(x, w, scale, offset, b, order, *, out, bits, group, levels, zero_points, activation):
    name = "linear_grouped"
    width = check.width(name, "x", x)
    if bits not in (8, 4) or levels not in LEVEL_TABLES or activation not in ACTIVATIONS:
        raise ValueError(f"{name}: bits, levels, activation are {bits!r}, {levels!r}, {activation!r}, expected 8 or 4, "
                         f"one of {', '.join(LEVEL_TABLES)}, one of {', '.join(ACTIVATIONS)}")  # fmt: skip
    if group not in range(8, BLOCK + 1, 8):
        raise ValueError(f"{name}: group is {group!r}, expected a multiple of 8 up to {BLOCK}")
    out = outputs(w, b, out)
    check.shape(name, "w", w, -(-out // PANEL), -(-width // 8) * (bits // 4), PANEL, 4)
    check.shape(name, "b", b, out)
    check.same(name, "x", x, b=b)
    if w.dtype != torch.uint8 or w.device != x.device:
        raise ValueError(f"{name}: w is {w.dtype} on {w.device}, expected uint8 panels on x's device {x.device}")
    for part, tensor in (("scale", scale), ("offset", offset)):
        check.shape(name, part, tensor, w.shape[0], -(-width // group), PANEL)
        if tensor is not None and (not tensor.is_floating_point() or tensor.device != x.device):
            raise ValueError(f"{name}: {part} is {tensor.dtype} on {tensor.device}, expected floating on {x.device}")
    check.shape(name, "order", order, width)
    if order is not None and (order.dtype != torch.int32 or order.device != x.device):
        raise ValueError(f"{name}: order is {order.dtype} on {order.device}, expected int32 on {x.device}")
    if zero_points and offset is None:
        raise ValueError(f"{name}: zero_points is True without an offset, expected the zero points as offset")


def _cost(x, w, scale, offset=None, b=None, order=None, *, out=None, activation="none", **_) -> Cost:
    parts = sum(part.nbytes for part in (w, scale, offset, order) if part is not None)
    return cost(x, parts, b, outputs(w, b, out), activation)


def _sample(rows: int = 1024, width: int = 768, out: int = 2304, bits: int = 4, group: int = 32, offset: bool = True,
            zeros: bool = False, order: bool = False, **like):  # fmt: skip
    x, b, device = torch.randn(rows, width, **like), torch.randn(out, **like), like.get("device")
    panels = -(-out // PANEL)
    w = torch.randint(1, 256, (panels, -(-width // 8) * (bits // 4), PANEL, 4), dtype=torch.uint8, device=device)
    scale = torch.rand(panels, -(-width // group), PANEL, device=device).add(0.5)
    scale *= width**-0.5 / (73 if bits == 8 else 6)
    offsets = torch.randint(-8, 9, scale.shape, device=device) if zeros else -6 * scale
    order = torch.randperm(width, device=device, dtype=torch.int32) if order else None
    return x, w, scale.half(), offsets.half() if offset else None, b, order


def _alloc(x, w, scale, offset, b, order, *, needs, out, bits, group, levels, zero_points, activation):
    out = outputs(w, b, out)
    return (short_lived(x, *x.shape[:-1], out),), saved_tensors(x, out, needs, activation)


@op(
    cost=_cost, sample=_sample, check=_check, alloc=_alloc,
    saved_for_backward=saved_inputs("w", "scale", "offset", "b", "order"), strided=("x",), autocast="lower",
    autocast_exempt=("scale", "offset"),
)  # fmt: skip
def linear_grouped(
    x: Tensor, w: Tensor, scale: Tensor, offset: Tensor | None = None, b: Tensor | None = None,
    order: Tensor | None = None, *, out: int | None = None, bits: int = 4, group: int = 32, levels: str = "signed",
    zero_points: bool = False, activation: str = "none",
) -> Tensor:  # fmt: skip
    """Multiply the last axis of x, quantized to int8 in blocks of `group`, by a weight of 8 or 4 bits.

    Args:
        x: (..., C) float32, bfloat16 or float16.
        w: (ceil(F / 16), ceil(C / 8) * bits / 4, 16, 4) uint8 panels; scale, offset: (ceil(F / 16), ceil(C / group),
            16) float16: as `quantize.pack_grouped` makes them. offset may be None; the scale of 4 bits without an
            offset may be bfloat16. Fused backends give no gradient of scale and offset.
        b: (F,) in x's dtype, or None.
        order: (C,) int32, a permutation: column i of the weight multiplies x[..., order[i]]. None: column i, x[..., i].
        out: F. Default: the size of b, else all outputs of the panels.
        bits: 8 or 4, of a weight.
        group: number of neighboring inputs that share a scale, a multiple of 8 up to 128.
        levels: of 4 bits, a key of LEVEL_TABLES.
        zero_points: offset has zero points: a weight is scale * (level - offset).
        activation: as in linear_q8.
    Returns:
        (..., F), dtype of x. A row of x with an infinity or NaN gives NaN. Its gradients are those of an exact x.
    Raises:
        ValueError: shapes, dtypes, devices, the group, the levels or the activation do not fit.
        NotImplementedError: the forced backend does not support the call; the message says why.
    """
    x = x if order is None else x.index_select(-1, order)
    parts = unpack_grouped(w, scale, offset, outputs(w, b, out), x.shape[-1], bits)
    weight = dequantize_grouped(*parts, x.shape[-1], group, levels, zero_points)
    y = F.linear(round_inputs(x, group), weight.to(x.dtype), b)
    return y if activation == "none" else OUTPUT_ACTIVATIONS[activation](y)
