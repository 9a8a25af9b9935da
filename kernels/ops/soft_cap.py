"""Soft cap: limit tanh(x / limit), which is near x for small x and never beyond -limit .. limit."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_cap(x: Tensor, limit: float | None) -> Tensor:
    """Cap a tensor in at least float32, rounded once to its dtype. None as the limit returns x."""
    if limit is None:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (torch.tanh(wide / limit) * limit).to(x.dtype)
