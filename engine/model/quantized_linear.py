"""Linear layers whose weights have 8 or 4 bits. The weights are constants: gradients pass through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peakgpt.engine.model.plain import fusable
from peakgpt.kernels.ops.linear_quantized import linear_q4, linear_q8
from peakgpt.kernels.ops.quantize import BLOCK, check_group, pack_4, pack_8

HEAD, EMBEDDING = "lm_head", "transformer.wte"


@dataclass(frozen=True)
class Format:
    """The quantization format of a model's weights.

    Args:
        bits: 8 or 4.
        group: number of neighboring inputs that share a scale, with 4 bits.
    Raises:
        ValueError: other bits, or a group that the kernels do not support.
    """

    bits: int
    group: int = 64

    def __post_init__(self):
        if self.bits not in (8, 4) or not isinstance(self.bits, int):
            raise ValueError(f"quantize: bits is {self.bits!r}, expected 8 or 4")
        check_group("quantize", self.group)

    def of(self, module: str) -> Format:
        """Return the format of one module's weight: the head and a tied embedding always have 8 bits."""
        return Format(8) if module in (HEAD, EMBEDDING) else self


class _WithoutGradients(torch.autograd.Function):
    """A loss whose backward raises the reason why nothing has a gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, anchor: Tensor, reason: str) -> Tensor:
        ctx.reason = reason
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise ValueError(ctx.reason)


def explain_backward(model: nn.Module, loss: Tensor) -> Tensor:
    """Return a loss without gradients so that its backward says why, if quantized weights may be the reason."""
    reason = None if torch.compiler.is_compiling() else _obstacle(model, "backward")
    return loss if reason is None else _WithoutGradients.apply(loss, torch.ones((), requires_grad=True), reason)


def refuse_quantized(model: nn.Module, who: str) -> None:
    """Raise ValueError if a model that is to be trained has quantized weights and no parameter that requires grad."""
    if (reason := _obstacle(model, who)) is not None:
        raise ValueError(reason)


def _obstacle(model: nn.Module, who: str) -> str | None:
    if any(parameter.requires_grad for parameter in model.parameters()):
        return None
    name = next((name for name, module in model.named_modules() if isinstance(module, _Quantized)), None)
    return name and (
        f"{who}: got quantized weights, such as {name}, which have no gradients, and no parameter that requires grad, "
        "expected adapters or other parameters to train, or floats: load the model with dequantize=True, or the "
        "checkpoint that `peakgpt quantize` read"
    )


class _Quantized(nn.Module):
    """A module with a quantized weight: the buffers weight, scale and bias, and its format, form."""

    @property
    def product_fields(self) -> dict[str, Any]:
        """The fields of QuantizedMatrix (csrc/gemm/quantized.h) that the format decides, besides the tensors."""
        return {"bits": self.form.bits, "block": BLOCK if self.form.bits == 8 else self.form.group}

    def _apply(self, fn, recurse=True):
        """Move as torch does, but keep the dtype of the scales when the model is cast."""
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.scale.device)
        return self


@fusable
class QuantizedLinear(_Quantized):
    """A linear layer whose weight has 8 or 4 bits. The weight is frozen; gradients of the input pass through it."""

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None, inputs: int, form: Format):
        """
        Args:
            q, scale: the quantized weight and its scales, as kernels/ops/quantize.py stores them.
            bias: (F,) or None.
            inputs: C.
            form: format of q.
        """
        super().__init__()
        self.in_features, self.out_features, self.form = inputs, q.shape[0], form
        w, scale = (pack_8(q), scale) if form.bits == 8 else pack_4(q, scale)
        self.register_buffer("weight", w)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        """Map x, (..., C), to (..., F); `activation` as in linear_q8."""
        return _product(self.form, self.out_features, x, self.weight, self.scale, self.bias, activation)


@fusable
class QuantizedExpertLinear(_Quantized):
    """One quantized linear layer for each of E experts, with stacked weights."""

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None, inputs: int, form: Format):
        """
        Args:
            q, scale: those of a QuantizedLinear of each expert, stacked.
            bias: (E, F) or None.
            inputs: C.
            form: format of q.
        """
        super().__init__()
        self.in_features, self.out_features, self.form = inputs, q.shape[1], form
        layers = [QuantizedLinear(*parts, None, inputs, form) for parts in zip(q, scale, strict=True)]
        self.register_buffer("weight", torch.stack([layer.weight for layer in layers]))
        self.register_buffer("scale", torch.stack([layer.scale for layer in layers]))
        self.register_buffer("bias", bias)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Map rows (S, C) to (S, F), as ExpertLinear does."""
        parts = enumerate(rows.split(offsets.diff().tolist()))
        products = [self._multiply(expert, part) for expert, part in parts if len(part)]
        return torch.cat(products) if products else rows.new_empty(0, self.out_features)

    def _multiply(self, expert: int, rows: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias[expert]
        return _product(self.form, self.out_features, rows, self.weight[expert], self.scale[expert], bias)


def _product(
    form: Format, out: int, x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None, activation: str = "none"
) -> Tensor:  # fmt: skip
    if form.bits == 8:
        return linear_q8(x, w, scale, b, activation=activation)
    return linear_q4(x, w, scale, b, out=out, group=form.group, activation=activation)
