"""Weights of 8 and 4 bits, and inputs rounded to bytes: the formats, in plain torch.

    8 bits   w = s q            q = round(w / s), s = max|w| / 127 over a row (an output)             8 bits a weight
    4 bits   w = s LEVELS[q]    s over a group of a row's inputs, chosen for the least square error   4 + 16 / group
    inputs   x = s q            q = round(x / s), s = max|x| / 127 over a block of a row

LEVELS lie where normal weights do, denser around 0. Root mean square error over that of the weights, of normal ones
and of Student's t with 5 degrees of freedom: LEVELS in groups of 64 (4.25 bits a weight) 8.1 and 10.1 %, of 32 (4.5)
7.4 and 8.6 %; evenly spaced levels with an offset in groups of 64 (4.5) 8.2 and 10.1 %; llama.cpp's Q4_0 (4.5) 8.6 and
10.8 %.
LEVELS are those of llama.cpp's IQ4_NL (kvalues_iq4nl in ggml-common.h); levels at a distribution's quantiles are the
idea of NF4: Dettmers, Pagnoni, Holtzman, Zettlemoyer 2023, "QLoRA", arXiv:2305.14314, section 3.

Stored, what a file holds and any machine reads: (q, scale) of `quantize_8` and `quantize_4`. Packed, what the ops read:
panels of 16 outputs, in which 64 bytes hold 4 inputs of each (8 with 4 bits); `pack_8` and `pack_4`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
GROUPS = (32, 64, 128)
BLOCK = 128  # inputs that share a scale where weights have 8 bits; with 4 bits it is the weights' group
PANEL = 16  # kPanelOutputs in csrc/gemm/quantized.h
_LINE = 8  # inputs are filled up to a multiple
_SHRINK = tuple(0.75 + 0.025 * i for i in range(15))  # of the scale that takes the largest weight to the last level


def quantize_8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight to 8 bits, symmetrically.

    Args:
        w: (F, C) floating.
    Returns:
        q (F, C) int8 in -127..127, scale (F,) float32.
    Raises:
        ValueError: not a matrix of finite floating numbers.
    """
    w = _matrix(w)
    scale = w.abs().amax(1) / 127 if w.numel() else w.new_zeros(w.shape[0])
    q = (w / scale.clamp(min=1e-30)[:, None]).round_()
    return q.clamp_(-127, 127).to(torch.int8), scale


def dequantize_8(q: Tensor, scale: Tensor) -> Tensor:
    """The weight (F, C) of what `quantize_8` gave, in the scale's dtype."""
    return q.to(scale.dtype) * scale[:, None]


def quantize_4(w: Tensor, group: int = 64) -> tuple[Tensor, Tensor]:
    """Round a weight to the 16 LEVELS.

    Args:
        w: (F, C) floating.
        group: neighbouring inputs that share a scale, one of GROUPS. C need not be a multiple.
    Returns:
        q (F, ceil(C / 2)) uint8, the lower half of a byte is the earlier input's index into LEVELS;
        scale (F, ceil(C / group)) bfloat16, of either sign.
    Raises:
        ValueError: not a matrix of finite floating numbers, or an unknown group.
    """
    known_group("quantize", group)
    w = _matrix(w)
    rows, width = w.shape
    groups = F.pad(w, (0, -width % group)).view(-1, group)  # (F G, group)
    index = torch.empty(groups.shape, dtype=torch.uint8, device=w.device)
    scale = torch.empty(groups.shape[0], dtype=torch.bfloat16, device=w.device)
    for part in torch.arange(groups.shape[0], device=w.device).split(1 << 16):  # the search needs 40 bytes a weight
        index[part], scale[part] = _best_levels(groups[part])
    index = F.pad(index.view(rows, -1)[:, :width], (0, width % 2))
    return index[:, 0::2] | index[:, 1::2] << 4, scale.view(rows, -1)


def dequantize_4(q: Tensor, scale: Tensor, width: int, group: int = 64) -> Tensor:
    """The weight (F, width) of what `quantize_4` gave, in float32, or float64 where the scale is."""
    scale = scale if scale.dtype == torch.float64 else scale.float()
    levels = torch.tensor(LEVELS, dtype=scale.dtype, device=q.device)
    return levels[_indices(q)[:, :width].int()] * scale.repeat_interleave(group, 1)[:, :width]


def round_inputs(x: Tensor, block: int) -> Tensor:
    """x as the products see it: bytes times a scale for each block of the last axis, in x's dtype.

    The scale is taken in float32 (float64 for a float64 x). A block with an infinity or NaN is NaN.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    blocks = F.pad(wide, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    top = blocks.abs().amax(-1, keepdim=True)
    q = (blocks * torch.where(top > 1e-30, 127 / top, 0.0)).round()
    return (q * (top / 127)).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


# ---- the packed form ----


def pack_8(q: Tensor) -> Tensor:
    """(F, C) int8 -> (ceil(F / 16), ceil(C / 8) * 2, 16, 4) uint8: level + 128, four inputs of 16 outputs a line."""
    return _panels((q.view(torch.uint8) ^ 128), 128)


def unpack_8(panels: Tensor, rows: int, width: int) -> Tensor:
    """What `pack_8` was given."""
    return (_rows(panels)[:rows, :width] ^ 128).contiguous().view(torch.int8)


def pack_4(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(F, ceil(C / 2)) uint8 -> (ceil(F / 16), ceil(C / 8), 16, 4): the upper half of a byte is 4 inputs further on.

    The scales, (F, G), become (ceil(F / 16), G, 16).
    """
    quads = _panels(_indices(q), 0).unflatten(1, (-1, 2))
    scale = F.pad(scale, (0, 0, 0, -scale.shape[0] % PANEL))
    return quads[:, :, 0] | quads[:, :, 1] << 4, scale.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def unpack_4(panels: Tensor, scale: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """What `pack_4` was given, of an even width."""
    quads = torch.stack((panels & 15, panels >> 4), 2).flatten(1, 2)
    index = _rows(quads)[:rows, : width + width % 2]
    return index[:, 0::2] | index[:, 1::2] << 4, scale.transpose(1, 2).flatten(0, 1)[:rows]


def _panels(bytes_: Tensor, fill: int) -> Tensor:
    rows, width = bytes_.shape
    filled = F.pad(bytes_, (0, -width % _LINE, 0, -rows % PANEL), value=fill)
    return filled.view(filled.shape[0] // PANEL, PANEL, filled.shape[1] // 4, 4).transpose(1, 2).contiguous()


def _rows(panels: Tensor) -> Tensor:
    return panels.transpose(1, 2).flatten(2).flatten(0, 1)


def _indices(q: Tensor) -> Tensor:
    return torch.stack((q & 15, q >> 4), -1).flatten(1)


# ---- rounding ----


def _matrix(w: Tensor) -> Tensor:
    if w.dim() != 2 or not w.is_floating_point():
        raise ValueError(f"quantize: got {w.dtype} of shape {tuple(w.shape)}, expected a floating matrix (F, C)")
    if not w.isfinite().all():
        raise ValueError("quantize: got infinities or NaN in the weight, expected finite numbers")
    return w.detach().float()


def known_group(who: str, group: int) -> None:
    """Raises ValueError where `group` is not one of GROUPS."""
    if group not in GROUPS:
        raise ValueError(f"{who}: group is {group!r}, expected one of {', '.join(map(str, GROUPS))}")


def _best_levels(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The indices (N, group) and scales (N,) of the least square error among scales of both signs."""
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=groups.device)
    between = (levels[1:] + levels[:-1]) / 2
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    least = groups.new_full((groups.shape[0], 1), float("inf"))
    index = torch.zeros(groups.shape, dtype=torch.int64, device=groups.device)
    scale = torch.zeros_like(least, dtype=torch.bfloat16)
    for shrink in _SHRINK:
        for end in (LEVELS[0], -LEVELS[0]):
            tried = (largest * (shrink / end)).bfloat16()
            q = torch.bucketize(groups / torch.where(tried == 0, 1.0, tried.float()), between)
            error = (levels[q] * tried.float() - groups).square_().sum(1, keepdim=True)
            better = error < least
            least, index, scale = (torch.where(better, *pair) for pair in ((error, least), (q, index), (tried, scale)))
    return index.to(torch.uint8), scale[:, 0]
