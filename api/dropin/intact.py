"""Whether the forward of a part of a patched model may be skipped. `has_own_call` decides about hooks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from peakgpt.engine.model.plain import has_own_call

REPLACED_CLASS = "_peakgpt_class"  # attribute of a class that `patch` made: the class itself
PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor)


def has_replaced_class(module: nn.Module) -> bool:
    """Return whether the module has the class that `patch` gave it, and no subclass as a parametrization makes it."""
    kind = type(module)
    return getattr(kind, REPLACED_CLASS, None) is kind


def is_intact(module: nn.Module) -> bool:
    """Return whether the module has the class that `patch` gave it, and no hook."""
    return has_replaced_class(module) and not has_own_call(module)


def is_plain_tensor(tensor: Any) -> bool:
    """Return whether this is a tensor, and no subclass of it such as a DTensor or a quantized weight."""
    return type(tensor) in PLAIN_TENSORS


def dropout_rate(layer: nn.Module) -> float | None:
    """Return the rate at which a dropout layer drops, 0.0 in eval(). None: it does more, and must be called."""
    if type(layer) is not nn.Dropout or has_own_call(layer):
        return None
    return layer.p if layer.training else 0.0
