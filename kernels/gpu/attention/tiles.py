"""Attention's launch parameters by architecture, precision and head width, and the calls that torch computes faster.

These tables are committed data: nothing is timed at run time. `python -m peakgpt.bench device --only attention` times
the rows and torch's attention on the present device. A person commits changes, with device and date.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peakgpt.kernels.gpu import launch
from peakgpt.kernels.gpu.launch import Tile


@dataclass(frozen=True, kw_only=True)
class AttentionTile(Tile):
    BLOCK_Q: int
    BLOCK_K: int
    warpgroup_mma: bool = True  # False: HMMA, because the 64 rows that wgmma and tcgen05 need would spill


class Tiles(NamedTuple):
    """One row of the table: the tile of each kernel."""

    fwd: AttentionTile
    dq: AttentionTile
    dkv: AttentionTile
    dbias: AttentionTile | None = None  # None in rows for calls without a bias


@dataclass(frozen=True)
class Slower:
    """A measurement: for plain calls of at least min_keys keys, torch's scaled_dot_product_attention is faster."""

    baseline: str  # torch's backend, such as "cuDNN attention"
    min_keys: int
    device: str
    date: str

    def __str__(self) -> str:
        return f"measured slower than torch's {self.baseline} on {self.device}, {self.date}"


def tile(block_q: int, block_k: int, warps: int, stages: int, warpgroup_mma: bool = True) -> AttentionTile:
    return AttentionTile(BLOCK_Q=block_q, BLOCK_K=block_k, warps=warps, stages=stages, warpgroup_mma=warpgroup_mma)


def _hmma(*sizes: int) -> AttentionTile:
    return tile(*sizes, warpgroup_mma=False)


WIDTHS = (64, 128, 256)  # a row serves head widths up to its own
# "half_rich": half precision with a bias, a soft cap, dropout or the gradient of slopes, which need more registers.
PRECISIONS = ("half", "half_rich", "fp32")

# Not measured on hardware; compiled without spills by Triton 3.7.1. Larger tiles spill (sm_90, D 64: forward 128 x 128
# with 4 warps; D 128: dkv 64 x 128).
_FP32 = {
    64: Tiles(fwd=tile(64, 16, 8, 2), dq=tile(64, 32, 8, 2), dkv=tile(32, 32, 8, 2), dbias=tile(64, 32, 8, 2)),
    128: Tiles(fwd=tile(32, 16, 8, 2), dq=tile(16, 16, 8, 2), dkv=tile(16, 32, 8, 1), dbias=tile(32, 16, 8, 2)),
    256: Tiles(fwd=tile(16, 16, 4, 2), dq=tile(16, 16, 8, 2), dkv=tile(16, 16, 4, 1), dbias=tile(16, 16, 8, 2)),
}
_FP32_BY_ARCH = {  # architectures on which rows of _FP32 spill
    arch: {**_FP32, 256: _FP32[256]._replace(fwd=tile(16, 16, 8, 2), dkv=tile(16, 16, 8, 1))}
    for arch in ("sm_80", "sm_90")
}
# Eight warps spill two registers if dq is rotated back.
_FP32_BY_ARCH["sm_80"][256] = _FP32_BY_ARCH["sm_80"][256]._replace(dq=tile(16, 16, 4, 2))
_FP32_BY_ARCH["gfx942"] = {  # four warps of 64 threads may use 512 registers each, eight only 256
    64: Tiles(fwd=tile(64, 16, 8, 2), dq=tile(64, 32, 4, 1), dkv=tile(32, 32, 4, 1), dbias=tile(64, 32, 4, 1)),
    128: _FP32[128],
    256: Tiles(fwd=tile(32, 16, 8, 2), dq=tile(16, 16, 4, 1), dkv=tile(16, 16, 4, 1), dbias=tile(16, 16, 4, 1)),
}
_HALF = {
    ("sm_80", 64): Tiles(fwd=tile(128, 64, 4, 3), dq=tile(128, 64, 8, 2), dkv=tile(32, 128, 8, 2)),
    ("sm_80", 128): Tiles(fwd=tile(64, 64, 8, 2), dq=tile(64, 64, 8, 2), dkv=tile(64, 64, 8, 2)),
    ("sm_80", 256): Tiles(fwd=tile(64, 64, 8, 2), dq=tile(64, 32, 8, 2), dkv=tile(32, 32, 8, 2)),
    ("sm_86", 64): Tiles(fwd=tile(128, 64, 8, 2), dq=tile(64, 64, 8, 2), dkv=tile(32, 128, 8, 2)),
    ("sm_86", 128): Tiles(fwd=tile(32, 64, 4, 2), dq=tile(64, 64, 8, 2), dkv=tile(32, 64, 8, 2)),
    ("sm_86", 256): Tiles(fwd=tile(64, 32, 8, 2), dq=tile(32, 32, 8, 2), dkv=tile(32, 32, 8, 2)),
    ("sm_90", 64): Tiles(fwd=tile(128, 64, 8, 3), dq=tile(128, 64, 8, 3), dkv=tile(64, 128, 8, 2)),
    ("sm_90", 128): Tiles(fwd=tile(128, 64, 8, 3), dq=tile(128, 64, 8, 2), dkv=tile(32, 128, 8, 2)),
    ("sm_90", 256): Tiles(fwd=tile(64, 64, 8, 2), dq=tile(64, 32, 8, 2), dkv=tile(32, 32, 8, 1, warpgroup_mma=False)),
    ("sm_100", 64): Tiles(fwd=tile(128, 64, 4, 3), dq=tile(128, 64, 4, 3), dkv=tile(64, 64, 8, 2)),
    ("sm_100", 128): Tiles(fwd=tile(128, 64, 8, 2), dq=tile(128, 64, 8, 2), dkv=tile(32, 64, 8, 1)),
    ("sm_100", 256): Tiles(fwd=tile(64, 64, 8, 2), dq=tile(64, 32, 8, 2), dkv=tile(32, 32, 8, 1, warpgroup_mma=False)),
    ("gfx942", 64): Tiles(fwd=tile(128, 64, 4, 1), dq=tile(128, 64, 4, 1), dkv=tile(64, 128, 4, 1)),
    ("gfx942", 128): Tiles(fwd=tile(128, 32, 4, 1), dq=tile(64, 64, 4, 1), dkv=tile(64, 64, 4, 1)),
    ("gfx942", 256): Tiles(fwd=tile(32, 64, 4, 1), dq=tile(64, 16, 4, 1), dkv=tile(16, 32, 4, 1)),
}
_AMPERE_RICH = {
    64: Tiles(fwd=tile(64, 64, 8, 2), dq=tile(64, 32, 8, 2), dkv=tile(32, 32, 8, 2), dbias=tile(64, 32, 8, 1)),
    128: Tiles(fwd=tile(64, 32, 8, 2), dq=tile(32, 16, 8, 1), dkv=tile(32, 32, 8, 2), dbias=tile(32, 32, 8, 1)),
    256: Tiles(fwd=tile(32, 32, 8, 2), dq=tile(32, 16, 8, 2), dkv=tile(32, 32, 8, 1), dbias=tile(16, 32, 8, 1)),
}
_HOPPER_RICH = {
    64: Tiles(fwd=tile(64, 64, 8, 2), dq=tile(64, 32, 8, 2), dkv=_hmma(32, 32, 8, 2), dbias=tile(64, 32, 8, 1)),
    128: Tiles(fwd=tile(64, 32, 8, 2), dq=tile(64, 32, 8, 2), dkv=_hmma(32, 32, 8, 2), dbias=_hmma(32, 32, 8, 1)),
    256: Tiles(fwd=_hmma(32, 32, 8, 2), dq=_hmma(32, 16, 8, 2), dkv=_hmma(32, 32, 8, 1), dbias=_hmma(16, 32, 8, 1)),
}
# More keys or stages spill with a soft cap.
_ADA_RICH = {
    **_AMPERE_RICH, 128: _AMPERE_RICH[128]._replace(dkv=tile(32, 32, 8, 1)),
    256: _AMPERE_RICH[256]._replace(fwd=tile(32, 16, 8, 2)),
}  # fmt: skip
_BLACKWELL_RICH = {**_HOPPER_RICH, 256: _HOPPER_RICH[256]._replace(fwd=_hmma(32, 32, 8, 1))}
_GFX942_RICH = {
    64: Tiles(fwd=tile(64, 32, 4, 1), dq=tile(32, 32, 4, 1), dkv=tile(32, 32, 4, 1), dbias=tile(64, 32, 4, 1)),
    128: Tiles(fwd=tile(32, 32, 4, 1), dq=tile(32, 32, 4, 1), dkv=tile(32, 32, 4, 1), dbias=tile(32, 32, 4, 1)),
    256: Tiles(fwd=tile(32, 32, 4, 1), dq=tile(16, 32, 4, 1), dkv=tile(16, 32, 4, 1), dbias=tile(16, 32, 4, 1)),
}
_HALF_RICH = {
    "sm_80": _AMPERE_RICH, "sm_86": _ADA_RICH, "sm_90": _HOPPER_RICH, "sm_100": _BLACKWELL_RICH,
    "gfx942": _GFX942_RICH,
}  # fmt: skip
TILES = {
    **{(arch, "half", width): tiles for (arch, width), tiles in _HALF.items()},
    **{(arch, "half_rich", width): tiles for arch, rows in _HALF_RICH.items() for width, tiles in rows.items()},
    **{
        (arch, "fp32", width): tiles
        for arch in launch.ARCHS
        for width, tiles in _FP32_BY_ARCH.get(arch, _FP32).items()
    },
}

# (architecture, precision, width) -> the measurement (committed in bench/results) for which the backend declines plain
# calls; see attention.declines. No measurement exists yet.
SLOWER: dict[tuple[str, str, int], Slower] = {}


def key(q: Tensor, rich: bool) -> tuple[str, str, int]:
    """Return the key of TILES for q's device, dtype and width; rich: has a bias, a soft cap, dropout or dalibi."""
    width = next(w for w in WIDTHS if q.shape[3] <= w)
    precision = "fp32" if q.dtype == torch.float32 else "half_rich" if rich else "half"
    return launch.arch(q), precision, width
