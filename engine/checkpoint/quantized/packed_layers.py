"""The layers of GPTQ and AWQ checkpoints: integers packed into int32, with a scale and a zero point for each group.

    w[o, i] = scale[g, o] * (q[o, i] - zero[g, o])      g: the group of input i

    GPTQ    qweight (C bits / 32, F)     the earlier input in the lower bits         qzeros (G, F bits / 32)
            g_idx (C), the group of each input; with act-order (desc_act) groups have inputs from all over the row
            "gptq" stores zero - 1, "gptq_v2" stores zero
    AWQ     qweight (C, F / 8)           bits 4 i hold output AWQ_ORDER[i] of 8      qzeros (G, F / 8), packed likewise
    both    scales (G, F), float16

Sources: `QuantLinear.pack` and `forward` in auto_gptq/nn_modules/qlinear/qlinear_cuda.py of AutoGPTQ, where the zero
points of "gptq" are 1 to 2^bits; `convert_gptq_v1_to_v2_format` of the same; `WQLinear_GEMM.from_linear` in
awq/modules/linear/gemm.py of AutoAWQ. Frantar, Ashkboos, Hoefler, Alistarh 2022, "GPTQ", arXiv:2210.17323; Lin et al.
2023, "AWQ", arXiv:2306.00978.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peakgpt.engine.model.grouped_linear import GroupedFormat
from peakgpt.kernels.ops.quantize import BLOCK, dequantize_grouped

GPTQ, AWQ = "gptq", "awq"
KINDS = ("qweight", "qzeros", "scales", "g_idx")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# (method, name of the layout) -> what is added to a stored zero point.
LAYOUTS = {(GPTQ, "gptq"): 1, (GPTQ, "gptq_v2"): 0, (AWQ, "gemm"): 0}
BITS = {GPTQ: (4, 8), AWQ: (4,)}
LAYOUT_FIELDS = ("checkpoint_format", "format", "version")  # of config.json, for releases of the three libraries
FLAGS = ("sym", "desc_act", "zero_point", "is_marlin_format")  # true, false, or null for what is not said


@dataclass(frozen=True)
class PackedFormat:
    """How a checkpoint's layers are packed.

    Args:
        method: "gptq" or "awq".
        bits: of a weight.
        group: number of inputs that share a scale; None: all of a layer.
        zero_shift: added to a stored zero point.
        act_order: whether each layer must say which group an input is in.
    """

    method: str
    bits: int
    group: int | None
    zero_shift: int
    act_order: bool

    def block(self) -> int:
        """Return the size of the groups that a product takes: the largest one that divides `group`."""
        fits = (size for size in range(BLOCK, 7, -8) if self.group is None or self.group % size == 0)
        return next(fits)


def packed_format(quantization: Mapping[str, Any]) -> PackedFormat:
    """Read the quantization_config of a GPTQ or AWQ checkpoint.

    Raises:
        ValueError: it says something that we do not support.
    """
    method = quantization["quant_method"]
    for name in FLAGS:
        if type(quantization.get(name, False)) not in (bool, type(None)):
            raise ValueError(f"got {method} weights with {name} {quantization[name]!r:.60}, expected true or false")
    layout = next((quantization[name] for name in LAYOUT_FIELDS if quantization.get(name) is not None), None)
    default = next(name for other, name in LAYOUTS if other == method)
    layout = default if layout is None else str(layout).lower()
    layout = "marlin" if quantization.get("is_marlin_format") else layout
    if (method, layout) not in LAYOUTS:
        known = " or ".join(name for other, name in LAYOUTS if other == method)
        raise ValueError(f"got {method} weights in the {layout!r} layout, expected {known}")
    bits, group = quantization.get("bits"), quantization.get("group_size")
    if type(bits) is not int or bits not in BITS[method]:
        raise ValueError(f"got {method} weights of {bits!r} bits, expected {' or '.join(map(str, BITS[method]))}")
    if type(group) is not int or (group != -1 and (group < 8 or group % 8)):
        raise ValueError(f"got {method} weights with group_size {group!r}, expected -1 or a multiple of 8")
    if quantization.get("zero_point") is False:
        raise ValueError(f"got {method} weights without zero points (zero_point false), expected zero_point true")
    dynamic = quantization.get("dynamic")
    dynamic = {} if dynamic is None else dynamic
    if not isinstance(dynamic, Mapping):
        raise ValueError(f"got dynamic {dynamic!r:.60}, expected an object by the names of layers")
    if changed := [name for name in dynamic if not name.startswith("-:")]:
        raise ValueError(f"got other bits or groups for the layers {changed[0]!r} (dynamic), expected the same for all")
    act_order = method == GPTQ and bool(quantization.get("desc_act"))
    return PackedFormat(method, bits, None if group == -1 else group, LAYOUTS[method, layout], act_order)


class PackedLayer(NamedTuple):
    """The integers of one layer, C inputs and F outputs, with its columns sorted by group.

    Args:
        q, scale, zero: the weight, as `quantize.dequantize_grouped` takes it with zero_points: levels from
            -2^(bits - 1) on. zero is relative to the same number.
        order: (C,) int32, the input of each column; None if the columns have the order of the inputs.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor
    order: Tensor | None

    def weight(self, form: PackedFormat) -> Tensor:
        """Return the weight (F, C), float32, which holds each value exactly."""
        width = self.q.shape[1] * 8 // form.bits
        weight = dequantize_grouped(self.q, self.scale, self.zero, width, form.block(), zero_points=True)
        return weight if self.order is None else weight[:, self.order.argsort()]


def unpack(tensors: Mapping[str, Tensor], form: PackedFormat, inputs: int, outputs: int) -> PackedLayer:
    """Unpack one layer.

    Args:
        tensors: by KINDS; g_idx is optional without act-order.
        inputs, outputs: C and F.
    Raises:
        ValueError: a tensor is missing, or has another shape, dtype or range of values.
    """
    is_awq, per_word = form.method == AWQ, 32 // form.bits
    group = form.group or inputs
    groups = -(-inputs // group)
    if inputs % per_word or outputs % per_word:
        raise ValueError(f"got {inputs} inputs and {outputs} outputs, expected multiples of {per_word}")
    packed = (inputs, outputs // per_word) if is_awq else (inputs // per_word, outputs)
    shapes = {"qweight": packed, "qzeros": (groups, outputs // per_word), "scales": (groups, outputs)}
    shapes |= {"g_idx": (inputs,)} if form.act_order or "g_idx" in tensors else {}
    for kind, shape in shapes.items():
        _check(kind, tensors.get(kind), shape)
    q, zero = (_integers(tensors[kind], form.bits) for kind in ("qweight", "qzeros"))
    if is_awq:
        columns = torch.tensor(AWQ_ORDER).argsort()
        q, zero = q[:, :, columns].flatten(1).t(), zero[:, :, columns]
    else:
        q = q.transpose(0, 1).flatten(1)
    order = _order(tensors["g_idx"], group, groups) if "g_idx" in tensors else None
    q = q if order is None else q.index_select(1, order)
    half = 1 << form.bits - 1
    q = q[:, 0::2] | q[:, 1::2] << 4 if form.bits == 4 else (q ^ half).contiguous().view(torch.int8)
    zero = (zero.flatten(1).float() + (form.zero_shift - half)).t()
    blocks = -(-inputs // form.block())
    repeats = -(-group // form.block())
    scale, zero = (part.repeat_interleave(repeats, 1)[:, :blocks] for part in (_scales(tensors["scales"]), zero))
    return PackedLayer(q, scale, zero, order)


def grouped_form(form: PackedFormat, zero: Tensor) -> tuple[GroupedFormat, Tensor | None]:
    """Return the format of a layer, and its zero points; None if all are in the middle, as in symmetric weights."""
    asymmetric = bool(zero.any())
    return GroupedFormat(form.bits, form.block(), zero_points=asymmetric), zero if asymmetric else None


def _check(kind: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    dtype = "floating point" if kind == "scales" else "torch.int32"
    expected = f"{kind} of {dtype} and shape {shape}"
    if tensor is None:
        raise ValueError(f"got no {kind}, expected {expected}")
    fits = tensor.is_floating_point() if kind == "scales" else tensor.dtype == torch.int32
    if not fits or tensor.shape != shape:
        raise ValueError(f"got {kind} of {tensor.dtype} and shape {tuple(tensor.shape)}, expected {expected}")


def _integers(packed: Tensor, bits: int) -> Tensor:
    """Return the integers of each word from its lowest bits on: (A, B) int32 -> (A, B, 32 / bits) uint8."""
    octets = packed.contiguous().view(torch.uint8).unflatten(1, (-1, 4))
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), -1).flatten(2)


def _scales(scales: Tensor) -> Tensor:
    """Return the scales as (F, G) float16."""
    if not scales.isfinite().all():
        raise ValueError("got scales with infinities or NaN, expected finite ones")
    halves = scales.half()
    if not torch.equal(halves.to(scales.dtype), scales):
        raise ValueError(f"got scales of {scales.dtype} that float16 does not hold, expected float16")
    return halves.t()


def _order(groups_of_inputs: Tensor, group: int, groups: int) -> Tensor | None:
    """Return the inputs sorted by group, (C,) int32, or None if they are sorted already."""
    inputs = len(groups_of_inputs)
    least, most = (int(value) for value in groups_of_inputs.aminmax())
    if least < 0 or most >= groups:
        raise ValueError(f"got groups {least} to {most} in g_idx, expected 0 to {groups - 1}")
    expected = torch.arange(inputs) // group
    order = groups_of_inputs.argsort(stable=True)
    if (wrong := (groups_of_inputs[order] != expected)).any():
        first = expected[wrong][0]
        count = int((groups_of_inputs == first).sum())
        raise ValueError(f"got {count} inputs of group {first} in g_idx, expected {int((expected == first).sum())}")
    return None if torch.equal(groups_of_inputs.long(), expected) else order.int()
