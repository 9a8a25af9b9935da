"""Checks that every contract shares; each raises ValueError with got and expected."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shape(op: str, name: str, tensor: Tensor | None, *expected: int | None) -> None:
    """tensor has exactly these sizes; None stands for any."""
    if tensor is None:
        return
    fits = len(tensor.shape) == len(expected)
    for got, size in zip(tensor.shape, expected, strict=False):  # a loop: any() costs every op call some 3 us
        fits = fits and (size is None or got == size)
    if not fits:
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected ({wanted})")


def width(op: str, name: str, tensor: Tensor) -> int:
    """Size of the last axis."""
    if tensor.dim() == 0:
        raise ValueError(f"{op}: {name} has shape (), expected at least one axis")
    return tensor.shape[-1]


def same(op: str, first: str, x: Tensor, *, mixed: bool = False, **others: Tensor | None) -> None:
    """Every other tensor lies on x's device in x's floating dtype, or in float32 where `mixed`."""
    if x.dtype not in FLOATS:
        raise ValueError(f"{op}: {first} has dtype {x.dtype}, expected a floating dtype")
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {first}'s device {x.device}")
        if tensor.dtype != x.dtype and not (mixed and tensor.dtype == torch.float32):
            raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, expected {first}'s dtype {x.dtype}")


def indices(op: str, name: str, tensor: Tensor, limit: int, device: torch.device, *, ignore: int | None = None) -> None:
    """tensor is integer, on the device and, where looking costs no device sync, within 0..limit-1."""
    if tensor.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, expected int64 or int32")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {device}")
    if torch.compiler.is_compiling() or type(tensor) is not Tensor or device.type != "cpu" or tensor.numel() == 0:
        return
    live = tensor if ignore is None else tensor[tensor != ignore]
    if live.numel():
        low, high = (int(v) for v in torch.aminmax(live))
        if low < 0 or high >= limit:
            raise ValueError(f"{op}: {name} has values {low} to {high}, expected 0 to {limit - 1}")
