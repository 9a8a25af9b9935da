"""What every C++ backend file shares: the extension, dtypes as it numbers them, addresses, threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from peakgpt import _C  # its ImportError is the backend's objection
from peakgpt.kernels.cpu import sources

if reason := sources.objection(_C.source_digest):
    raise ImportError(reason)

__all__ = ["DTYPES", "_C", "address", "dtype_objection", "rows", "scratch", "threads", "workspace"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
threads = torch.get_num_threads
_held = threading.local()


def address(tensor: Tensor | None) -> int:
    """Where a tensor's data starts; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_objection(*tensors: Tensor | None) -> str | None:
    """Why these dtypes can not be taken, or None."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"takes float32 and bfloat16, got {str(tensor.dtype).removeprefix('torch.')}"
    return None


def rows(tensor: Tensor) -> Tensor:
    """The tensor as (rows, width) with contiguous rows; a view where its strides allow that, else a copy."""
    flat = tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.new_empty(0, tensor.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def scratch(dtype: torch.dtype, *shapes: Sequence[int]) -> list[Tensor]:
    """Uninitialised memory for the largest temporaries of a pass: one slot, for no two passes run at a time."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = workspace("scratch", dtype, sum(sizes)).split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def workspace(slot: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """Uninitialised memory for a temporary, valid until the slot is asked for again on this thread.

    Kept between calls and grown only: fresh pages cost more than the pass that fills them (0.8 to 3.5 GB/s against
    30 on the machine of docs/cpu.md).
    """
    count = math.prod(shape)
    held = _held.__dict__.get((slot, dtype))
    if held is None or held.numel() < count:
        with torch.inference_mode(False):  # a tensor made in that mode can not be written to outside of it
            held = _held.__dict__[slot, dtype] = torch.empty(count, dtype=dtype, device="cpu")
    return held[:count].view(shape)
