"""A model's weights in 8 or 4 bits: quantizing a state dict, and building a model from the result.

The weights of all linear layers of the blocks and of the head are quantized. A tied embedding consists of the rounded
rows of the head. In a 4-bit model the head has 8 bits: it is the last layer, so no later layer reduces its errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peakgpt.engine.model.quantized_linear import EMBEDDING, HEAD, Format, QuantizedExpertLinear, QuantizedLinear
from peakgpt.engine.model.transformer import Transformer
from peakgpt.kernels.ops.quantize import dequantize_4, dequantize_8, quantize_4, quantize_8

# Layers that become QuantizedLinear; routers, relative positions and projections of embeddings do not.
LAYERS = re.compile(r"^transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.(.*\.)?(c_fc|c_gate|c_proj))$")


def quantize_state(state: Mapping[str, Tensor], form: Format) -> dict[str, Tensor]:
    """Quantize a state dict.

    Args:
        state: of a float model; matrices are [out, in].
        form: format of the blocks' weights.
    Returns:
        W.q and W.scale, as kernels/ops/quantize.py stores them, for each quantized matrix W; other tensors unchanged.
    """
    quantized = {}
    for name, tensor in state.items():
        if module := _quantized_module(name, state):
            quantized |= dict(zip((f"{module}.q", f"{module}.scale"), _quantize(tensor, form.of(module)), strict=True))
        else:
            quantized[name] = tensor.detach()
    return quantized


def _quantize(tensor: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    if tensor.dim() == 3:  # the weights of experts
        q, scale = zip(*(_quantize(matrix, form) for matrix in tensor), strict=True)
        return torch.stack(q), torch.stack(scale)
    return quantize_8(tensor, form.weight_group) if form.bits == 8 else quantize_4(tensor, form.group)


def rounding_error(state: Mapping[str, Tensor], quantized: Mapping[str, Tensor], form: Format) -> float:
    """Return the root mean square error of the quantized weights, relative to that of the weights.

    Args:
        state: of the float model.
        quantized: the result of `quantize_state`.
        form: format of the blocks' weights.
    """
    error = total = 0.0
    for name, tensor in state.items():
        if module := _quantized_module(name, state):
            q, scale = quantized[f"{module}.q"], quantized[f"{module}.scale"]
            for parts in zip(tensor, q, scale, strict=True) if tensor.dim() == 3 else [(tensor, q, scale)]:
                exact = parts[0].float()
                error += (_dequantize(*parts[1:], exact.shape[1], form.of(module)) - exact).square().sum().item()
                total += exact.square().sum().item()
    return (error / total) ** 0.5 if total else 0.0


def _dequantize(q: Tensor, scale: Tensor, width: int, form: Format) -> Tensor:
    if form.bits == 8:
        return dequantize_8(q, scale, form.weight_group)
    return dequantize_4(q, scale, width, form.group)


def quantized_shapes(state: Mapping[str, Tensor], form: Format) -> dict[str, tuple[torch.Size, torch.dtype | None]]:
    """Return (shape, dtype) by name for the tensors that `quantize_state` would return; None is any floating point."""
    shapes = {}
    for name, tensor in state.items():
        if module := _quantized_module(name, state):
            module_form, (*rows, width) = form.of(module), tensor.shape
            group = module_form.weight_group
            q = (width, torch.int8) if module_form.bits == 8 else (-(-width // 2), torch.uint8)
            shapes[f"{module}.q"] = torch.Size((*rows, q[0])), q[1]
            shapes[f"{module}.scale"] = torch.Size(rows if group is None else (*rows, -(-width // group))), None
        else:
            shapes[name] = tensor.shape, None
    return shapes


def _quantized_module(name: str, state: Mapping[str, Tensor]) -> str | None:
    """Return the module whose weight is `name` if it is quantized, else None."""
    module, _, kind = name.rpartition(".")
    last = HEAD if f"{HEAD}.weight" in state else EMBEDDING
    return module if kind == "weight" and (LAYERS.match(module) or module == last) else None


def load_quantized(model: Transformer, tensors: Mapping[str, Tensor], form: Format, dtype: torch.dtype) -> Transformer:
    """Replace a model's weights by quantized ones. The model does not share memory with `tensors`.

    Args:
        model: of the same config, on any device, also meta; its linear layers are replaced.
        tensors: the result of `quantize_state`.
        form: format of the blocks' weights.
        dtype: of tensors that are not quantized.
    Returns:
        The model, in evaluation mode, without gradients.
    """
    rest = {name: t.to(dtype, copy=True) for name, t in tensors.items() if not name.endswith((".q", ".scale"))}
    layers: dict[str, nn.Module] = {}
    for module in [name.removesuffix(".q") for name in tensors if name.endswith(".q")]:
        q, scale, module_form = tensors[f"{module}.q"], tensors[f"{module}.scale"], form.of(module)
        if module == EMBEDDING:
            rest[f"{module}.weight"] = dequantize_8(q, scale, module_form.weight_group).to(dtype)
            layers[HEAD] = QuantizedLinear(q, scale.clone(), None, q.shape[1], module_form)
            continue
        inputs = model.get_submodule(module).weight.shape[-1]
        make = QuantizedExpertLinear if q.dim() == 3 else QuantizedLinear
        layers[module] = make(q, scale.clone(), rest.pop(f"{module}.bias", None), inputs, module_form)
    return with_layers(model, layers, rest)


def with_layers(model: Transformer, layers: Mapping[str, nn.Module], floats: Mapping[str, Tensor]) -> Transformer:
    """Replace linear layers of a model, or add a head, and set its other parameters, which get no gradients.

    Returns:
        The model, in evaluation mode.
    """
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        model.get_submodule(parent).add_module(own, layer)
    for name, tensor in floats.items():
        module, _, kind = name.rpartition(".")
        setattr(model.get_submodule(module), kind, nn.Parameter(tensor, requires_grad=False))
    return model.eval()
