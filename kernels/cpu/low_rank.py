"""Low-rank products of adapters on the CPU, added to those of the layers without a pass of their own over memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from peakgpt.kernels.cpu.gemm import ADD, STORE, gemm
from peakgpt.kernels.ops.linear_lora import split


def project(x: Tensor, a: Tensor, scale: float, out: Tensor | None) -> Tensor:
    """Return z = scale x A^T, (N, P r), in the memory of `out` if that is given."""
    z = x.new_empty(x.shape[0], a.shape[0]) if out is None else out.view(x.shape[0], a.shape[0])
    return gemm(x, a.t(), z).mul_(scale)


def add_product(y: Tensor, z: Tensor, b: Tensor, rows: Sequence[int] | None) -> None:
    """Add z B^T to the rows of each part of y, (N, F)."""
    for part, part_z, part_b in split(rows, z, b, y.shape[1]):
        gemm(part_z, part_b.t(), y[:, part], epilogue=ADD)


def backward(
    dy: Tensor, u: Tensor, z: Tensor, a: Tensor, b: Tensor, scale: float, rows: Sequence[int] | None, needs,
    into=(None, None),
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Compute the gradients of y = (scale u A^T) B^T.

    Args:
        dy: (N, F). u: (N, C). z: (N, P r).
        needs, into: for A and B, as in `linear_backward`.
    Returns:
        (dz, dA, dB). The gradient of u is dz A.
    """
    (need_a, need_b), (a_buffer, b_buffer), dz = needs, into, z.new_empty(z.shape)
    db = b_buffer if b_buffer is not None or not need_b else b.new_empty(b.shape)
    for part, part_dz, part_b in split(rows, dz, b, dy.shape[1]):
        gemm(dy[:, part], part_b, part_dz)
    dz.mul_(scale)
    for part, part_z, part_db in split(rows, z, db, dy.shape[1]) if need_b else ():
        gemm(dy[:, part].t(), part_z, part_db, epilogue=STORE if b_buffer is None else ADD)
    da = a_buffer if a_buffer is not None or not need_a else a.new_empty(a.shape)
    if need_a:
        gemm(dz.t(), u, da, epilogue=STORE if a_buffer is None else ADD)
    return dz, da if need_a else None, db if need_b else None
