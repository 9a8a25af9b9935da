"""The linear layer of quantized models, with weights of 8 or 4 bits; engine/checkpoint quantizes a model with it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from peakgpt.kernels.ops.linear import linear
from peakgpt.kernels.ops.linear_quantized import linear_q4, linear_q8
from peakgpt.kernels.ops.quantize import check_group, pack_4, pack_8

HEAD, EMBEDDING = "lm_head", "transformer.wte"


@dataclass(frozen=True)
class Format:
    """How a model's weights are kept: 8 bits, or 4 in groups of neighbouring inputs."""

    bits: int
    group: int = 64

    def __post_init__(self):
        if self.bits not in (8, 4):
            raise ValueError(f"quantize: bits is {self.bits!r}, expected 8 or 4")
        check_group("quantize", self.group)

    def of(self, module: str) -> Format:
        """That of one module's weight."""
        return Format(8) if module in (HEAD, EMBEDDING) else self


class QuantizedLinear(nn.Module):
    """A linear layer for inference whose weight has 8 or 4 bits."""

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None, inputs: int, form: Format):
        """
        Args:
            q, scale: as kernels/ops/quantize.py stores them.
            bias: (F,) or None.
            inputs: C.
            form: of q.
        """
        super().__init__()
        self.in_features, self.out_features, self.form = inputs, q.shape[0], form
        w, scale = (pack_8(q), scale) if form.bits == 8 else pack_4(q, scale)
        self.register_buffer("weight", w)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        """Map x, (..., C), to (..., F); `activation` as in linear_q8."""
        if self.form.bits == 8:
            return linear_q8(x, self.weight, self.scale, self.bias, activation=activation)
        return linear_q4(
            x, self.weight, self.scale, self.bias, out=self.out_features, group=self.form.group, activation=activation
        )

    def _apply(self, fn, recurse=True):
        """Scales stay in their dtype, whatever the model is turned into."""
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.scale.device)
        return self


def project(layer: nn.Linear | QuantizedLinear, x: Tensor) -> Tensor:
    """Multiply x, (..., C), by a layer's weight and add its bias."""
    return layer(x) if isinstance(layer, QuantizedLinear) else linear(x, layer.weight, layer.bias)
