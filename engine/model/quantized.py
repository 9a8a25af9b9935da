"""Models whose linear layers have weights of 8 or 4 bits: the layer, and a model's tensors in that form.

Every product of the blocks and the head is quantized. A tied embedding is one with the head: its rows are those of the
rounded head. With 4 bits the head has 8: it is last, and nothing evens out its errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peakgpt.kernels.ops.linear import linear
from peakgpt.kernels.ops.linear_quantized import linear_q4, linear_q8
from peakgpt.kernels.ops.quantize import check_group, dequantize_8, pack_4, pack_8, quantize_4, quantize_8

if TYPE_CHECKING:
    from peakgpt.engine.model.transformer import Transformer

# What is multiplied by QuantizedLinear; routers, relative positions and projections of embeddings stay as they are.
LAYERS = re.compile(r"^transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.(.*\.)?(c_fc|c_gate|c_proj))$")
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


# ---- a model's tensors ----


def quantize_state(state: Mapping[str, Tensor], form: Format) -> dict[str, Tensor]:
    """What model.safetensors holds for a model.

    Args:
        state: the model's state dict, Linear layout.
        form: of the blocks' weights.
    """
    found = {}
    for name, tensor in state.items():
        if module := _product(name, state):
            own = form.of(module)
            parts = quantize_8(tensor) if own.bits == 8 else quantize_4(tensor, own.group)
            found |= dict(zip((f"{module}.q", f"{module}.scale"), parts, strict=True))
        else:
            found[name] = tensor.detach()
    return found


def quantized_shapes(state: Mapping[str, Tensor], form: Format) -> dict[str, tuple[torch.Size, bool]]:
    """The names and shapes of what `quantize_state` would give, and whether each is floating."""
    found = {}
    for name, tensor in state.items():
        if module := _product(name, state):
            own, (rows, width) = form.of(module), tensor.shape
            eight = own.bits == 8
            found[f"{module}.q"] = torch.Size((rows, width if eight else -(-width // 2))), False
            found[f"{module}.scale"] = torch.Size((rows,) if eight else (rows, -(-width // own.group))), True
        else:
            found[name] = tensor.shape, True
    return found


def _product(name: str, state: Mapping[str, Tensor]) -> str | None:
    """The module whose weight `name` is, where it is quantized."""
    module, _, kind = name.rpartition(".")
    last = HEAD if f"{HEAD}.weight" in state else EMBEDDING
    return module if kind == "weight" and (LAYERS.match(module) or module == last) else None


def restore(model: Transformer, found: Mapping[str, Tensor], form: Format, dtype: torch.dtype) -> Transformer:
    """Put the tensors of `quantize_state` into a model of the same config, whatever it holds, in memory of its own.

    Args:
        model: on any device, meta too; its layers are replaced.
        found: by name.
        form: of the blocks' weights.
        dtype: of what is not quantized.
    Returns:
        The model, in evaluation mode; nothing in it wants a gradient.
    """
    rest = {name: t.to(dtype, copy=True) for name, t in found.items() if not name.endswith((".q", ".scale"))}
    for module, q in _quantized(found):
        own, scale = form.of(module), found[f"{module}.scale"]
        if module == EMBEDDING:
            rest[f"{module}.weight"] = dequantize_8(q, scale).to(dtype)
            layer = QuantizedLinear(q, scale.clone(), None, q.shape[1], own)
            model.add_module(HEAD, layer)
            continue
        inputs = model.get_submodule(module).in_features
        layer = QuantizedLinear(q, scale.clone(), rest.pop(f"{module}.bias", None), inputs, own)
        parent, _, name = module.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    for name, tensor in rest.items():
        module, _, kind = name.rpartition(".")
        setattr(model.get_submodule(module), kind, nn.Parameter(tensor, requires_grad=False))
    return model.eval()


def _quantized(found: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name.removesuffix(".q"), tensor) for name, tensor in found.items() if name.endswith(".q"))
