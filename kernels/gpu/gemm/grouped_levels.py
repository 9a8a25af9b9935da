"""The levels of packed weights of 8 and 4 bits in Triton kernels; kernels/ops/quantize.py has the panels."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from peakgpt.kernels.gpu.launch import Tile
from peakgpt.kernels.ops.quantize import LEVEL_TABLES


@dataclass(frozen=True, kw_only=True)
class GroupedTile(Tile):
    """Each step covers SLICES groups of inputs; BLOCK_N is a multiple of the panels' 16 outputs."""

    BLOCK_M: int
    BLOCK_N: int


@triton.jit
def decoded_levels(words, BITS: tl.constexpr, LEVELS: tl.constexpr):
    """Unpack words (SLICES, LINES, N) of panels to levels (SLICES, inputs, N), bfloat16, in the order of the inputs."""
    if BITS == 8:
        shift = tl.arange(0, 4) * 8
        q = (words[:, :, None, :] >> shift[None, None, :, None]) & 255
    else:
        s = tl.arange(0, 8)  # the lower halves of 4 bytes, then the upper halves
        q = (words[:, :, None, :] >> (s % 4 * 8 + s // 4 * 4)[None, None, :, None]) & 15
    q = tl.reshape(q, [q.shape[0], q.shape[1] * q.shape[2], q.shape[3]])
    if len(LEVELS) == 1:
        level = q + LEVELS[0]
    else:
        level = tl.full(q.shape, LEVELS[0], tl.int32)
        for i in tl.static_range(1, 16):
            level = tl.where(q == i, LEVELS[i], level)
    return level.to(tl.bfloat16)


def level_constants(bits: int, levels: str) -> tuple[int, ...]:
    """Return the levels of the indices 0 to 15; of evenly spaced ones, and of 8 bits, only the first."""
    values = (-128,) if bits == 8 else LEVEL_TABLES[levels]
    return values[:1] if values == tuple(range(values[0], values[0] + len(values))) else values
