"""The weights of a .gguf file in a model: floats, or linear layers that multiply by the integers of the file.

A GroupedLinear has the integers of a block format as they are, and float16 scales. Those of Q4_K, Q5_K and Q6_K are
products that float16 rounds; the relative error that this causes is measured and shown. Packed projections whose parts
have different formats get 8 bits and the smallest of their groups, without loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from peakgpt.engine.checkpoint.gguf.blocks import FORMATS, WITHOUT_OFFSET, Quants, decode, read_quants, read_tensor
from peakgpt.engine.checkpoint.gguf.file import GGUFModel
from peakgpt.engine.checkpoint.quantized.weights import LAYERS, with_layers
from peakgpt.engine.model.grouped_linear import GroupedExpertLinear, GroupedFormat, GroupedLinear
from peakgpt.engine.model.quantized_linear import EMBEDDING, HEAD
from peakgpt.engine.model.transformer import Transformer
from peakgpt.kernels.ops.quantize import LEVEL_TABLES

_MEASURED_ROWS = 256  # of each matrix, whose error is measured


def load_gguf(model: Transformer, gguf: GGUFModel, dtype: torch.dtype, *, dequantize: bool) -> Transformer:
    """Load a file's weights into a model of the file's config.

    Args:
        model: on the meta device.
        gguf: from `read_gguf`.
        dtype: of tensors that are not quantized.
        dequantize: decode the block formats to this dtype, instead of multiplying by their integers.
    Returns:
        The model, in evaluation mode; without gradients if it has quantized layers.
    Raises:
        ValueError: a tensor is missing, unexpected or of another shape.
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    _check_tensors(gguf, expected)
    quantized = {} if dequantize else _quantized_modules(gguf, expected)
    floats = {
        name: _read_floats(gguf, name, shape, dtype)
        for name, shape in expected.items()
        if name.removesuffix(".weight") not in quantized or name == f"{EMBEDDING}.weight"
    }
    if not quantized:
        model.load_state_dict(floats, assign=True)
        return model.eval()
    error, layers = _Error(), {}
    for module, forms in quantized.items():
        shape = expected[f"{module}.weight"]
        quants, form = _read_module(gguf, module, shape, forms)
        error.add(quants, form)
        bias = floats.pop(f"{module}.bias", None)
        q = quants.q if form.bits == 8 else quants.q[:, 0::2] | quants.q[:, 1::2] << 4
        if len(shape) == 3:
            q, scale = (tensor.unflatten(0, shape[:2]) for tensor in (q, quants.scale))
            layer = GroupedExpertLinear(q, scale, bias, shape[2], form)
        else:
            layer = GroupedLinear(q, quants.scale, quants.offset, bias, shape[1], form)
        layers[HEAD if module == EMBEDDING else module] = layer
    error.show(gguf)
    return with_layers(model, layers, floats)


def _quantized_modules(gguf: GGUFModel, expected: Mapping[str, torch.Size]) -> dict[str, list[str]]:
    """Return the linear layers whose parts all have block formats, and the formats."""
    head = HEAD if f"{HEAD}.weight" in expected else EMBEDDING
    found = {}
    for name, shape in expected.items():
        module = name.removesuffix(".weight")
        if len(shape) > 1 and (LAYERS.match(module) or module == head):
            parts = gguf.architecture.parts(gguf.config, name, shape[0], gguf.header.tensors)
            kinds = [gguf.header.tensors[part.name].type.name for part in parts]
            if all(kind in (FORMATS if len(shape) == 2 else WITHOUT_OFFSET) for kind in kinds):
                found[module] = kinds
    return found


def _read_floats(gguf: GGUFModel, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    header, architecture, config = gguf.header, gguf.architecture, gguf.config
    parts = architecture.parts(config, name, shape[0], header.tensors)
    # A shifted norm is read as it is stored: in 16 bits, 1 + w would lose the bits of a small w.
    wide = torch.float32 if architecture.norm_shift and len(shape) == 1 else dtype
    rows = [read_tensor(header, header.tensors[p.name], wide)[p.start : p.stop] for p in parts]
    return architecture.from_file(config, name, rows[0] if len(rows) == 1 else torch.cat(rows)).to(dtype)


def _read_module(
    gguf: GGUFModel, module: str, shape: torch.Size, kinds: Sequence[str]
) -> tuple[Quants, GroupedFormat]:  # fmt: skip
    """Return the rows of a linear layer in our order, those of all experts one after the other, and their format."""
    name = f"{module}.weight"
    parts = gguf.architecture.parts(gguf.config, name, shape[0], gguf.header.tensors)
    read = [read_quants(gguf.header, gguf.header.tensors[part.name]) for part in parts]
    read = [quants.map(lambda t, p=part: t[p.start : p.stop]) for quants, part in zip(read, parts, strict=True)]
    forms = [FORMATS[kind][0] for kind in kinds]
    form = forms[0]
    if len(set(forms)) > 1 or len({quants.offset is None for quants in read}) > 1:
        form = GroupedFormat(8, min(one.group for one in forms))
        read = [_as_8_bits(*pair, form.group) for pair in zip(read, forms, strict=True)]
    whole = Quants(*(None if rows[0] is None else torch.cat(rows) for rows in zip(*read, strict=True)))
    whole = whole.map(lambda t: gguf.architecture.from_file(gguf.config, name, t))
    if len(shape) == 3:
        whole = whole.map(lambda t: t.reshape(shape[0] * shape[1], -1))
    return whole, form


def _as_8_bits(quants: Quants, form: GroupedFormat, group: int) -> Quants:
    """Return the same weights as int8 levels with smaller groups and an offset."""
    levels = torch.tensor(LEVEL_TABLES[form.levels], dtype=torch.int8)
    q = quants.q if form.bits == 8 else levels[quants.q.int()]
    offset = torch.zeros_like(quants.scale) if quants.offset is None else quants.offset
    return Quants(q, *(part.repeat_interleave(form.group // group, 1) for part in (quants.scale, offset)))


class _Error:
    """Sums up the relative error of weights whose scales are rounded to float16, and their bits."""

    def __init__(self):
        self.squares = self.total = 0.0
        self.bits = self.weights = 0

    def add(self, quants: Quants, form: GroupedFormat) -> None:
        parts = quants.map(lambda t: t[:_MEASURED_ROWS])
        rounded = parts.map(lambda t: t.half().float() if t.dtype == torch.float32 else t)
        exact = decode(parts, form)
        share = quants.q.shape[0] / parts.q.shape[0]
        self.squares += share * (decode(rounded, form) - exact).double().square().sum().item()
        self.total += share * exact.double().square().sum().item()
        self.bits += quants.q.numel() * form.bits + 16 * sum(t.numel() for t in quants[1:] if t is not None)
        self.weights += quants.q.numel()

    def show(self, gguf: GGUFModel) -> None:
        if self.squares:
            error = (self.squares / self.total) ** 0.5
            warnings.warn(f"{gguf.header.path}: scales are rounded to float16, relative error of the weights "
                          f"{error:.2g}, {self.bits / self.weights:.2f} bits a weight", stacklevel=4)  # fmt: skip


def _check_tensors(gguf: GGUFModel, expected: Mapping[str, torch.Size]) -> None:
    path, tensors = gguf.header.path, gguf.header.tensors
    shapes = gguf.architecture.shapes(gguf.config, expected, tensors)
    for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != shape:
            got = f"shape {tensors[name].shape}" if name in tensors else "none"
            raise ValueError(f"{path}: got {got} for tensor {name}, expected shape {shape} as the metadata says")
    if unexpected := sorted(tensors.keys() - shapes.keys() - set(gguf.architecture.extra_names)):
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        raise ValueError(f"{path}: got tensor {unexpected[0]}{more}, expected only the {len(shapes)} of such a model")
