"""Muon on the GPU: Triton kernels before and after the matrix products, which are torch's, batched over the matrices.

One launch updates the momentum of all matrices of a table (kernels/core/foreach.py), another one their parameters. The
gradient norm stays on the device. Math: kernels/ops/muon.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.gpu import block_map, launch
from peakgpt.kernels.gpu.adamw import _finite, _join, _split
from peakgpt.kernels.gpu.launch import AotCase, Tile
from peakgpt.kernels.ops.muon import orthogonalize, update_lr

# Not measured on hardware. 8 elements a thread are two 16-byte loads of float32.
BLOCK_N, TILE = 1024, Tile(warps=4)
COLUMNS = 5  # of a table: elements, then the addresses of param, grad, remainder and momentum_buffer
BATCH_ELEMENTS = 1 << 26  # of one batch of products, whose temporaries take about three times its memory


@triton.jit
def muon_momentum_each(
    table_ptr,
    row_ptr,
    first_ptr,
    update_ptr,
    norm_ptr,
    momentum,
    one_minus_momentum,
    max_norm,
    DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    NESTEROV: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Update the momentum of one block of one matrix of a table, and store what is to be orthogonalized."""
    row = tl.load(row_ptr + tl.program_id(0))
    entry = table_ptr + row * COLUMNS
    N = tl.load(entry)
    at = (tl.program_id(0) - tl.load(first_ptr + row)).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    grad_ptr = block_map.address(entry + 2, DTYPE, ALIGN)
    momentum_buffer_ptr = block_map.address(entry + 4, tl.float32, ALIGN)
    live, scale = at < N, 1.0
    if norm_ptr is not None:
        live = at < tl.where(_finite(norm_ptr), N, 0)
        scale = tl.minimum(max_norm / (tl.load(norm_ptr) + 1e-6), 1.0)
    g = tl.load(grad_ptr + at, mask=live, other=0.0).to(tl.float32) * scale
    old = tl.load(momentum_buffer_ptr + at, mask=live, other=0.0)
    m = old + one_minus_momentum * (g - old)
    u = m
    if NESTEROV:
        u = g + momentum * (m - g)
    tl.store(momentum_buffer_ptr + at, m, mask=live)
    tl.store(update_ptr + row * N + at, u.to(DTYPE), mask=at < N)


@triton.jit
def muon_apply_each(
    table_ptr,
    row_ptr,
    first_ptr,
    update_ptr,
    norm_ptr,
    rate_ptr,
    lr,
    weight_decay,
    update_lr,
    DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Decay one block of one matrix of a table, and subtract its orthogonal update."""
    row = tl.load(row_ptr + tl.program_id(0))
    entry = table_ptr + row * COLUMNS
    N = tl.load(entry)
    at = (tl.program_id(0) - tl.load(first_ptr + row)).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    param_ptr = block_map.address(entry + 1, DTYPE, ALIGN)
    live = at < N
    if norm_ptr is not None:
        live = at < tl.where(_finite(norm_ptr), N, 0)
    if rate_ptr is not None:
        lr *= tl.load(rate_ptr)
        update_lr *= tl.load(rate_ptr)
    u = tl.load(update_ptr + row * N + at, mask=live, other=0.0).to(tl.float32)
    p = tl.load(param_ptr + at, mask=live, other=0.0)
    if tl.bfloat16 == DTYPE:
        remainder_ptr = block_map.address(entry + 3, tl.int16, ALIGN)
        master = _join(p, tl.load(remainder_ptr + at, mask=live, other=0)) * (1.0 - lr * weight_decay) - update_lr * u
        p, remainder = _split(master)
        tl.store(remainder_ptr + at, remainder, mask=live)
    else:
        p = p * (1.0 - lr * weight_decay) - update_lr * u
    tl.store(param_ptr + at, p, mask=live)


def objection(param, grad, remainder, momentum_buffer, norm=None, rate=None, **_) -> str | None:
    for name, tensor in (("momentum_buffer", momentum_buffer), ("norm", norm), ("rate", rate)):
        if tensor is not None and tensor.dtype != torch.float32:
            return f"takes {name} in float32, got {tensor.dtype}"
    return launch.objection(param)


def forward(outputs, saved, param, grad, remainder, momentum_buffer, norm, rate, **options):
    call = param, grad, remainder, momentum_buffer
    table = torch.tensor([[param.numel(), *(0 if t is None else t.data_ptr() for t in call)]])
    run_each(prepare(table, param.device), [call], norm, rate, **options)


def prepare(table: Tensor, device: torch.device) -> block_map.BlockMap:
    return block_map.BlockMap(table, device, BLOCK_N)


def run_each(blocks, calls, norm=None, rate=None, *, lr, momentum, nesterov, weight_decay, ns_coefficients, ns_steps,
             adjust_lr_fn, max_norm=None):  # fmt: skip
    if not blocks.count:
        return
    param = calls[0][0]
    update = param.new_empty(len(calls), *param.shape)
    shared = {
        "table_ptr": blocks.table, "row_ptr": blocks.row, "first_ptr": blocks.first, "norm_ptr": norm,
        "DTYPE": block_map.DTYPES[param.dtype], "ALIGN": blocks.align, "COLUMNS": COLUMNS, "BLOCK_N": BLOCK_N,
        "num_warps": TILE.warps, "num_stages": TILE.stages,
    }  # fmt: skip
    with launch.device_of(param):
        muon_momentum_each[(blocks.count,)](
            **shared, update_ptr=update, momentum=float(momentum), one_minus_momentum=1.0 - momentum,
            max_norm=None if max_norm is None else float(max_norm), NESTEROV=nesterov,
        )  # fmt: skip
        for batch in update.split(max(1, BATCH_ELEMENTS // param.numel())):
            batch.copy_(orthogonalize(batch, ns_coefficients, ns_steps))
        muon_apply_each[(blocks.count,)](
            **shared, update_ptr=update, rate_ptr=rate, lr=float(lr), weight_decay=float(weight_decay),
            update_lr=update_lr(lr, adjust_lr_fn, param.shape),
        )  # fmt: skip


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Yield the static check's cases."""
    numbers = ("momentum", "one_minus_momentum", "max_norm", "lr", "weight_decay", "update_lr")
    types = dict.fromkeys(numbers, "fp32") | block_map.AOT_TYPES | {"update_ptr": "*bf16"}
    constants = {"DTYPE": tl.bfloat16, "ALIGN": 16, "COLUMNS": COLUMNS, "BLOCK_N": BLOCK_N}
    yield launch.case(muon_momentum_each, "bf16 clipped", TILE, "fp32", {**constants, "NESTEROV": True}, **types)
    yield launch.case(muon_apply_each, "bf16 clipped", TILE, "fp32", constants, **types)
