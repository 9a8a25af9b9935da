"""MXFP4 weights of experts: 4-bit floats with a power of two for each block of 32 inputs.

    NAME_blocks   uint8 [E, F, C / 32, 16]: two elements in a byte, the earlier one in the lower half
    NAME_scales   uint8 [E, F, C / 32]: a block is multiplied by 2^(scale - 127); 255 is NaN

NAME is the tensor of all experts in a float checkpoint of the family, whose matrices are [in, out] there. An element is
an index into the levels "fp4", in halves: OCP Microscaling Formats 1.0, sections 5.3.3 and 5.4. This is the layout of
transformers' Mxfp4Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peakgpt.engine.checkpoint.families.family import Family
from peakgpt.engine.checkpoint.folder import CONFIG, QUANTIZATION
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.grouped_linear import GroupedExpertLinear, GroupedFormat
from peakgpt.engine.model.quantized_linear import QuantizedExpertLinear, QuantizedLinear
from peakgpt.kernels.ops.quantize import dequantize_grouped

METHOD = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"
FORM = GroupedFormat(4, 32, "fp4")
HALF_BIAS = 128  # of the exponents: the levels are in halves
NOT_A_NUMBER = 255
POWERS = torch.tensor([2.0 ** (exponent - HALF_BIAS) for exponent in range(NOT_A_NUMBER)])  # float32, exact


class Mxfp4(NamedTuple):
    """The weights (F, C) of a linear layer of E experts.

    Args:
        q: (E, F, C / 2) uint8, two elements in a byte.
        scale: (E, F, C / 32) uint8.
    """

    q: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        """(E, F, C), that of the weights."""
        return torch.Size((*self.q.shape[:-1], 2 * self.q.shape[-1]))


NO_MXFP4: Mapping[str, Mxfp4] = MappingProxyType({})


def is_mxfp4(content: Mapping[str, Any]) -> bool:
    """Return whether the config.json of a folder says that it has MXFP4 weights."""
    quantization = content.get(QUANTIZATION)
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == METHOD


def with_method(source_files: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the JSON files of a folder whose config.json says that it has MXFP4 weights."""
    return {**source_files, CONFIG: {QUANTIZATION: {"quant_method": METHOD}, **source_files.get(CONFIG, {})}}


def without_method(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json for the decoded weights."""
    return {name: value for name, value in content.items() if name != QUANTIZATION}


def expert_layer(weights: Mxfp4, bias: Tensor | None) -> GroupedExpertLinear:
    """Return a layer that multiplies by the elements."""
    return GroupedExpertLinear(weights.q, POWERS.bfloat16()[weights.scale.int()], bias, weights.shape[-1], FORM)


def decode(weights: Mxfp4, dtype: torch.dtype) -> Tensor:
    """Return the weights, (E, F, C), rounded to a dtype: bfloat16 holds them exactly."""
    out, width = torch.empty(weights.shape, dtype=dtype), weights.shape[-1]
    for q, scale, target in zip(*weights, out, strict=True):
        target.copy_(dequantize_grouped(q, POWERS[scale.int()], None, width, FORM.group, FORM.levels))
    return out


def mxfp4_weights(model: nn.Module) -> dict[str, Mxfp4]:
    """Return the MXFP4 weights of a model by their names in the state dict; {} if it has other quantized weights."""
    kinds = QuantizedLinear | QuantizedExpertLinear
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    if not all(isinstance(layer, GroupedExpertLinear) and layer.form == FORM for layer in layers.values()):
        return {}
    return {f"{name}.weight": _weights_of(layer) for name, layer in layers.items()}


def _weights_of(layer: GroupedExpertLinear) -> Mxfp4:
    parts = layer.unpacked()
    exponent = torch.frexp(parts["scale"].float()).exponent - 1  # frexp: a power of two is half of the next one
    return Mxfp4(parts["q"], (exponent + HALF_BIAS).to(torch.uint8))


def mxfp4_tensors(family: Family, config: GPTConfig, weights: Mapping[str, Mxfp4]) -> dict[str, Tensor]:
    """Convert weights, by their names in the state dict, to the tensors of a folder."""
    blocks = family.join(config, {name: w.q.unflatten(2, (-1, FORM.group // 2)) for name, w in weights.items()})
    scales = family.join(config, {name: w.scale for name, w in weights.items()})
    return {f"{name}{BLOCKS}": t for name, t in blocks.items()} | {f"{name}{SCALES}": t for name, t in scales.items()}
