"""Linear layers whose weights have a scale and an offset for each group of inputs: those of .gguf files, GPTQ, AWQ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peakgpt.engine.model.plain import fusable
from peakgpt.engine.model.quantized_linear import QuantizedExpertLinear, QuantizedLinear
from peakgpt.kernels.ops.linear_grouped import linear_grouped
from peakgpt.kernels.ops.quantize import BLOCK, LEVEL_TABLES, pack_grouped, unpack_grouped


@dataclass(frozen=True)
class GroupedFormat:
    """The format of one weight, of which kernels/ops/linear_grouped.py has the formulas.

    Args:
        bits: 8 or 4.
        group: number of neighboring inputs that share a scale.
        levels: of 4 bits, a key of LEVEL_TABLES.
        zero_points: the offsets are zero points: a weight is scale * (level - offset).
    Raises:
        ValueError: a value that the kernels do not support.
    """

    bits: int
    group: int
    levels: str = "signed"
    zero_points: bool = False

    def __post_init__(self):
        fits = self.bits in (8, 4) and self.group in range(8, BLOCK + 1, 8) and self.levels in LEVEL_TABLES
        types = type(self.bits), type(self.group), type(self.zero_points)
        if not fits or types != (int, int, bool):
            raise ValueError(f"got {self}, expected 8 or 4 bits, a group that is a multiple of 8 up to {BLOCK}, levels "
                             f"of {', '.join(LEVEL_TABLES)}, and zero_points true or false")  # fmt: skip


@fusable
class GroupedLinear(QuantizedLinear):
    """A linear layer whose weight, which is frozen, has scales and offsets of groups."""

    def __init__(
        self, q: Tensor, scale: Tensor, offset: Tensor | None, bias: Tensor | None, inputs: int, form: GroupedFormat,
        order: Tensor | None = None,
    ):  # fmt: skip
        """
        Args:
            q, scale, offset: the weight, as `quantize.pack_grouped` takes it.
            bias: (F,) or None.
            inputs: C.
            form: format of q.
            order: (C,) int32 or None, as in linear_grouped.
        """
        super(QuantizedLinear, self).__init__()
        self.in_features, self.out_features, self.form = inputs, q.shape[0], form
        w, scale, offset = pack_grouped(q, scale, offset)
        for name, tensor in (
            ("weight", w), ("scale", scale), ("offset", offset), ("bias", bias), ("order", order)
        ):  # fmt: skip
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        """Map x, (..., C), to (..., F); `activation` as in linear_grouped."""
        return linear_grouped(
            x, self.weight, self.scale, self.offset, self.bias, self.order, out=self.out_features, bits=self.form.bits,
            group=self.form.group, levels=self.form.levels, zero_points=self.form.zero_points, activation=activation,
        )  # fmt: skip

    def unpacked(self) -> dict[str, Tensor | None]:
        """Return q, scale, offset and order, as __init__ takes them."""
        sizes = self.out_features, self.in_features, self.form.bits
        q, scale, offset = unpack_grouped(self.weight, self.scale, self.offset, *sizes)
        offset = None if offset is None else offset.contiguous()
        return {"q": q.contiguous(), "scale": scale.contiguous(), "offset": offset, "order": self.order}

    @property
    def product_fields(self) -> dict[str, Any]:
        return _product_fields(self.form, self.scale)

    def _apply(self, fn, recurse=True):
        """Move as torch does, but keep the dtype of scales and offsets when the model is cast."""
        offset = self.offset
        super()._apply(fn, recurse)
        self.offset = None if offset is None else offset.to(self.offset.device)
        return self


@fusable
class GroupedExpertLinear(QuantizedExpertLinear):
    """One linear layer with scales of groups for each of E experts, with stacked weights and without offsets."""

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None, inputs: int, form: GroupedFormat):
        """
        Args:
            q, scale: (E, ...), those of a GroupedLinear of each expert, stacked.
            bias: (E, F) or None.
            inputs: C.
            form: format of q.
        """
        super(QuantizedExpertLinear, self).__init__()
        self.in_features, self.out_features, self.form = inputs, q.shape[1], form
        packed = [pack_grouped(*parts, None)[:2] for parts in zip(q, scale, strict=True)]
        for name, tensors in zip(("weight", "scale"), zip(*packed, strict=True), strict=True):
            self.register_buffer(name, torch.stack(tensors))
        self.register_buffer("bias", bias)

    def unpacked(self) -> dict[str, Tensor]:
        """Return q and scale, as __init__ takes them."""
        sizes = self.out_features, self.in_features, self.form.bits
        each = [unpack_grouped(w, scale, None, *sizes)[:2] for w, scale in zip(self.weight, self.scale, strict=True)]
        return {name: torch.stack(parts) for name, parts in zip(("q", "scale"), zip(*each, strict=True), strict=True)}

    def _multiply(self, expert: int, rows: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias[expert]
        return linear_grouped(
            rows, self.weight[expert], self.scale[expert], b=bias, out=self.out_features, bits=self.form.bits,
            group=self.form.group, levels=self.form.levels,
        )  # fmt: skip

    @property
    def product_fields(self) -> dict[str, Any]:
        return _product_fields(self.form, self.scale)


def _product_fields(form: GroupedFormat, scale: Tensor) -> dict[str, Any]:
    levels, is_half = list(LEVEL_TABLES).index(form.levels), scale.dtype == torch.float16
    return {"bits": form.bits, "block": form.group, "f16_scales": is_half, "levels": levels,
            "zero_points": form.zero_points}  # fmt: skip
