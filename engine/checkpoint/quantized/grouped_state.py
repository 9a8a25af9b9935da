"""The tensors of a model with GroupedLinear and GroupedExpertLinear layers, as a quantized folder stores them.

    M.q, M.scale             of each such layer M, as kernels/ops/quantize.py describes them; of experts, stacked
    M.offset, M.order        only if the layer has them
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from peakgpt.engine.checkpoint.quantized.weights import with_layers
from peakgpt.engine.model.grouped_linear import GroupedExpertLinear, GroupedFormat, GroupedLinear
from peakgpt.engine.model.quantized_linear import EMBEDDING, HEAD, QuantizedExpertLinear, QuantizedLinear
from peakgpt.engine.model.transformer import Transformer

Forms = dict[str, GroupedFormat]  # by the name of the layer
PACKED = ("weight", "scale", "offset", "order")  # buffers of such layers besides the bias
OPTIONAL = ("offset", "order")


def grouped_state(model: Transformer) -> tuple[dict[str, Tensor], Forms]:
    """Return the tensors of a model, and the formats of its layers with integers.

    Raises:
        ValueError: the model has quantized layers of other kinds.
    """
    tensors, forms = dict(model.state_dict()), {}
    for name, layer in model.named_modules():
        if isinstance(layer, GroupedLinear | GroupedExpertLinear):
            forms[name] = layer.form
            for kind in PACKED:
                tensors.pop(f"{name}.{kind}", None)
            tensors |= {f"{name}.{kind}": part for kind, part in layer.unpacked().items() if part is not None}
        elif isinstance(layer, QuantizedLinear | QuantizedExpertLinear):
            raise ValueError(f"save_pretrained: {name} is a {type(layer).__name__}, expected floats or integers of a "
                             ".gguf file, GPTQ or AWQ in all layers; copy the folder instead")  # fmt: skip
    return tensors, forms


def grouped_shapes(
    sizes: Mapping[str, torch.Size], forms: Forms, names: Collection[str]
) -> dict[str, tuple[torch.Size, torch.dtype | None]]:
    """Return (shape, dtype) by name for the tensors of a folder; None is any floating point.

    Args:
        sizes: of the parameters of the float model.
        forms: formats of its grouped layers.
        names: of the folder's tensors; an optional one is expected if it is there.
    Raises:
        ValueError: the model has no such layer.
    """
    shapes = {name: (size, None) for name, size in sizes.items() if name.removesuffix(".weight") not in forms}
    for name, form in forms.items():
        *rows, width = _size(sizes, name)
        groups = torch.Size((*rows, -(-width // form.group)))
        q = ((*rows, width), torch.int8) if form.bits == 8 else ((*rows, -(-width // 2)), torch.uint8)
        parts = {"q": (torch.Size(q[0]), q[1]), "scale": (groups, None), "offset": (groups, None),
                 "order": (torch.Size((width,)), torch.int32)}  # fmt: skip
        present = names if len(rows) == 1 else ()  # experts have no optional tensors
        shapes |= {f"{name}.{kind}": part for kind, part in parts.items()
                   if kind not in OPTIONAL or f"{name}.{kind}" in present}  # fmt: skip
    return shapes


def load_grouped(model: Transformer, tensors: Mapping[str, Tensor], forms: Forms, dtype: torch.dtype) -> Transformer:
    """Replace a model's linear layers by those of `grouped_state`. The model does not share memory with `tensors`.

    Args:
        model: of the same config, on any device, also meta.
        tensors, forms: from `grouped_state`, with the shapes of `grouped_shapes`.
        dtype: of tensors that are not quantized.
    Returns:
        The model, in evaluation mode, without gradients.
    Raises:
        ValueError: the order of a layer is not a permutation.
    """
    rest, layers = dict(tensors), {}
    sizes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, form in forms.items():
        q, scale, offset, order = (rest.pop(f"{name}.{kind}", None) for kind in ("q", "scale", "offset", "order"))
        inputs = _size(sizes, name)[-1]
        if order is not None and not torch.equal(order.sort().values.long(), torch.arange(inputs)):
            raise ValueError(f"{name}.order is not a permutation, expected one of 0 to {inputs - 1}")
        bias = rest.pop(f"{name}.bias", None)
        bias = None if bias is None else bias.to(dtype, copy=True)
        order = None if order is None else order.clone()
        layers[name] = (
            GroupedLinear(q, scale, offset, bias, inputs, form, order) if q.dim() == 2
            else GroupedExpertLinear(q, scale, bias, inputs, form)
        )  # fmt: skip
    return with_layers(model, layers, {name: tensor.to(dtype, copy=True) for name, tensor in rest.items()})


def _size(sizes: Mapping[str, torch.Size], name: str) -> torch.Size:
    """Return (outputs, inputs) of a layer, or (E, outputs, inputs); those of a tied head are the embedding's."""
    for module in (name, EMBEDDING) if name == HEAD else (name,):
        if len(size := sizes.get(f"{module}.weight", ())) > 1:
            return size
    raise ValueError(f"got the quantized layer {name}, expected linear layers of the model")
