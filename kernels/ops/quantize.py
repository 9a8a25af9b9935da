"""Quantization formats in plain torch: int8 weights, 4-bit weights, and int8 inputs.

    8 bits   w = s q            s per group of a row's inputs, with the least square error   8 + 16 / group bits
             w = s q            s = max|w| / 127 per row (output): older folders             8 bits
    4 bits   w = s LEVELS[q]    s per group of a row's inputs, with the least square error   4 + 16 / group bits
    inputs   x = s q            q = round(x / s), s = max|x| / 127 per block of a row
    groups   w = s q + m, or w = s TABLE[q] + m   s, m per group of a row's inputs: the formats of .gguf files
             w = s (q - z)      with a zero point z: those of GPTQ and AWQ

LEVELS follow the distribution of normal weights: denser around 0. Root mean square error relative to the root mean
square of the weights, for normal weights and for Student's t with 5 degrees of freedom:

    LEVELS, groups of 64                           4.25 bits per weight   8.1 and 10.1 %
    LEVELS, groups of 32                           4.5                    7.4 and 8.6 %
    evenly spaced levels, offset, groups of 64     4.5                    8.2 and 10.1 %
    llama.cpp's Q4_0                               4.5                    8.6 and 10.8 %

The same of 8 bits, for rows of 2048 inputs:

    one scale for each row                         8.02 bits per weight   0.83 and 1.7 %
    groups of 128                                  8.125                  0.62 and 0.93 %
    groups of 64                                   8.25                   0.56 and 0.78 %
    groups of 32                                   8.5                    0.49 and 0.64 %

LEVELS are those of llama.cpp's IQ4_NL (kvalues_iq4nl in ggml-common.h). Levels at the quantiles of a distribution are
the idea of NF4: Dettmers, Pagnoni, Holtzman, Zettlemoyer 2023, "QLoRA", arXiv:2305.14314, section 3.

The stored form, in files and for any machine, is (q, scale) of `quantize_8` and `quantize_4`. The packed form, which
the ops read, is panels of 16 outputs: 64 bytes hold 4 inputs of each output (8 with 4 bits). It comes from `pack_8`
and `pack_4`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.kernels.hardware.cpu_threads import torch_threads

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
LEVEL_TABLES = {  # of 4-bit weights, in the order of kQuantizedLevels of csrc/gemm/quantized.h
    "normal": LEVELS,
    "signed": tuple(range(-8, 8)),
    "unsigned": tuple(range(16)),
    # In halves: OCP Microscaling Formats 1.0, 5.3.3.
    "fp4": (0, 1, 2, 3, 4, 6, 8, 12, -0.0, -1, -2, -3, -4, -6, -8, -12),
}
GROUPS = (32, 64, 128)
BLOCK = 128  # inputs that share a scale in linear_q8; in the other products those of a group of the weight
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of Scales of csrc/gemm/quantized.h
PANEL = 16  # kPanelOutputs in csrc/gemm/quantized.h
_LINE = 8  # inputs are padded to a multiple of this
_SEARCHED = 1 << 12  # groups searched at once: their temporaries stay in the cache
_MOST_HALVES = 256  # beyond it every x has the first or the last level
_SHIFTS = range(-1, 6)  # of the bits of a scale: a step is 0.4 to 0.8 %
_SHRINK = tuple(0.75 + 0.025 * i for i in range(15))  # times the scale that maps the largest weight to the last level


def quantize_8(w: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantize a weight to int8, symmetrically.

    Args:
        w: (F, C) floating.
        group: number of neighboring inputs that share a scale, one of GROUPS; C need not be a multiple. None: all.
    Returns:
        q (F, C) int8 in -127..127; scale (F, ceil(C / group)) bfloat16, or (F,) float32 without a group.
    Raises:
        ValueError: w is not a floating matrix with finite values, or the group is unknown.
    """
    w = _matrix(w)
    if group is None:
        scale = w.abs().amax(1) / 127 if w.numel() else w.new_zeros(w.shape[0])
        return _nearest(w, scale[:, None]), scale
    check_group("quantize", group)
    rows, width = w.shape
    groups = F.pad(w, (0, -width % group)).view(-1, group)  # (F G, group)
    q = torch.empty(groups.shape, dtype=torch.int8, device=w.device)
    scale = torch.empty(groups.shape[0], dtype=torch.bfloat16, device=w.device)
    with torch_threads(1):
        for part in _parts_of(groups):
            scale[part] = _best_scales(groups[part])
            q[part] = _nearest(groups[part], scale[part].float()[:, None])
    return q.view(rows, -1)[:, :width].contiguous(), scale.view(rows, -(-width // group))


def dequantize_8(q: Tensor, scale: Tensor, group: int | None = None) -> Tensor:
    """Invert `quantize_8`: the weight (F, C) in float32, or in float64 if the scale is float64."""
    if group is not None:
        return dequantize_grouped(q, scale, None, q.shape[1], group)
    return q.to(scale.dtype) * scale[:, None]


def quantize_4(w: Tensor, group: int = 64) -> tuple[Tensor, Tensor]:
    """Quantize a weight to the 16 LEVELS.

    Args:
        w: (F, C) floating.
        group: number of neighboring inputs that share a scale, one of GROUPS. C need not be a multiple.
    Returns:
        q (F, ceil(C / 2)) uint8, two indices into LEVELS per byte, the earlier input in the lower half;
        scale (F, ceil(C / group)) bfloat16, positive or negative.
    Raises:
        ValueError: w is not a floating matrix with finite values, or the group is unknown.
    """
    check_group("quantize", group)
    w = _matrix(w)
    rows, width = w.shape
    groups = F.pad(w, (0, -width % group)).view(-1, group)  # (F G, group)
    index = torch.empty(groups.shape, dtype=torch.uint8, device=w.device)
    scale = torch.empty(groups.shape[0], dtype=torch.bfloat16, device=w.device)
    with torch_threads(1):
        for part in _parts_of(groups):
            index[part], scale[part] = _best_levels(groups[part])
    index = F.pad(index.view(rows, -1)[:, :width], (0, width % 2))
    return index[:, 0::2] | index[:, 1::2] << 4, scale.view(rows, -1)


def dequantize_4(q: Tensor, scale: Tensor, width: int, group: int = 64) -> Tensor:
    """Invert `quantize_4`: the weight (F, width) in float32, or in float64 if the scale is float64."""
    scale = scale if scale.dtype == torch.float64 else scale.float()
    levels = torch.tensor(LEVELS, dtype=scale.dtype, device=q.device)
    return levels[_indices(q)[:, :width].int()] * scale.repeat_interleave(group, 1)[:, :width]


def dequantize_grouped(
    q: Tensor, scale: Tensor, offset: Tensor | None, width: int, group: int, levels: str = "signed",
    zero_points: bool = False,
) -> Tensor:  # fmt: skip
    """Return a weight (F, width) with scales and offsets of groups, in float32, or float64 if the scales are float64.

    Args:
        q: (F, width) int8 levels, or (F, ceil(width / 2)) uint8 as from `quantize_4`, indices into a table of levels.
        scale, offset: (F, ceil(width / group)) floating; offset may be None.
        levels: a key of LEVEL_TABLES.
        zero_points: offset has zero points, so a weight is scale * (level - offset), which float32 holds exactly.
    """
    wide = torch.float64 if scale.dtype == torch.float64 else torch.float32
    table = torch.tensor(LEVEL_TABLES[levels], dtype=wide, device=q.device)
    values = q.to(wide) if q.dtype == torch.int8 else table[_indices(q)[:, :width].int()]
    spread = [part.to(wide).repeat_interleave(group, 1)[:, :width] for part in (scale, offset) if part is not None]
    if offset is None:
        return values * spread[0]
    return (values - spread[1]) * spread[0] if zero_points else values * spread[0] + spread[1]


def round_inputs(x: Tensor, block: int) -> Tensor:
    """Quantize each block of the last axis to int8 and dequantize it, in x's dtype.

    The scale is float32 (float64 for a float64 x). A block with an infinity or NaN becomes NaN. The gradient is that of
    the identity: Bengio, Leonard, Courville 2013, arXiv:1308.3432, the straight-through estimator.
    """
    constant = x.detach()
    wide = constant if x.dtype == torch.float64 else constant.float()
    blocks = F.pad(wide, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    largest = blocks.abs().amax(-1, keepdim=True)
    q = (blocks * torch.where(largest > 1e-30, 127 / largest, 0.0)).round()
    return (q * (largest / 127)).flatten(-2)[..., : x.shape[-1]].to(x.dtype) + (x - constant)


# ---- the packed form ----


def pack_8(q: Tensor) -> Tensor:
    """(F, C) int8 -> (ceil(F / 16), ceil(C / 8) * 2, 16, 4) uint8: q + 128, a line has 4 inputs of 16 outputs."""
    return _panels((q.view(torch.uint8) ^ 128), 128)


def unpack_8(panels: Tensor, rows: int, width: int) -> Tensor:
    """Invert `pack_8`."""
    return (_rows(panels)[:rows, :width] ^ 128).contiguous().view(torch.int8)


def pack_4(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(F, ceil(C / 2)) uint8 -> (ceil(F / 16), ceil(C / 8), 16, 4). The upper half of a byte is the input 4 later.

    Scales (F, G) become (ceil(F / 16), G, 16).
    """
    return _pack_nibbles(q), _pack_scales(scale)


def unpack_4(panels: Tensor, scale: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Invert `pack_4`, for an even width."""
    quads = torch.stack((panels & 15, panels >> 4), 2).flatten(1, 2)
    index = _rows(quads)[:rows, : width + width % 2]
    return index[:, 0::2] | index[:, 1::2] << 4, scale.transpose(1, 2).flatten(0, 1)[:rows]


def pack_grouped(q: Tensor, scale: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pack a weight with scales of groups: q as in `pack_8` or `pack_4`, scales and offsets as in `pack_4`.

    Args:
        q: (F, C) int8, or (F, ceil(C / 2)) uint8.
        scale, offset: (F, G) floating; offset may be None. bfloat16 scales stay as they are: powers of two fit into it
            that do not fit into float16. Others, and offsets, become float16.
    """
    w = pack_8(q) if q.dtype == torch.int8 else _pack_nibbles(q)
    scale = scale if scale.dtype == torch.bfloat16 else scale.half()
    return w, _pack_scales(scale), None if offset is None else _pack_scales(offset.half())


def unpack_grouped(
    panels: Tensor, scale: Tensor, offset: Tensor | None, rows: int, width: int, bits: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Invert `pack_grouped`."""
    q = unpack_8(panels, rows, width) if bits == 8 else unpack_4(panels, scale, rows, width)[0]
    scale, offset = (None if part is None else part.transpose(1, 2).flatten(0, 1)[:rows] for part in (scale, offset))
    return q, scale, offset


def _pack_nibbles(q: Tensor) -> Tensor:
    quads = _panels(_indices(q), 0).unflatten(1, (-1, 2))
    return quads[:, :, 0] | quads[:, :, 1] << 4


def _pack_scales(scale: Tensor) -> Tensor:
    scale = F.pad(scale, (0, 0, 0, -scale.shape[0] % PANEL))
    return scale.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def _panels(q: Tensor, fill: int) -> Tensor:
    rows, width = q.shape
    filled = F.pad(q, (0, -width % _LINE, 0, -rows % PANEL), value=fill)
    return filled.view(filled.shape[0] // PANEL, PANEL, filled.shape[1] // 4, 4).transpose(1, 2).contiguous()


def _rows(panels: Tensor) -> Tensor:
    return panels.transpose(1, 2).flatten(2).flatten(0, 1)


def _indices(q: Tensor) -> Tensor:
    return torch.stack((q & 15, q >> 4), -1).flatten(1)


# ---- rounding to levels ----


# Searches run on one thread: they are hundreds of short operators, so more threads gain little, and each operator waits
# for a thread without a core.
def _parts_of(groups: Tensor) -> list[slice]:
    return [slice(begin, begin + _SEARCHED) for begin in range(0, groups.shape[0], _SEARCHED)]


def _nearest(w: Tensor, scale: Tensor) -> Tensor:
    return _steps(w, scale).to(torch.int8)


def _steps(w: Tensor, scale: Tensor) -> Tensor:
    """Return the integers of -127 to 127 nearest to w / scale, in w's dtype."""
    return (w / torch.where(scale == 0, 1.0, scale)).round_().clamp_(-127, 127)


def _best_scales(groups: Tensor) -> Tensor:
    """Search the bfloat16 numbers near max|w| / 127 for the least square error: groups (N, group) -> (N,)."""
    nearest = (groups.abs().amax(1, keepdim=True) / 127).bfloat16()
    least = groups.new_full(nearest.shape, float("inf"))
    scale, unit = torch.zeros_like(nearest), torch.where(nearest == 0, 1.0, nearest.float())
    steps = groups / unit  # so that no square overflows
    for shift in _SHIFTS:
        candidate = (nearest.view(torch.int16) + shift).clamp_(min=0).view(torch.bfloat16)
        ratio = candidate / unit
        error = _steps(steps, ratio).mul_(ratio).sub_(steps).square_().sum(1, keepdim=True)
        better = error < least
        least, scale = torch.where(better, error, least), torch.where(better, candidate, scale)
    return scale[:, 0]


def _matrix(w: Tensor) -> Tensor:
    if w.dim() != 2 or not w.is_floating_point():
        raise ValueError(f"quantize: got {w.dtype} of shape {tuple(w.shape)}, expected a floating matrix (F, C)")
    if not w.isfinite().all():
        raise ValueError("quantize: got infinities or NaN in the weight, expected finite numbers")
    return w.detach().float()


def check_group(op: str, group: int) -> None:
    """Raise ValueError if `group` is not one of GROUPS."""
    if group not in GROUPS or not isinstance(group, int):
        raise ValueError(f"{op}: group is {group!r}, expected one of {', '.join(map(str, GROUPS))}")


def _best_levels(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Search scales of both signs for the least square error: indices (N, group) and scales (N,)."""
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=groups.device)
    # The midpoints of LEVELS are multiples of 1 / 2, so ceil(2 x) decides the level nearest to x.
    halves = torch.arange(-_MOST_HALVES, _MOST_HALVES + 1, device=groups.device) / 2
    index_of = torch.bucketize(halves, (levels[1:] + levels[:-1]) / 2)
    level_of = levels[index_of]
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    least = groups.new_full(largest.shape, float("inf"))
    scale = torch.zeros_like(largest)
    for shrink in _SHRINK:
        for end in (LEVELS[0], -LEVELS[0]):
            candidate = (largest * (shrink / end)).bfloat16().float()
            rounded = level_of.index_select(0, _rows_of_table(groups, candidate)).view_as(groups)
            error = rounded.mul_(candidate).sub_(groups).square_().sum(1, keepdim=True)
            better = error < least
            least, scale = torch.where(better, error, least), torch.where(better, candidate, scale)
    index = index_of.index_select(0, _rows_of_table(groups, scale)).view_as(groups)
    return index.to(torch.uint8), scale[:, 0].bfloat16()


def _rows_of_table(groups: Tensor, scale: Tensor) -> Tensor:
    """Return ceil(2 x) + _MOST_HALVES of x = groups / scale, flat; a scale of 0 counts as 1."""
    halves = (groups / torch.where(scale == 0, 1.0, scale)).mul_(2).ceil_()
    return halves.clamp_(-_MOST_HALVES, _MOST_HALVES).add_(_MOST_HALVES).int().flatten()
