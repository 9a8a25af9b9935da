"""Replace the forward of a module: its class becomes a subclass with the same name.

Parameters, buffers, hooks, `isinstance`, state dict names and FSDP wrapping policies do not change. A subclass of
transformers' GradientCheckpointingLayer keeps its activation checkpointing. `restore` undoes it.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from peakgpt.engine.model.plain import PLAIN_TENSORS, has_own_call
from peakgpt.kernels.core.check import FLOATS

ORIGINAL, OPTIONS = "_peakgpt_original", "_peakgpt"
LINEAR, CONV1D = "torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D"
OUT_PROJ = "torch.nn.modules.linear.NonDynamicallyQuantizableLinear"  # nn.MultiheadAttention's out_proj
LAYOUTS = {LINEAR: LINEAR, OUT_PROJ: LINEAR, CONV1D: CONV1D}


class Replacement:
    """Base of the replacement classes. `self._peakgpt` holds the options of the module's row in KNOWN_CLASSES."""

    # Whether forward keeps the signature of the original: transformers inspects the arguments of whole models.
    _keep_signature = False

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        """Return the reason why this module cannot be replaced, or None. May add to `options`."""
        return None

    def _peakgpt_sample(self) -> tuple[Tensor, ...] | None:
        """Return inputs for a forward of this module alone, or None if it only runs inside its model."""
        return None


def class_path(kind: type) -> str:
    """Return the qualified name of a class, the key of KNOWN_CLASSES."""
    return f"{kind.__module__}.{kind.__qualname__}"


def is_fsdp2_class(kind: type) -> bool:
    """Return whether FSDP2 has wrapped this class. Compares names to avoid an import."""
    return any(base.__name__ == "FSDPModule" for base in kind.__mro__)


def original_class(module: nn.Module) -> type:
    """Return the class of a module before its replacement."""
    return getattr(type(module), ORIGINAL, type(module))


def replace(module: nn.Module, by: type[Replacement], options: dict[str, Any]) -> None:
    """Make the module an instance of a new subclass of `by` and of its original class."""
    module.__dict__[OPTIONS] = options
    module.__class__ = _subclass(type(module), by)


def restore(module: nn.Module) -> None:
    """Restore the original class of the module."""
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
def _subclass(kind: type, by: type[Replacement]) -> type:
    attributes = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    if by._keep_signature:
        attributes["forward"] = _with_signature(by.forward, kind.forward)
    return type(kind.__name__, (by, kind), {**attributes, ORIGINAL: kind})


def _with_signature(function, like):
    def forward(self, *args, **kwargs):
        return function(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(like)
    return forward


# ---- linear layers


def linear_layout(layer: nn.Module) -> str | None:
    """Return LINEAR for x W^T + b, CONV1D for x W + b; None for other layers and for hooks, adapters or shards."""
    kind = LAYOUTS.get(class_path(original_class(layer)))
    plain = type(layer.weight) in PLAIN_TENSORS if kind else False
    return kind if plain and not has_own_call(layer) else None


def linear_weight(layer: nn.Module) -> Tensor:
    """Return a view of the weight in the layout of F.linear, (out, in)."""
    return layer.weight.t() if class_path(original_class(layer)) == CONV1D else layer.weight


def has_float_weight(layer: nn.Module) -> bool:
    return layer.weight.dtype in FLOATS


def sample_rows(layer: nn.Module) -> tuple[Tensor, ...]:
    """Return random inputs, (3, in), for a layer with a weight."""
    width = linear_weight(layer).shape[-1]
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    return (x.to(layer.weight.device, layer.weight.dtype),)
