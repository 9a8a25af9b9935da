"""How a module changes what it computes and stays what it is: its class gives way to a subclass of the same name.

Parameters, buffers, hooks, `isinstance`, names in state dicts and in FSDP's wrapping policies are not touched; a class
derived from transformers' GradientCheckpointingLayer checkpoints as before. `restore` puts the class back.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from peakgpt.kernels.core.check import FLOATS

ORIGINAL, OPTIONS = "_peakgpt_original", "_peakgpt"
LINEAR, CONV1D = "torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D"
ATTENTIONS_OWN = "torch.nn.modules.linear.NonDynamicallyQuantizableLinear"  # nn.MultiheadAttention's out_proj
LAYOUTS = {LINEAR: LINEAR, ATTENTIONS_OWN: LINEAR, CONV1D: CONV1D}


class Replaced:
    """Base of what takes a module's place; `self._peakgpt` holds the options of its row."""

    _signed = False  # whether somebody reads the names of forward's arguments, as transformers does of whole models

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        """Why this module can not be replaced, or None. May add to the options."""
        return None

    def _peakgpt_sample(self) -> tuple[Tensor, ...] | None:
        """Inputs to try the module alone with; None where it needs its model."""
        return None


def path(kind: type) -> str:
    """The name by which tables know a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def is_fsdp2(kind: type) -> bool:
    """Whether FSDP2 has put its class in front of another one; told by names, to import nothing."""
    return any(base.__name__ == "FSDPModule" for base in kind.__mro__)


def original(module: nn.Module) -> type:
    """The class that a module had before it was replaced."""
    return getattr(type(module), ORIGINAL, type(module))


def replace(module: nn.Module, by: type[Replaced], options: dict[str, Any]) -> None:
    """Put `by` in front of the module's class."""
    module.__dict__[OPTIONS] = options
    module.__class__ = _subclass(type(module), by)


def restore(module: nn.Module) -> None:
    """Put the module's own class back."""
    kind = getattr(type(module), ORIGINAL, None)
    if kind is None:
        return
    if ORIGINAL not in vars(type(module)):
        raise ValueError(
            f"unpatch: got a {type(module).__name__} that was wrapped after it was patched, expected it unwrapped: "
            "patch after wrapping"
        )
    module.__class__ = kind
    del module.__dict__[OPTIONS]


@functools.cache
def _subclass(kind: type, by: type[Replaced]) -> type:
    same = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    if by._signed:
        same["forward"] = _with_signature(by.forward, kind.forward)
    return type(kind.__name__, (by, kind), {**same, ORIGINAL: kind})


def _with_signature(function, like):
    def forward(self, *args, **kwargs):
        return function(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(like)
    return forward


# ---- looking into submodules


def layout(layer: nn.Module) -> str | None:
    """LINEAR or CONV1D where a layer does x W^T + b or x W + b and nothing else: no hook, no adapter, no sharding."""
    kind = LAYOUTS.get(path(original(layer)))
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    plain = type(layer.weight) in (nn.Parameter, Tensor) if kind else False
    return kind if plain and not hooked else None


def weight(layer: nn.Module) -> Tensor:
    """The weight of a layer as F.linear takes it, [out, in]; a view."""
    return layer.weight.t() if path(original(layer)) == CONV1D else layer.weight


def floating(layer: nn.Module) -> bool:
    return layer.weight.dtype in FLOATS


def rows(layer: nn.Module) -> tuple[Tensor, ...]:
    """(3, in) random inputs of a layer with a weight."""
    width = weight(layer).shape[-1]
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    return (x.to(layer.weight.device, layer.weight.dtype),)
