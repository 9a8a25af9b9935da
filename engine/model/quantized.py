"""Quantize the state dict of a model, and build a model from a quantized state dict.

The weights of all products of the blocks, and of the head, are quantized. A tied embedding shares its weight with the
head, so its rows are those of the quantized head. The head has 8 bits in the 4-bit format too: it is the last layer,
and no later layer averages out its errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from peakgpt.engine.model.quantized_linear import EMBEDDING, HEAD, Format, QuantizedLinear
from peakgpt.engine.model.transformer import Transformer
from peakgpt.kernels.ops.quantize import dequantize_8, quantize_4, quantize_8

# Modules that become a QuantizedLinear. Routers, relative positions and embedding projections are not quantized.
LAYERS = re.compile(r"^transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.(.*\.)?(c_fc|c_gate|c_proj))$")


def quantize_state(state: Mapping[str, Tensor], form: Format) -> dict[str, Tensor]:
    """Quantize a state dict.

    Args:
        state: the model's state dict, Linear layout.
        form: format of the blocks' weights.
    Returns:
        The tensors of the weights file: `<module>.q` and `<module>.scale` instead of a quantized weight.
    """
    quantized = {}
    for name, tensor in state.items():
        if module := _quantized_module(name, state):
            own = form.of(module)
            parts = quantize_8(tensor) if own.bits == 8 else quantize_4(tensor, own.group)
            quantized |= dict(zip((f"{module}.q", f"{module}.scale"), parts, strict=True))
        else:
            quantized[name] = tensor.detach()
    return quantized


def quantized_shapes(state: Mapping[str, Tensor], form: Format) -> dict[str, tuple[torch.Size, bool]]:
    """Return name -> (shape, is_floating_point) of the tensors that `quantize_state` returns."""
    shapes = {}
    for name, tensor in state.items():
        if module := _quantized_module(name, state):
            own, (rows, width) = form.of(module), tensor.shape
            is_8_bit = own.bits == 8
            shapes[f"{module}.q"] = torch.Size((rows, width if is_8_bit else -(-width // 2))), False
            shapes[f"{module}.scale"] = torch.Size((rows,) if is_8_bit else (rows, -(-width // own.group))), True
        else:
            shapes[name] = tensor.shape, True
    return shapes


def _quantized_module(name: str, state: Mapping[str, Tensor]) -> str | None:
    """Return the module of a weight that is quantized; None for other tensors."""
    module, _, kind = name.rpartition(".")
    head = HEAD if f"{HEAD}.weight" in state else EMBEDDING
    return module if kind == "weight" and (LAYERS.match(module) or module == head) else None


def restore(model: Transformer, found: Mapping[str, Tensor], form: Format, dtype: torch.dtype) -> Transformer:
    """Load a quantized state dict into a model of the same config. All tensors are copied.

    Args:
        model: on any device, also the meta device; its linear layers are replaced.
        found: the tensors of `quantize_state`, by name.
        form: format of the blocks' weights.
        dtype: of the tensors that are not quantized.
    Returns:
        The model, in evaluation mode, without gradients.
    """
    rest = {name: t.to(dtype, copy=True) for name, t in found.items() if not name.endswith((".q", ".scale"))}
    for module, q in _quantized_weights(found):
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


def _quantized_weights(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name.removesuffix(".q"), tensor) for name, tensor in tensors.items() if name.endswith(".q"))
