"""The weights of a GPTQ or AWQ checkpoint in a model: floats, or linear layers that multiply by its integers.

Layers whose rows are one matrix in our model, such as queries, keys and values, become one GroupedLinear, and those of
experts one GroupedExpertLinear. Experts with zero points or act-order, and a matrix of which the checkpoint has a part
as floats, are decoded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from peakgpt.engine.checkpoint.families.family import Family
from peakgpt.engine.checkpoint.model_folder import open_layout, read_weights
from peakgpt.engine.checkpoint.quantized.packed_layers import KINDS, PackedFormat, PackedLayer, grouped_form, unpack
from peakgpt.engine.checkpoint.quantized.weights import LAYERS, with_layers
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.grouped_linear import GroupedExpertLinear, GroupedLinear
from peakgpt.engine.model.quantized_linear import HEAD
from peakgpt.engine.model.transformer import Transformer


def load_packed(
    folder: Path | str, model: Transformer, family: Family, form: PackedFormat, dtype: torch.dtype, *, dequantize: bool
) -> Transformer:
    """Load a folder's weights into a model of the folder's config.

    Args:
        model: on the meta device.
        family: of the folder's config.json.
        form: its quantization.
        dtype: of tensors that are not quantized.
        dequantize: decode the integers to this dtype, instead of multiplying by them.
    Returns:
        The model, in evaluation mode; without gradients if it has quantized layers.
    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape or dtype.
    """
    opened = open_layout(folder, family)
    path = opened.path
    config, expected = model.config, {name: tensor.shape for name, tensor in model.state_dict().items()}
    shapes = family.shapes(config, expected)
    packed, floats = _split(opened.tensors, shapes)

    def read(layer: str) -> PackedLayer:
        if f"{layer}.weight" not in shapes:
            raise ValueError(f"{path}: got the quantized layer {layer}, expected only those of config.json")
        outputs, inputs = shapes[f"{layer}.weight"]
        try:
            return unpack(packed[layer], form, inputs, outputs)
        except ValueError as error:
            raise ValueError(f"{opened.shards.get(f'{layer}.qweight', path)}: {layer}: {error}") from None

    grouped = {} if dequantize else _grouped_modules(family, config, expected, packed)
    layers: dict[str, GroupedLinear | GroupedExpertLinear] = {}
    for module, names in grouped.items():
        if (parts := _read_parts(names, read, is_stacked=len(expected[f"{module}.weight"]) == 3)) is not None:
            layers[module] = _layer(path, family, config, module, parts, form, expected[f"{module}.weight"][-1])
    multiplied = {name for module in layers for name in grouped[module]}
    decoded = {f"{name}.weight": read(name).weight(form).to(dtype) for name in packed.keys() - multiplied}
    if decoded and not dequantize:
        warnings.warn(f"{path}: {len(decoded)} quantized matrices, such as {min(decoded)}, are decoded to {dtype}: we "
                      "have no product with their integers", stacklevel=3)  # fmt: skip
    floats |= family.transposed(decoded)
    rest = {name: shape for name, shape in expected.items() if name.removesuffix(".weight") not in layers}
    state = read_weights(opened._replace(tensors=floats), family, config, rest, dtype)
    for module, layer in layers.items():
        layer.bias = state.pop(f"{module}.bias", None)
    if layers:
        return with_layers(model, layers, state)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _split(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:  # fmt: skip
    """Return the tensors of the quantized layers by layer and kind, and all others."""
    packed: dict[str, dict[str, Tensor]] = {}
    floats = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind in KINDS:
            packed.setdefault(layer, {})[kind] = tensor
        else:
            floats[name] = tensor
    # Old releases of AutoGPTQ give each layer a bias.
    unused = [name for layer in packed if (name := f"{layer}.bias") in floats and name not in shapes]
    return packed, {name: tensor for name, tensor in floats.items() if name not in unused or tensor.any()}


def _grouped_modules(
    family: Family, config: GPTConfig, expected: Mapping[str, torch.Size], packed: Mapping[str, object]
) -> dict[str, list[str]]:
    """Return our linear layers that consist of quantized ones only, and the names of these; experts are stacked."""
    found = {}
    for name, shape in expected.items():
        module = name.removesuffix(".weight")
        if len(shape) > 1 and (LAYERS.match(module) or module == HEAD):
            parts = [part.removesuffix(".weight") for part in family.layout_names(config, name)]
            if all(part in packed for part in parts):
                found[module] = parts
    return found


def _read_parts(
    names: Sequence[str], read: Callable[[str], PackedLayer], *, is_stacked: bool
) -> dict[str, PackedLayer] | None:  # fmt: skip
    """Read the parts of one of our layers; None if it is one of experts and has zero points or an order."""
    parts = {}
    for name in names:
        parts[name] = part = read(name)
        if is_stacked and (part.order is not None or part.zero.any()):
            return None
    return parts


def _layer(
    path: Path, family: Family, config: GPTConfig, module: str, parts: Mapping[str, PackedLayer], form: PackedFormat,
    inputs: int,
) -> GroupedLinear | GroupedExpertLinear:  # fmt: skip
    """Return a layer with the integers of its parts, without a bias."""
    order = _common_order(path, parts)
    q, scale, zero = (_merge(family, config, module, parts, i) for i in range(3))
    layer_form, zero = grouped_form(form, zero)
    if q.dim() == 3:
        return GroupedExpertLinear(q, scale, None, inputs, layer_form)
    return GroupedLinear(q, scale, zero, None, inputs, layer_form, order)


def _merge(
    family: Family, config: GPTConfig, module: str, parts: Mapping[str, PackedLayer], index: int
) -> Tensor:  # fmt: skip
    """Return one tensor of a layer, whose rows are outputs, from those of its parts."""
    tensors = {f"{part}.weight": layer[index] for part, layer in parts.items()}
    return family.from_layout(config, f"{module}.weight", tensors)


def _common_order(path: Path, parts: Mapping[str, PackedLayer]) -> Tensor | None:
    (first, layer), *others = parts.items()
    for name, other in others:
        same = other.order is layer.order or (
            None not in (other.order, layer.order) and torch.equal(other.order, layer.order)
        )
        if not same:
            raise ValueError(f"{path}: got another act-order (g_idx) for {name} than for {first}, expected the same, "
                             "as their rows are one matrix here; dequantize=True decodes them")  # fmt: skip
    return layer.order
