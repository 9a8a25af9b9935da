"""Replace the forward of a module: its class becomes a subclass with the same name.

Parameters, buffers, hooks, `isinstance`, state dict names and FSDP wrapping policies do not change. A subclass of
transformers' GradientCheckpointingLayer keeps its activation checkpointing. `restore` undoes it.

A replacement may skip the forward of a child only if `is_intact(child)`: its class is the one that `patch` gave it, and
no hook runs with it. Whatever changes a module later (PEFT, parametrizations, pruning, accelerate) then takes effect.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import sys
import types
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from peakgpt.dropin.intact import REPLACED_CLASS, is_intact, is_plain_tensor
from peakgpt.kernels.core.check import FLOATS

ORIGINAL, OPTIONS = "_peakgpt_original", "_peakgpt"
LINEAR, CONV1D = "torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D"
OUT_PROJ = "torch.nn.modules.linear.NonDynamicallyQuantizableLinear"  # nn.MultiheadAttention's out_proj
LAYOUTS = {LINEAR: LINEAR, OUT_PROJ: LINEAR, CONV1D: CONV1D}


class Replacement:
    """Base of the replacement classes. `self._peakgpt` holds the options of the module's row in KNOWN_CLASSES."""

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        """Return the reason why this module cannot be replaced, or None. May add to `options`."""
        return None

    @classmethod
    def _peakgpt_attributes(cls, kind: type) -> dict[str, Any]:
        """Return the class attributes of the subclass that replaces `kind`."""
        return {}

    def _peakgpt_sample(self) -> tuple[Tensor, ...] | None:
        """Return inputs for a forward of this module alone, or None if it only runs inside its model."""
        return None

    def __init__(self, *args: Any, **kwargs: Any):
        """Construct an unpatched module: `type(patched)(config)` and `type(patched).from_pretrained(folder)`."""
        self.__class__ = original_class(self)
        self.__init__(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        """Pickle the two classes that this class was made of. It has no name under which pickle could import it."""
        function, args, *rest = super().__reduce_ex__(max(protocol, 2))
        if function is copyreg.__newobj__ and args == (type(self),) and ORIGINAL in vars(type(self)):
            return _rebuild, (original_class(self), type(self).__bases__[0]), *rest
        return function, args, *rest

    @property
    def qconfig(self) -> NoReturn:
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        raise ValueError(
            "torch.ao.quantization: got a patched model, in which it recognizes no class, expected an unpatched one: "
            "call peakgpt.unpatch before the quantization and peakgpt.patch after it"
        )


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


def wrapped_since(module: nn.Module) -> str | None:
    """Return what was put around a replaced module that keeps `restore` from undoing the replacement, or None."""
    kind, replaced = type(module), getattr(type(module), REPLACED_CLASS, None)
    if replaced is None:
        return None
    if kind is not replaced and is_fsdp2_class(kind):
        return f"{kind.__name__} that was wrapped after it was patched"
    if "forward" in module.__dict__ and not _methods_of(module, replaced):
        return f"{kind.__name__} whose attribute `forward` was set after it was patched"
    return None


def restore(module: nn.Module) -> None:
    """Restore the original class of the module. A class that a parametrization made of it later keeps its additions."""
    kind, replaced = type(module), getattr(type(module), REPLACED_CLASS, None)
    if replaced is None:
        return
    methods = _methods_of(module, replaced)
    module.__class__ = _without(kind, replaced)
    del module.__dict__[OPTIONS]
    for name, method in methods.items():
        module.__dict__[name] = getattr(type(module), method).__get__(module)


def _methods_of(module: nn.Module, replaced: type) -> dict[str, str]:
    """Return the attributes that hold a bound method of the replacement, such as `_old_forward` of accelerate."""
    return {
        name: value.__name__
        for name, value in module.__dict__.items()
        if isinstance(value, types.MethodType) and value.__self__ is module
        and getattr(replaced, value.__name__, None) is value.__func__
    }  # fmt: skip


def _without(kind: type, replaced: type) -> type:
    """Return `kind` with the original class of `replaced` in the place of `replaced`."""
    if not issubclass(kind, replaced):
        return kind
    if kind is replaced:
        return getattr(kind, ORIGINAL)
    attributes = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__, tuple(_without(base, replaced) for base in kind.__bases__), attributes)


@functools.cache
def _subclass(kind: type, by: type[Replacement]) -> type:
    attributes = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    made = type(kind.__name__, (by, kind), {**attributes, **by._peakgpt_attributes(kind), ORIGINAL: kind})
    setattr(made, REPLACED_CLASS, made)
    return made


def _rebuild(kind: type, by: type[Replacement]) -> nn.Module:
    """Make the module of a pickle without its state, in a process that may have no other patched model."""
    if "transformers.modeling_utils" in sys.modules:
        from peakgpt.dropin.mask_function import register_attention

        register_attention()
    made = _subclass(kind, by)
    return made.__new__(made)


def with_signature(function, like):
    """Return the method with the signature of another one."""

    def forward(self, *args, **kwargs):
        return function(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(like)
    return forward


# ---- linear layers


def layout_of(kind: type) -> str | None:
    """Return LINEAR for a class that computes x W^T + b, CONV1D for x W + b, None for others."""
    return next((LAYOUTS[path] for path in map(class_path, kind.__mro__) if path in LAYOUTS), None)


def linear_layout(layer: nn.Module) -> str | None:
    """Return the layout of a linear layer whose forward may be skipped, else None."""
    layout = getattr(type(layer), "_peakgpt_layout", None)
    return layout if layout and is_intact(layer) and is_plain_tensor(layer.weight) else None


def linear_weight(layer: nn.Module) -> Tensor:
    """Return a view of the weight in the layout of F.linear, (out, in)."""
    layout = getattr(type(layer), "_peakgpt_layout", None) or layout_of(type(layer))
    return layer.weight.t() if layout == CONV1D else layer.weight


def has_float_weight(layer: nn.Module) -> bool:
    return layer.weight.dtype in FLOATS


def sample_rows(layer: nn.Module) -> tuple[Tensor, ...]:
    """Return random inputs, (3, in), for a layer with a weight."""
    width = linear_weight(layer).shape[-1]
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    return (x.to(layer.weight.device, layer.weight.dtype),)
