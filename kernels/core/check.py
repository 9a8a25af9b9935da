"""Checks shared by the contracts. Each raises ValueError with got and expected."""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.core.recording import run_or_record

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shape(op: str, name: str, tensor: Tensor | None, *expected: int | None) -> None:
    """Check the sizes of a tensor. None in `expected` allows any size; a tensor that is None passes."""
    if tensor is None:
        return
    fits = len(tensor.shape) == len(expected)
    for got, size in zip(tensor.shape, expected, strict=False):  # a loop, because any() adds 3 us to every op call
        fits = fits and (size is None or got == size)
    if not fits:
        sizes = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected ({sizes})")


def width(op: str, name: str, tensor: Tensor) -> int:
    """Return the size of the last axis. The tensor must have one."""
    if tensor.dim() == 0:
        raise ValueError(f"{op}: {name} has shape (), expected at least one axis")
    return tensor.shape[-1]


def same(op: str, first: str, x: Tensor, *, mixed: bool = False, **others: Tensor | None) -> None:
    """Check that the other tensors have x's device and x's floating dtype, or float32 if `mixed`."""
    if x.dtype not in FLOATS:
        raise ValueError(f"{op}: {first} has dtype {x.dtype}, expected a floating dtype")
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {first}'s device {x.device}")
        if tensor.dtype != x.dtype and not (mixed and tensor.dtype == torch.float32):
            raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, expected {first}'s dtype {x.dtype}")


def floats(op: str, name: str, tensor: Tensor | None, device: torch.device) -> None:
    """Check that a tensor has a floating dtype, any of them, and is on the device. None passes."""
    if tensor is None:
        return
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, expected a floating dtype")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {device}")


def both(op: str, first: str, a: Tensor | None, second: str, b: Tensor | None) -> None:
    """Check that two tensors are given together, or neither of them."""
    if (a is None) != (b is None):
        raise ValueError(f"{op}: got only {second if a is None else first}, expected {first} and {second}, or neither")


def integers(op: str, name: str, tensor: Tensor | None, device: torch.device) -> None:
    """Check that a tensor is int64 or int32 and on the device. None passes."""
    if tensor is None:
        return
    if tensor.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, expected int64 or int32")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {device}")


def contiguous(op: str, **tensors: Tensor | None) -> None:
    """Check that tensors that an op writes to are contiguous. None passes."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} has strides {tensor.stride()}, expected a contiguous tensor to write to")


def distinct(op: str, **tensors: Tensor) -> None:
    """Check that no two elements of a tensor that an op writes to share memory, as in an expanded tensor."""
    for name, tensor in tensors.items():
        if 0 in tensor.stride() and not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} has strides {tensor.stride()}, expected none of 0 in a tensor to write to")


def indices(op: str, name: str, tensor: Tensor, limit: int, device: torch.device, *, ignore: int | None = None) -> None:
    """Check that a tensor is integer, on the device and within 0..limit-1.

    The values are checked only if that needs no device sync.
    """
    integers(op, name, tensor, device)
    if readable(tensor) and tensor.numel():
        run_or_record(_within, op, name, tensor, limit, ignore)


def _within(op: str, name: str, tensor: Tensor, limit: int, ignore: int | None) -> None:
    low, high = (int(v) for v in torch.aminmax(tensor))
    if low >= 0 and high < limit:
        return
    live = tensor if ignore is None else tensor[tensor != ignore]
    if live.numel():
        low, high = (int(v) for v in torch.aminmax(live))
        if low < 0 or high >= limit:
            raise ValueError(f"{op}: {name} has values {low} to {high}, expected 0 to {limit - 1}")


def offsets(op: str, name: str, tensor: Tensor, total: int, device: torch.device) -> None:
    """Check that a tensor (N + 1,) is integer, on the device and ascends from 0 to total.

    The values are checked only if that needs no device sync.
    """
    shape(op, name, tensor, None)
    integers(op, name, tensor, device)
    if tensor.shape[0] < 2:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected at least 2 entries")
    if readable(tensor):
        run_or_record(_ascending, op, name, tensor, total)


def _ascending(op: str, name: str, tensor: Tensor, total: int) -> None:
    if not (tensor[0] == 0 and tensor[-1] == total and (tensor[1:] >= tensor[:-1]).all()):
        raise ValueError(f"{op}: {name} is {tensor.tolist()}, expected to ascend from 0 to {total}")


def readable(tensor: Tensor) -> bool:
    """Whether the tensor's values can be read without a device sync. Those of a tensor under torch.func.vmap cannot."""
    if torch.compiler.is_compiling() or type(tensor) is not Tensor or tensor.device.type != "cpu":
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
