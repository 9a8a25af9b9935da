"""Muon on the CPU: csrc/ops/muon.cpp. Small matrices are updated side by side, one thread each."""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import _C, DTYPES, dtype_objection, threads, workspace
from peakgpt.kernels.ops.muon import update_lr

ONE_THREAD_SIDE = 256  # up to this smaller side one product does not keep several threads busy


def objection(param: Tensor, grad: Tensor, remainder: Tensor | None, momentum_buffer: Tensor, *_, **__) -> str | None:
    if momentum_buffer.dtype != torch.float32:
        return f"takes a float32 momentum, got {str(momentum_buffer.dtype).removeprefix('torch.')}"
    return dtype_objection(param)


def forward(outputs, saved, param, grad, remainder, momentum_buffer, norm, rate, **options):
    _C.muon(
        param=param,
        grad=grad,
        momentum_buffer=momentum_buffer,
        remainder=remainder,
        **_shared(param, 1, norm, rate, **options),
    )


def prepare(table: Tensor, device: torch.device) -> Tensor:
    return table


def run_each(table, calls, norm=None, rate=None, **options):
    _C.muon_each(count=len(table), table=table, **_shared(calls[0][0], len(table), norm, rate, **options))


def _shared(param, count, norm, rate, *, lr, momentum, nesterov, weight_decay, ns_coefficients, ns_steps, adjust_lr_fn,
            max_norm=None):  # fmt: skip
    """Return the arguments that all matrices of a call share; they have the shape of param."""
    sizes = {"dtype": DTYPES[param.dtype], "rows": param.shape[0], "columns": param.shape[1]}
    workers = max(1, min(threads(), count)) if min(param.shape) <= ONE_THREAD_SIDE else 1
    a, b, c = ns_coefficients
    return {
        **sizes, "lr": float(lr), "weight_decay": float(weight_decay), "momentum": float(momentum),
        "update_lr": update_lr(lr, adjust_lr_fn, param.shape), "nesterov": nesterov, "ns_steps": ns_steps, "ns_a": a,
        "ns_b": b, "ns_c": c, "scratch": workspace("muon", torch.uint8, workers * _C.muon_scratch(**sizes)),
        "workers": workers, "norm": norm, "max_norm": max_norm or 0.0, "rate": rate, "threads": threads(),
    }  # fmt: skip
