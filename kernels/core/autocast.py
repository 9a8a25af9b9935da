"""Autocast: cast an op's tensors as torch's own op of the same policy does, and disable autocast inside a backend."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from peakgpt.kernels.core.spec import OpSpec, Tensors


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for this device type."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def cast_inputs(op: OpSpec, tensors: Tensors, device_type: str) -> Tensors:
    """Cast the tensors of a call to the dtype of the op's autocast policy, except those in `autocast_exempt`."""
    # layer_norm is on CUDA's float32 list; on CPU it accepts mixed dtypes.
    dtypes = {"lower": torch.get_autocast_dtype(device_type), "norm": torch.float32 if device_type == "cuda" else None}
    dtype = dtypes.get(op.autocast)
    if dtype is None:
        return tensors
    exempt = op.autocast_exempt
    return tuple(t if n in exempt else _cast(t, dtype) for n, t in zip(op.tensor_names, tensors, strict=True))


def autocast_disabled(tensors: Tensors) -> contextlib.AbstractContextManager[None]:
    """Disable autocast for the operations that a backend calls on these tensors."""
    device_type = next(t for t in tensors if t is not None).device.type
    enabled = autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else contextlib.nullcontext()


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    castable = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if castable else tensor
