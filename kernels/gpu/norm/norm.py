"""The Triton backend of layernorm, rmsnorm, add_layernorm and add_rmsnorm.

The four ops run the same kernels (norm_kernels.py). They differ in two facts, the fields of `Norm`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from peakgpt.kernels.gpu import launch, overlap
from peakgpt.kernels.gpu.launch import AotCase, Tile
from peakgpt.kernels.gpu.norm.norm_kernels import norm_bwd, norm_bwd_dwdb, norm_bwd_wide, norm_fwd, norm_fwd_wide
from peakgpt.kernels.gpu.reduce import empty_partials, sum_partials
from peakgpt.kernels.ops.norm import default_eps


@dataclass(frozen=True, kw_only=True)
class NormTile(Tile):
    BLOCK_R: int  # rows that a program holds at once


# Keyed by the widest row served (the next power of two of C). All device classes share the rows: the kernels are
# memory-bound, so only the width matters. Not measured on hardware; 8 to 32 elements a thread forward, no spills.
FORWARD = {
    512: NormTile(BLOCK_R=8, warps=4),
    2048: NormTile(BLOCK_R=2, warps=4),
    8192: NormTile(BLOCK_R=1, warps=8),
    16384: NormTile(BLOCK_R=1, warps=16),
}
BACKWARD = {
    512: NormTile(BLOCK_R=4, warps=4),
    1024: NormTile(BLOCK_R=1, warps=4),
    4096: NormTile(BLOCK_R=1, warps=8),
    16384: NormTile(BLOCK_R=1, warps=16),
}
MAX_BLOCK_C = 16384  # wider rows do not fit in registers and take norm_fwd_wide and norm_bwd_wide
WIDE_BLOCK_C, WIDE_TILE = 8192, NormTile(BLOCK_R=1, warps=16)
# Up to this width norm_bwd also sums dw and db. Beyond, its five float32 rows (x, dy, w and both sums) do not fit in
# the registers, and norm_bwd_dwdb computes the sums: 64 columns of 2 bytes are one 128-byte line.
MAX_SUMMED_WIDTH = 4096
DWDB_BLOCK_C, DWDB_TILE = 64, NormTile(BLOCK_R=32, warps=4)
PROGRAMS_PER_PROCESSOR = 4  # of norm_bwd and norm_bwd_dwdb, whose programs loop over rows


@dataclass(frozen=True)
class Norm:
    """The backend functions of one norm op.

    Args:
        centered: True for LayerNorm, which subtracts the mean and has a bias b; False for RMSNorm.
        residual: the op normalizes x + residual, and this sum is its first output.
    """

    centered: bool
    residual: bool

    def objection(self, *tensors: Tensor | None, **_) -> str | None:
        x, _, w, b = self._unpack(tensors)
        if not x.shape[-1]:
            return "takes rows of at least 1, got 0"
        if b is not None and b.dtype != w.dtype:
            return f"takes w and b of one dtype, got {w.dtype} and {b.dtype}"
        return launch.objection(x)

    def forward(self, outputs, saved, *tensors, eps, offset=0.0) -> None:
        total = outputs[0] if self.residual else None
        _forward(*self._unpack(tensors), total, outputs[-1], *self._statistics(saved), eps, offset)

    def backward(self, grads, inputs, outputs, saved, needs, *, eps, offset=0.0) -> Sequence[Tensor | None]:
        need_x, need_residual, need_w, need_b = self._unpack(needs, False)
        _, _, w, _ = self._unpack(inputs)
        x, dy, dsum = inputs[0], grads[-1], None
        if self.residual:
            x, dsum = outputs[0], grads[0]
            dy = torch.zeros_like(x) if dy is None else dy
        needed = need_x or need_residual, need_w, need_b
        dx, dw, db = _backward(dy, dsum, x, w, *self._statistics(saved), needed, offset)
        # Autograd copies dx before it accumulates into a gradient that x and residual share.
        return dx, *((dx,) if self.residual else ()), dw, *((db,) if self.centered else ())

    def aot_cases(self, arch: str) -> Iterator[AotCase]:
        """Yield the static check's cases: both directions at the widest C of each row, the last with a masked tail."""
        types = {"mu_ptr": "*fp32", "r_ptr": "*fp32", "partial_ptr": "*fp32", "eps": "fp32"}
        hot = self.centered and not self.residual  # the other ops run almost the same kernels
        offset = 1.0 if self.residual and not self.centered else 0.0  # add_rmsnorm stands for both with an offset
        for kernel, wide_kernel, table, residual_names in (
            (norm_fwd, norm_fwd_wide, FORWARD, ("residual_ptr", "sum_ptr", "stride_residual_r")),
            (norm_bwd, norm_bwd_wide, BACKWARD, ("dsum_ptr", "stride_dsum_r")),
        ):
            absent = {} if self.residual else dict.fromkeys(residual_names)
            if not self.centered:
                absent |= {"mu_ptr": None} | ({"b_ptr": None} if kernel is norm_fwd else {})
            for block, tile in table.items():
                width = block if block < max(table) else block - 128
                sizes = {"C": width, "OFFSET": offset, "BLOCK_R": tile.BLOCK_R, "BLOCK_C": block}
                if kernel is norm_fwd:
                    sizes["OVERLAP"] = arch in overlap.ARCHS
                if kernel is norm_bwd and width > MAX_SUMMED_WIDTH:
                    sizes["partial_ptr"] = None
                yield launch.case(kernel, f"bf16 C={width}", tile, "bf16", {**absent, **sizes}, hot=hot, **types)
            sizes = {**absent, "OFFSET": offset, "BLOCK_C": WIDE_BLOCK_C}
            yield launch.case(wide_kernel, "bf16 wide", WIDE_TILE, "bf16", sizes, hot=hot, **types)
        if hot:
            sizes = {"C": 8192, "BLOCK_R": DWDB_TILE.BLOCK_R, "BLOCK_C": DWDB_BLOCK_C}
            yield launch.case(norm_bwd_dwdb, "bf16 C=8192", DWDB_TILE, "bf16", sizes, **types)

    def _unpack(self, values: Sequence[Any], missing: Any = None) -> tuple[Any, Any, Any, Any]:
        """Map values in the order of the op's tensors to (x, residual, w, b), with `missing` for absent tensors."""
        x, *rest = values
        residual = rest.pop(0) if self.residual else missing
        return x, residual, rest[0], rest[1] if self.centered else missing

    def _statistics(self, saved: Sequence[Tensor]) -> tuple[Tensor | None, Tensor]:
        """Return mu and r; mu is None for RMSNorm."""
        return (saved[0], saved[1]) if self.centered else (None, saved[0])


def _forward(x, residual, w, b, total, y, mu, r, eps, offset) -> None:
    """Fill y and r, mu unless it is None, and total = x + residual if there is a residual."""
    x, residual = launch.as_rows(x), residual if residual is None else launch.as_rows(residual)
    (count, width), block = x.shape, triton.next_power_of_2(x.shape[1])
    arguments = {
        "x_ptr": x, "residual_ptr": residual, "w_ptr": w, "b_ptr": b,
        "sum_ptr": total, "y_ptr": y, "mu_ptr": mu, "r_ptr": r, "stride_x_r": x.stride(0),
        "stride_residual_r": 0 if residual is None else residual.stride(0), "eps": default_eps(x.dtype, eps),
        "C": width, "OFFSET": float(offset),
    }  # fmt: skip
    with launch.device_of(x):
        if block > MAX_BLOCK_C:
            norm_fwd_wide[(count,)](BLOCK_C=WIDE_BLOCK_C, num_warps=WIDE_TILE.warps, **arguments)
            return
        tile = _tile(FORWARD, width)
        norm_fwd[(triton.cdiv(count, tile.BLOCK_R),)](
            R=count, BLOCK_R=tile.BLOCK_R, BLOCK_C=block, num_warps=tile.warps, num_stages=tile.stages, **arguments,
            **overlap.options(x, count),
        )  # fmt: skip


def _backward(dy, dsum, x, w, mu, r, needs, offset) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (dx, dw, db). dw and db are None if not needed; dsum is the gradient of x + residual, or None."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, dy, dsum = launch.as_rows(x), launch.as_rows(dy), dsum if dsum is None else launch.as_rows(dsum)
    (count, width), block = x.shape, triton.next_power_of_2(x.shape[1])
    sums = [torch.empty_like(w) for _ in range(1 if mu is None else 2)]
    need_sums, partial = any(needs[1:]), None
    arguments = {
        "dy_ptr": dy, "dsum_ptr": dsum, "x_ptr": x, "w_ptr": w, "mu_ptr": mu, "r_ptr": r,
        "dx_ptr": dx, "stride_dy_r": dy.stride(0), "stride_dsum_r": 0 if dsum is None else dsum.stride(0),
        "stride_x_r": x.stride(0), "C": width, "OFFSET": float(offset),
    }  # fmt: skip
    with launch.device_of(x):
        if block > MAX_BLOCK_C:
            norm_bwd_wide[(count,)](BLOCK_C=WIDE_BLOCK_C, num_warps=WIDE_TILE.warps, **arguments)
        else:
            tile = _tile(BACKWARD, width)
            programs = min(triton.cdiv(count, tile.BLOCK_R), PROGRAMS_PER_PROCESSOR * launch.processors(x))
            if need_sums and width <= MAX_SUMMED_WIDTH:
                partial = empty_partials(x, len(sums), programs, width)
            norm_bwd[(programs,)](
                partial_ptr=partial, R=count, BLOCK_R=tile.BLOCK_R, BLOCK_C=block,
                num_warps=tile.warps, num_stages=tile.stages, **arguments,
            )  # fmt: skip
        if need_sums:
            sum_partials(_dwdb_partials(dy, x, mu, r, len(sums)) if partial is None else partial, *sums)
    return dx, sums[0] if needs[1] else None, sums[1] if needs[2] else None


def _dwdb_partials(dy, x, mu, r, groups: int) -> Tensor:
    (count, width), columns = x.shape, triton.cdiv(x.shape[1], DWDB_BLOCK_C)
    most = triton.cdiv(PROGRAMS_PER_PROCESSOR * launch.processors(x), columns)
    programs = min(triton.cdiv(count, DWDB_TILE.BLOCK_R), most)
    partial = empty_partials(x, groups, programs, width)
    norm_bwd_dwdb[(columns, programs)](
        dy_ptr=dy, x_ptr=x, mu_ptr=mu, r_ptr=r, partial_ptr=partial,
        stride_dy_r=dy.stride(0), stride_x_r=x.stride(0), R=count, C=width,
        BLOCK_R=DWDB_TILE.BLOCK_R, BLOCK_C=DWDB_BLOCK_C, num_warps=DWDB_TILE.warps, num_stages=DWDB_TILE.stages,
    )  # fmt: skip
    return partial


def _tile(table: dict[int, NormTile], width: int) -> NormTile:
    return next(tile for widest, tile in table.items() if width <= widest)
