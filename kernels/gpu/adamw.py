"""AdamW in Triton: one launch updates one parameter, or all parameters of a table (kernels/core/foreach.py).

The step count and the gradient norm stay on the device, so the host never waits for them. Every program of the update
reads the step count of its parameter. A second launch increments it after the update. Math: kernels/ops/adamw.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.gpu import block_map, launch
from peakgpt.kernels.gpu.launch import AotCase, Tile

# Not measured on hardware. 8 elements a thread are two 16-byte loads of float32.
BLOCK_N, TILE = 1024, Tile(warps=4)
COLUMNS = 7  # of a table: elements, then the addresses of the tensors from param to step


@triton.jit
def _finite(norm_ptr):
    return tl.abs(tl.load(norm_ptr)) < float("inf")  # false for NaN


@triton.jit
def _one_minus_power(t, log_beta):
    """Return 1 - beta^t. Small values use a Taylor series, because the subtraction would cancel most digits."""
    u = t * log_beta
    series = 1.0 + u / 8.0
    for k in tl.static_range(7, 1, -1):
        series = 1.0 + u / k * series
    return tl.where(u > -0.5, -u * series, 1.0 - tl.exp(u))


@triton.jit
def _join(param, remainder):
    """Return the float32 master value of a bfloat16 parameter; kernels/ops/adamw.py explains the formula."""
    bits = param.to(tl.int16, bitcast=True).to(tl.int32)
    magnitude = tl.maximum(((bits & 0x7FFF) << 16) + remainder.to(tl.int32), 0)
    return (magnitude | ((bits >> 15) << 31)).to(tl.float32, bitcast=True)


@triton.jit
def _split(master):
    """Return the bfloat16 parameter and the int16 remainder of a float32 master value."""
    # NVIDIA's NaN has all bits set, which the addition below would overflow.
    bits = tl.where(master == master, master.to(tl.int32, bitcast=True), 0x7FC00000)
    return ((bits + 0x8000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), bits.to(tl.int16)


@triton.jit
def _update(
    param_ptr,
    grad_ptr,
    remainder_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    step_ptr,
    norm_ptr,
    rate_ptr,
    at,
    N,
    lr,
    weight_decay,
    beta1,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    log_beta1,
    log_beta2,
    eps,
    max_norm,
    MASKED: tl.constexpr,
):
    """Update the elements `at` of a parameter and its moments. A norm that is not finite leaves all unchanged.

    MASKED is False only if all elements exist and the norm is finite.
    """
    end, scale = N, 1.0
    if norm_ptr is not None:
        end = tl.where(_finite(norm_ptr), N, 0)
        scale = tl.minimum(max_norm / (tl.load(norm_ptr) + 1e-6), 1.0)
    live = at < end
    if not MASKED:
        live = tl.full(at.shape, 1, tl.int1)
    if rate_ptr is not None:
        lr *= tl.load(rate_ptr)
    t = tl.load(step_ptr) + 1.0
    correction1, correction2 = _one_minus_power(t, log_beta1), _one_minus_power(t, log_beta2)
    g = tl.load(grad_ptr + at, mask=live, other=0.0).to(tl.float32) * scale
    p = tl.load(param_ptr + at, mask=live, other=0.0)
    if remainder_ptr is not None:
        p = _join(p, tl.load(remainder_ptr + at, mask=live, other=0))
    m = tl.load(exp_avg_ptr + at, mask=live, other=0.0)
    v = tl.load(exp_avg_sq_ptr + at, mask=live, other=0.0)
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * g * g
    p = p * (1.0 - lr * weight_decay) - lr / correction1 * m / (tl.sqrt(v / correction2) + eps)
    tl.store(exp_avg_ptr + at, m, mask=live)
    tl.store(exp_avg_sq_ptr + at, v, mask=live)
    if remainder_ptr is not None:
        p, remainder = _split(p)
        tl.store(remainder_ptr + at, remainder, mask=live)
    tl.store(param_ptr + at, p, mask=live)


@triton.jit
def adamw_update(
    param_ptr,
    grad_ptr,
    remainder_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    step_ptr,
    norm_ptr,
    rate_ptr,
    N,
    lr,
    weight_decay,
    beta1,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    log_beta1,
    log_beta2,
    eps,
    max_norm,
    BLOCK_N: tl.constexpr,
):
    """Update one block of a parameter."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    _update(
        param_ptr, grad_ptr, remainder_ptr, exp_avg_ptr, exp_avg_sq_ptr, step_ptr, norm_ptr, rate_ptr, at, N, lr,
        weight_decay, beta1, beta2, one_minus_beta1, one_minus_beta2, log_beta1, log_beta2, eps, max_norm, MASKED=True,
    )  # fmt: skip


@triton.jit
def adamw_update_each(
    table_ptr,
    row_ptr,
    first_ptr,
    norm_ptr,
    rate_ptr,
    lr,
    weight_decay,
    beta1,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    log_beta1,
    log_beta2,
    eps,
    max_norm,
    DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Update one block of one parameter of a table; BlockMap says which."""
    row = tl.load(row_ptr + tl.program_id(0))
    entry = table_ptr + row * COLUMNS
    start = (tl.program_id(0) - tl.load(first_ptr + row)).to(tl.int64) * BLOCK_N
    N, at = tl.load(entry), start + tl.arange(0, BLOCK_N)
    param_ptr, grad_ptr = block_map.address(entry + 1, DTYPE, ALIGN), block_map.address(entry + 2, DTYPE, ALIGN)
    remainder_ptr = None
    if tl.bfloat16 == DTYPE:
        remainder_ptr = block_map.address(entry + 3, tl.int16, ALIGN)
    exp_avg_ptr = block_map.address(entry + 4, tl.float32, ALIGN)
    exp_avg_sq_ptr = block_map.address(entry + 5, tl.float32, ALIGN)
    step_ptr = block_map.address(entry + 6, tl.float32, 4)
    whole = start + BLOCK_N <= N
    if norm_ptr is not None:
        whole = whole & _finite(norm_ptr)
    if whole:  # without a mask, its loads have 16 bytes; the compiler does not know that N is a multiple of 16
        _update(
            param_ptr, grad_ptr, remainder_ptr, exp_avg_ptr, exp_avg_sq_ptr, step_ptr, norm_ptr, rate_ptr, at, N, lr,
            weight_decay, beta1, beta2, one_minus_beta1, one_minus_beta2, log_beta1, log_beta2, eps, max_norm,
            MASKED=False,
        )  # fmt: skip
    else:
        _update(
            param_ptr, grad_ptr, remainder_ptr, exp_avg_ptr, exp_avg_sq_ptr, step_ptr, norm_ptr, rate_ptr, at, N, lr,
            weight_decay, beta1, beta2, one_minus_beta1, one_minus_beta2, log_beta1, log_beta2, eps, max_norm,
            MASKED=True,
        )  # fmt: skip


@triton.jit
def _count_step(step_ptr, norm_ptr):
    live = True
    if norm_ptr is not None:
        live = _finite(norm_ptr)
    tl.store(step_ptr, tl.load(step_ptr) + 1.0, mask=live)


@triton.jit
def adamw_step(step_ptr, norm_ptr):
    """Increment the step count unless the norm is not finite."""
    _count_step(step_ptr, norm_ptr)


@triton.jit
def adamw_step_each(table_ptr, norm_ptr, COLUMNS: tl.constexpr):
    """Increment the step count of one parameter of a table."""
    _count_step(block_map.address(table_ptr + tl.program_id(0) * COLUMNS + 6, tl.float32, 4), norm_ptr)


def objection(param, grad, remainder, exp_avg, exp_avg_sq, step, norm, rate=None, **_) -> str | None:
    for name, tensor in (("step", step), ("exp_avg", exp_avg), ("norm", norm), ("rate", rate)):
        if tensor is not None and tensor.dtype != torch.float32:
            return f"takes {name} in float32, got {tensor.dtype}"
    return launch.objection(param)


def forward(outputs, saved, param, grad, remainder, exp_avg, exp_avg_sq, step, norm, rate, *, lr, beta1, beta2, eps,
            weight_decay, max_norm):  # fmt: skip
    with launch.device_of(param):
        adamw_update[(triton.cdiv(param.numel(), BLOCK_N),)](
            param_ptr=param, grad_ptr=grad, remainder_ptr=remainder, exp_avg_ptr=exp_avg,
            exp_avg_sq_ptr=exp_avg_sq, step_ptr=step, norm_ptr=norm, rate_ptr=rate, N=param.numel(),
            **_numbers(lr, beta1, beta2, eps, weight_decay, max_norm),
            BLOCK_N=BLOCK_N, num_warps=TILE.warps, num_stages=TILE.stages,
        )  # fmt: skip
        adamw_step[(1,)](step_ptr=step, norm_ptr=norm, num_warps=1)


def prepare(table: Tensor, device: torch.device) -> block_map.BlockMap:
    return block_map.BlockMap(table, device, BLOCK_N, scalars=1)


def run_each(blocks, calls, norm=None, rate=None, *, lr, beta1, beta2, eps, weight_decay, max_norm=None):
    param = calls[0][0]
    with launch.device_of(param):
        if blocks.count:
            adamw_update_each[(blocks.count,)](
                table_ptr=blocks.table, row_ptr=blocks.row, first_ptr=blocks.first, norm_ptr=norm, rate_ptr=rate,
                **_numbers(lr, beta1, beta2, eps, weight_decay, max_norm),
                DTYPE=block_map.DTYPES[param.dtype], ALIGN=blocks.align, COLUMNS=COLUMNS, BLOCK_N=BLOCK_N,
                num_warps=TILE.warps, num_stages=TILE.stages,
            )  # fmt: skip
        adamw_step_each[(len(calls),)](table_ptr=blocks.table, norm_ptr=norm, COLUMNS=COLUMNS, num_warps=1)


def _numbers(lr, beta1, beta2, eps, weight_decay, max_norm) -> dict[str, float | None]:
    """Return the numbers of a kernel, computed in double: 1 - float32(0.999) has a relative error of 1e-5."""
    return {
        "lr": float(lr), "weight_decay": float(weight_decay), "beta1": beta1, "beta2": beta2,
        "one_minus_beta1": 1.0 - beta1, "one_minus_beta2": 1.0 - beta2, "log_beta1": _log(beta1),
        "log_beta2": _log(beta2), "eps": float(eps), "max_norm": None if max_norm is None else float(max_norm),
    }  # fmt: skip


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0.0 else -math.inf


def aot_cases(arch: str) -> Iterator[AotCase]:
    """Yield the static check's cases."""
    numbers = [n for n in adamw_update.arg_names if not n.endswith("_ptr") and n not in ("N", "BLOCK_N")]
    types = dict.fromkeys(numbers, "fp32") | {"param_ptr": "*bf16", "grad_ptr": "*bf16", "remainder_ptr": "*i16"}
    yield launch.case(adamw_update, "bf16 clipped", TILE, "fp32", {"BLOCK_N": BLOCK_N}, **types)
    each = {k: v for k, v in types.items() if not k.endswith("_ptr")} | block_map.AOT_TYPES
    constants = {"DTYPE": tl.bfloat16, "ALIGN": 16, "COLUMNS": COLUMNS, "BLOCK_N": BLOCK_N}
    yield launch.case(adamw_update_each, "bf16 clipped", TILE, "fp32", constants, **each)
    yield launch.case(adamw_step_each, "clipped", Tile(warps=1), "fp32", {"COLUMNS": COLUMNS}, table_ptr="*i64")
    yield launch.case(adamw_step, "clipped", Tile(warps=1), "fp32", {})
