"""Launch parameters of attention by class of device, precision and head width, and where torch's own is faster.

Committed data: nothing is timed when a program starts. `python -m peakgpt.bench device --only attention` times them
beside torch's on the device at hand; a person commits what follows from that, with device and date.
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
    newest_mma: bool = True  # False: 64 rows, which wgmma and tcgen05 need, would spill; HMMA


class Tiles(NamedTuple):
    """One row of the table: the tile of each kernel."""

    fwd: AttentionTile
    dq: AttentionTile
    dkv: AttentionTile
    dbias: AttentionTile | None = None  # only where there may be a bias


@dataclass(frozen=True)
class Slower:
    """A measurement: torch's scaled_dot_product_attention takes plain calls of at least so many keys faster."""

    than: str
    keys: int
    device: str
    date: str

    def __str__(self) -> str:
        return f"slower than torch's {self.than} here: measured, {self.device}, {self.date}"


def tile(block_q: int, block_k: int, warps: int, stages: int, newest_mma: bool = True) -> AttentionTile:
    return AttentionTile(BLOCK_Q=block_q, BLOCK_K=block_k, warps=warps, stages=stages, newest_mma=newest_mma)


def _old(*sizes: int) -> AttentionTile:
    return tile(*sizes, newest_mma=False)


WIDTHS = (64, 128, 256)  # a row serves the head widths up to its own
PRECISIONS = ("half", "half+", "fp32")  # half+: with bias, dropout or the gradient of slopes, which take registers

# Unmeasured: compiled without spills by Triton 3.7.1, not yet timed on hardware. Larger tiles that were tried first
# spill (sm_90, D 64: forward 128 x 128 with 4 warps; D 128: dkv 64 x 128).
_FP32 = {
    64: Tiles(fwd=tile(64, 16, 8, 2), dq=tile(64, 32, 8, 2), dkv=tile(32, 32, 8, 2), dbias=tile(64, 32, 8, 2)),
    128: Tiles(fwd=tile(32, 16, 8, 2), dq=tile(16, 16, 8, 2), dkv=tile(16, 32, 8, 1), dbias=tile(32, 16, 8, 2)),
    256: Tiles(fwd=tile(16, 16, 4, 2), dq=tile(16, 16, 8, 2), dkv=tile(16, 16, 4, 1), dbias=tile(16, 16, 8, 2)),
}
_FP32_BY_CLASS = {  # where the rows above leave a spill
    arch: {**_FP32, 256: _FP32[256]._replace(fwd=tile(16, 16, 8, 2), dkv=tile(16, 16, 8, 1))}
    for arch in ("sm_80", "sm_90")
}
# Eight warps spill two registers where dq is turned back.
_FP32_BY_CLASS["sm_80"][256] = _FP32_BY_CLASS["sm_80"][256]._replace(dq=tile(16, 16, 4, 2))
_FP32_BY_CLASS["gfx942"] = {  # four warps of 64 threads may use 512 registers each, eight only 256
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
    ("sm_90", 256): Tiles(fwd=tile(64, 64, 8, 2), dq=tile(64, 32, 8, 2), dkv=tile(32, 32, 8, 1, newest_mma=False)),
    ("sm_100", 64): Tiles(fwd=tile(128, 64, 4, 3), dq=tile(128, 64, 4, 3), dkv=tile(64, 64, 8, 2)),
    ("sm_100", 128): Tiles(fwd=tile(128, 64, 8, 2), dq=tile(128, 64, 8, 2), dkv=tile(32, 64, 8, 1)),
    ("sm_100", 256): Tiles(fwd=tile(64, 64, 8, 2), dq=tile(64, 32, 8, 2), dkv=tile(32, 32, 8, 1, newest_mma=False)),
    ("gfx942", 64): Tiles(fwd=tile(128, 64, 4, 1), dq=tile(128, 64, 4, 1), dkv=tile(64, 128, 4, 1)),
    ("gfx942", 128): Tiles(fwd=tile(128, 32, 4, 1), dq=tile(64, 64, 4, 1), dkv=tile(64, 64, 4, 1)),
    ("gfx942", 256): Tiles(fwd=tile(32, 64, 4, 1), dq=tile(64, 16, 4, 1), dkv=tile(16, 32, 4, 1)),
}
_AMPERE_PLUS = {
    64: Tiles(fwd=tile(64, 64, 8, 2), dq=tile(64, 32, 8, 2), dkv=tile(32, 32, 8, 2), dbias=tile(64, 32, 8, 1)),
    128: Tiles(fwd=tile(64, 32, 8, 2), dq=tile(32, 16, 8, 1), dkv=tile(32, 32, 8, 2), dbias=tile(32, 32, 8, 1)),
    256: Tiles(fwd=tile(32, 32, 8, 2), dq=tile(32, 16, 8, 2), dkv=tile(32, 32, 8, 1), dbias=tile(16, 32, 8, 1)),
}
_HOPPER_PLUS = {
    64: Tiles(fwd=tile(64, 64, 8, 2), dq=tile(64, 32, 8, 2), dkv=_old(32, 32, 8, 2), dbias=tile(64, 32, 8, 1)),
    128: Tiles(fwd=tile(64, 32, 8, 2), dq=tile(64, 32, 8, 2), dkv=_old(32, 32, 8, 2), dbias=_old(32, 32, 8, 1)),
    256: Tiles(fwd=_old(32, 32, 8, 2), dq=_old(32, 16, 8, 2), dkv=_old(32, 32, 8, 1), dbias=_old(16, 32, 8, 1)),
}
_GFX942_PLUS = {
    64: Tiles(fwd=tile(64, 32, 4, 1), dq=tile(32, 32, 4, 1), dkv=tile(32, 32, 4, 1), dbias=tile(64, 32, 4, 1)),
    128: Tiles(fwd=tile(32, 32, 4, 1), dq=tile(32, 32, 4, 1), dkv=tile(32, 32, 4, 1), dbias=tile(32, 32, 4, 1)),
    256: Tiles(fwd=tile(32, 32, 4, 1), dq=tile(16, 32, 4, 1), dkv=tile(16, 32, 4, 1), dbias=tile(16, 32, 4, 1)),
}
_PLUS = {
    "sm_80": _AMPERE_PLUS, "sm_86": _AMPERE_PLUS, "sm_90": _HOPPER_PLUS, "sm_100": _HOPPER_PLUS, "gfx942": _GFX942_PLUS
}  # fmt: skip
TILES = {
    **{(arch, "half", width): tiles for (arch, width), tiles in _HALF.items()},
    **{(arch, "half+", width): tiles for arch, rows in _PLUS.items() for width, tiles in rows.items()},
    **{
        (arch, "fp32", width): tiles
        for arch in launch.CLASSES
        for width, tiles in _FP32_BY_CLASS.get(arch, _FP32).items()
    },
}

# (class, precision, width) -> a committed measurement (bench/results) of a plain call; none yet.
SLOWER: dict[tuple[str, str, int], Slower] = {}


def key(q: Tensor, rich: bool) -> tuple[str, str, int]:
    """The row of TILES for q's device, dtype and width; `rich` calls have bias, dropout or want dalibi."""
    width = next(w for w in WIDTHS if q.shape[3] <= w)
    precision = "fp32" if q.dtype == torch.float32 else "half+" if rich else "half"
    return launch.arch(q), precision, width
