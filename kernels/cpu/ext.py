"""Helpers of the C++ backend: the extension, its dtype numbers, row views, threads and workspaces.

A kernel of the extension takes keyword arguments: the fields of its argument struct (csrc/*/*.h) and `threads`. A
tensor argument is a tensor or None. A missing or unknown argument is a TypeError.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from peakgpt.kernels.cpu import sources
from peakgpt.kernels.hardware.cpu_threads import threads

# An ImportError of this module becomes the objection of the backend.
if reason := sources.missing():
    raise ImportError(reason)

from peakgpt import _C

if reason := sources.objection(_C.source_digest):
    raise ImportError(reason)

__all__ = ["DTYPES", "_C", "dtype_objection", "own_workspaces", "rows", "scratch", "threads", "unit_last", "workspace"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # DType in csrc/base/types.h
_workspaces = threading.local()


def dtype_objection(*tensors: Tensor | None) -> str | None:
    """Return the reason why the kernels do not take these dtypes, or None."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"takes float32 and bfloat16, got {str(tensor.dtype).removeprefix('torch.')}"
    return None


def rows(tensor: Tensor) -> Tensor:
    """Return the tensor as (rows, width) with contiguous rows: a view if its strides allow one, else a copy."""
    flat = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def unit_last(tensor: Tensor) -> Tensor:
    """Return the tensor with stride 1 in its last axis: itself, or a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)


def scratch(dtype: torch.dtype, *shapes: Sequence[int]) -> list[Tensor]:
    """Return uninitialized tensors for the largest temporaries of a pass.

    All passes of a thread share this memory, because a thread runs one pass at a time.
    """
    sizes = [math.prod(shape) for shape in shapes]
    parts = workspace("scratch", dtype, sum(sizes)).split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


@contextlib.contextmanager
def own_workspaces() -> Iterator[None]:
    """Give the calls inside the block workspaces that no other call of this thread uses."""
    outer = dict(_workspaces.__dict__)
    _workspaces.__dict__.clear()
    try:
        yield
    finally:
        _workspaces.__dict__.clear()
        _workspaces.__dict__.update(outer)


def workspace(slot: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """Return an uninitialized temporary, valid until the next call with this slot on this thread.

    The memory is kept between calls and only grows: fresh pages cost more than the pass that fills them (0.8 to
    3.5 GB/s versus 30 on the machine of docs/cpu.md).
    """
    count = math.prod(shape)
    memory = _workspaces.__dict__.get((slot, dtype))
    if memory is None or memory.numel() < count:
        with torch.inference_mode(False):  # a tensor made in inference mode cannot be written outside of it
            memory = _workspaces.__dict__[slot, dtype] = torch.empty(count, dtype=dtype, device="cpu")
    return memory[:count].view(shape)
