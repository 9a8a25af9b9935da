"""Autocast, as torch's own op of the same policy would cast, and nothing of it inside a backend."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from peakgpt.kernels.core.dispatch import Op


def autocasts(kind: str) -> bool:
    """Whether autocast is on for this kind of device."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def cast_for(op: Op, tensors: Sequence[Tensor | None], kind: str) -> Sequence[Tensor | None]:
    """The tensors of a call as the op's policy wants them on this kind of device; `exact` ones as they are."""
    # layer_norm is on CUDA's float32 list; on CPU it takes mixed dtypes as they come.
    dtypes = {"lower": torch.get_autocast_dtype(kind), "norm": torch.float32 if kind == "cuda" else None}
    dtype = dtypes.get(op.autocast)
    if dtype is None:
        return tensors
    return tuple(t if n in op.exact else _to(t, dtype) for n, t in zip(op.tensor_names, tensors, strict=True))


def no_autocast(tensors: Sequence[Tensor | None]) -> contextlib.AbstractContextManager:
    """Keep autocast away from what a backend calls inside."""
    kind = next(t for t in tensors if t is not None).device.type
    return torch.autocast(kind, enabled=False) if autocasts(kind) else contextlib.nullcontext()


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    castable = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if castable else tensor
