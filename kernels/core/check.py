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


def integers(op: str, name: str, tensor: Tensor | None, device: torch.device) -> None:
    """tensor, unless None, is integer and on the device."""
    if tensor is None:
        return
    if tensor.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, expected int64 or int32")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {device}")


def indices(op: str, name: str, tensor: Tensor, limit: int, device: torch.device, *, ignore: int | None = None) -> None:
    """tensor is integer, on the device and, where looking costs no device sync, within 0..limit-1."""
    integers(op, name, tensor, device)
    if not readable(tensor) or tensor.numel() == 0:
        return
    live = tensor if ignore is None else tensor[tensor != ignore]
    if live.numel():
        low, high = (int(v) for v in torch.aminmax(live))
        if low < 0 or high >= limit:
            raise ValueError(f"{op}: {name} has values {low} to {high}, expected 0 to {limit - 1}")


def offsets(op: str, name: str, tensor: Tensor, total: int, device: torch.device) -> None:
    """tensor (N + 1,), N >= 1, is integer, on the device and, where looking is free, ascends from 0 to total."""
    shape(op, name, tensor, None)
    integers(op, name, tensor, device)
    if tensor.shape[0] < 2:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected at least 2 entries")
    if readable(tensor) and not (tensor[0] == 0 and tensor[-1] == total and (tensor[1:] >= tensor[:-1]).all()):
        raise ValueError(f"{op}: {name} is {tensor.tolist()}, expected to ascend from 0 to {total}")


def readable(tensor: Tensor) -> bool:
    """Whether values can be looked at, without waiting for a device."""
    return not torch.compiler.is_compiling() and type(tensor) is Tensor and tensor.device.type == "cpu"
