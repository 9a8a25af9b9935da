"""The block formats of ggml: integers with a scale, and in some an offset, for each group of a row's inputs.

    w = scale q + offset        Q8_0, Q4_0, Q5_0, Q6_K, MXFP4 have no offset
    Q4_K, Q5_K, Q6_K            256 inputs share two float16; a scale is the product of one of them and an integer

Decoded, the products are rounded to float32 in this order, as in gguf.quants. Layouts: ggml-common.h and ggml-quants.c
of ggml; MXFP4: OCP Microscaling Formats 1.0, section 5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from peakgpt.engine.data.gguf_header import GGUFHeader, TensorEntry
from peakgpt.engine.model.grouped_linear import GroupedFormat
from peakgpt.kernels.ops.quantize import LEVEL_TABLES

_BLOCKS_AT_ONCE = 1 << 14  # the integers and products of a part stay in the caches
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Quants(NamedTuple):
    """The content of N blocks of E elements.

    Args:
        q: (N, E), int8 levels of 8 bits, or uint8 indices into a table of levels.
        scale, offset: (N, E / group) float32; the powers of two of MXFP4 are bfloat16.
    """

    q: Tensor
    scale: Tensor
    offset: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Quants:
        """Return the result of a function of each tensor."""
        return Quants(*(None if tensor is None else change(tensor) for tensor in self))


def read_tensor(header: GGUFHeader, entry: TensorEntry, dtype: torch.dtype) -> Tensor:
    """Return a tensor of the file as floats. It does not share memory with the file.

    Args:
        dtype: of the result; decoded values are rounded from float32 to it.
    """
    out = torch.empty(entry.shape, dtype=dtype)
    if plain := _PLAIN.get(entry.type.name):
        data = header.bytes_of(entry)
        source = torch.frombuffer(data, dtype=plain, count=out.numel(), offset=entry.start)
        return out.copy_(source.view(entry.shape))
    form, unpack = FORMATS[entry.type.name]
    parts = _blocks(header, entry).split(_BLOCKS_AT_ONCE)
    for blocks, target in zip(parts, out.view(-1, entry.type.elements).split(_BLOCKS_AT_ONCE), strict=True):
        target.copy_(decode(unpack(blocks), form))
    return out


def read_quants(header: GGUFHeader, entry: TensorEntry) -> Quants:
    """Return the integers of a matrix (F, C), whose type is one of FORMATS: q (F, C), scale and offset (F, groups)."""
    _, unpack = FORMATS[entry.type.name]
    parts = [unpack(blocks) for blocks in _blocks(header, entry).split(_BLOCKS_AT_ONCE)]
    rows = entry.shape[0]
    merged = [None if part[0] is None else torch.cat(part).view(rows, -1) for part in zip(*parts, strict=True)]
    return Quants(*merged)


def _blocks(header: GGUFHeader, entry: TensorEntry) -> Tensor:
    """Return the blocks of a tensor as they are stored, (blocks, bytes of a block), mapped."""
    data = header.bytes_of(entry)
    source = torch.frombuffer(data, dtype=torch.uint8, count=entry.end - entry.start, offset=entry.start)
    return source.view(-1, entry.type.size)


def decode(quants: Quants, form: GroupedFormat) -> Tensor:
    """Return the weights of blocks, (N, E) float32."""
    q, scale, offset = quants
    values = q.float() if form.bits == 8 else torch.tensor(LEVEL_TABLES[form.levels]).float()[q.int()]
    scaled = values.unflatten(1, (-1, form.group)) * scale[:, :, None]
    return (scaled if offset is None else scaled + offset[:, :, None]).flatten(1)


def _half(blocks: Tensor, at: int) -> Tensor:
    """Return the float16 at byte `at` of each block, (N, 1) float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """Return the lower halves of the bytes of each row, then the upper halves: (..., B) -> (..., 2 B)."""
    return torch.cat((packed & 15, packed >> 4), -1)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """Return 16 or 0 for each element of a block of 32, from the 32 bits at byte `at`."""
    return (blocks[:, at : at + 4, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1) << 4


def _q4_0(blocks: Tensor) -> Quants:
    return Quants(_nibbles(blocks[:, 2:]), _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Quants:
    return Quants(_nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Tensor) -> Quants:
    return Quants((_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)).view(torch.int8) - 16, _half(blocks, 0))


def _q5_1(blocks: Tensor) -> Quants:
    q = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return Quants(q.view(torch.int8), _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Tensor) -> Quants:
    return Quants(blocks[:, 2:].contiguous().view(torch.int8), _half(blocks, 0))


def _mxfp4(blocks: Tensor) -> Quants:
    powers = torch.tensor([2.0 ** (exponent - 128) for exponent in range(256)]).bfloat16()
    return Quants(_nibbles(blocks[:, 1:]), powers[blocks[:, :1].int()])


def _scales_and_offsets(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return those of the 8 groups of Q4_K and Q5_K, (N, 8): 12 bytes hold 16 integers of 6 bits."""
    low, high, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((low & 63, rest & 15 | low >> 6 << 4), 1)
    minima = torch.cat((high & 63, rest >> 4 | high >> 6 << 4), 1)
    return _half(blocks, 0) * scales.float(), -(_half(blocks, 2) * minima.float())


def _q4_k(blocks: Tensor) -> Quants:
    return Quants(_nibbles(blocks[:, 16:].unflatten(1, (4, 32))).flatten(1), *_scales_and_offsets(blocks))


def _q5_k(blocks: Tensor) -> Quants:
    fifth = (blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1) << 4
    q = _nibbles(blocks[:, 48:].unflatten(1, (4, 32))).flatten(1) | fifth.flatten(1)
    return Quants(q.view(torch.int8), *_scales_and_offsets(blocks))


def _q6_k(blocks: Tensor) -> Quants:
    """Two halves of 128 elements, each in four runs of 32: 4 bits from `low`, 2 bits from `high`."""
    low = _nibbles(blocks[:, :128].unflatten(1, (2, 64))).unflatten(2, (4, 32))
    high = blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    q = (low | (high & 3) << 4).flatten(1).view(torch.int8) - 32
    return Quants(q, _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float())


WITHOUT_OFFSET = {"Q8_0", "Q5_0", "Q6_K", "Q4_0", "MXFP4"}
FORMATS: dict[str, tuple[GroupedFormat, Callable[[Tensor], Quants]]] = {
    "Q8_0": (GroupedFormat(8, 32), _q8_0),
    "Q5_0": (GroupedFormat(8, 32), _q5_0),
    "Q5_1": (GroupedFormat(8, 32), _q5_1),
    "Q5_K": (GroupedFormat(8, 32), _q5_k),
    "Q6_K": (GroupedFormat(8, 16), _q6_k),
    "Q4_0": (GroupedFormat(4, 32, "signed"), _q4_0),
    "Q4_1": (GroupedFormat(4, 32, "unsigned"), _q4_1),
    "Q4_K": (GroupedFormat(4, 32, "unsigned"), _q4_k),
    "MXFP4": (GroupedFormat(4, 32, "fp4"), _mxfp4),
}
