"""Whether a module is plain, that is whether a fused op may read its weights instead of calling it.

A fused op stands for the calls of several modules. That is right only as long as these calls would do nothing else. A
module runs its own forward if it was wrapped, replaced, subclassed or parametrized (its class differs), has hooks, has
a `forward` of its own, has weights of a tensor subclass such as DTensor, or has weights that are no parameters, as in a
replica of nn.DataParallel. `plain_parameters` decides this for one call, `change_of` for a whole model before it is
made a program or a CUDA graph, `has_own_call` for the drop-in replacements. A model compiled by torch.compile sees only
the hooks that it had then, as all of torch's modules.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from peakgpt.kernels.ops.linear import linear

Kind = TypeVar("Kind", bound=type[nn.Module])

# The forward of each class that a fused op can stand for, as it was before anyone assigned another one to the class.
FORWARDS: dict[type, Callable[..., Any]] = {kind: kind.forward for kind in (nn.Linear, nn.Embedding)}
# The parameters that a fused op reads, of these classes and of those that inherit from them.
PARAMETERS = {nn.Linear: frozenset({"weight", "bias"}), nn.Embedding: frozenset({"weight"}),
              nn.LayerNorm: frozenset({"weight", "bias"}), nn.RMSNorm: frozenset({"weight"})}  # fmt: skip
PLAIN_TENSORS = (nn.Parameter, Tensor, type(None))
CONTAINERS = (nn.ModuleDict, nn.ModuleList)  # never called

# torch adds to these and never replaces them: see torch.nn.modules.module.register_module_forward_hook.
_forward_hooks, _forward_pre_hooks = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
_backward_hooks, _backward_pre_hooks = torch_module._global_backward_hooks, torch_module._global_backward_pre_hooks


def fusable(kind: Kind) -> Kind:
    """Declare a module class that `is_plain` and `change_of` accept."""
    FORWARDS[kind] = kind.forward
    PARAMETERS[kind] = next((PARAMETERS[base] for base in kind.__mro__ if base in PARAMETERS), frozenset())
    return kind


def has_own_call(module: nn.Module) -> bool:
    """Return whether calling the module does more than the forward of its class: hooks, its own or global ones, a
    `forward` that was assigned to it, or nn.Module.compile.
    """  # fmt: skip
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or _forward_hooks or _forward_pre_hooks or _backward_hooks or _backward_pre_hooks
        or "forward" in module.__dict__ or module._compiled_call_impl
    )  # fmt: skip


def plain_parameters(module: nn.Module, kind: type[nn.Module]) -> Mapping[str, Tensor | None] | None:
    """Return the parameters of a module if a fused op may stand for its call, else None.

    Reading them from this mapping is faster than `module.weight` by as much as the check costs.

    Args:
        module: any module in the place of one of `kind`.
        kind: nn.Linear, nn.Embedding, or a class declared by `fusable`.
    """
    if type(module) is not kind or kind.forward is not FORWARDS[kind] or has_own_call(module):
        return None
    parameters = module._parameters
    is_plain = type(parameters.get("weight")) in PLAIN_TENSORS and parameters.keys() >= PARAMETERS[kind]
    return parameters if is_plain else None


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a fused op may stand for a call of this module; arguments as `plain_parameters`."""
    return plain_parameters(module, kind) is not None


def is_plain_embedding(module: nn.Module) -> bool:
    """Return whether a module is a plain nn.Embedding without the options that change its values or gradients."""
    return (
        is_plain(module, nn.Embedding)
        and module.padding_idx is None and module.max_norm is None
        and not (module.scale_grad_by_freq or module.sparse)
    )  # fmt: skip


def run_linear(layer: nn.Module, x: Tensor, product: Callable[..., Tensor] = linear) -> Tensor:
    """Apply a linear layer to x, (..., C): by `product` if it is a plain nn.Linear, else by its own forward.

    Args:
        layer: nn.Linear, or what stands in its place: QuantizedLinear, an adapter, any other module.
        product: (x, weight, bias) -> (..., F).
    """
    p = plain_parameters(layer, nn.Linear)
    return layer(x) if p is None else product(x, p["weight"], p["bias"])


def walk(model: nn.Module) -> list[nn.Module]:
    """List all modules of a model, a shared one several times. Much faster than nn.Module.modules."""
    modules = [model]
    for module in modules:  # which grows
        if module._modules:
            modules += [child for child in module._modules.values() if child is not None]
    return modules


def change_of(model: nn.Module) -> str | None:
    """Describe the first module of a model that runs its own forward; None if all are plain.

    Args:
        model: a Transformer. A subclass is plain unless it overrides a method of the network.
    """
    if all(_is_known(module, module is model) for module in walk(model)):
        return None
    name, module = next((n, m) for n, m in model.named_modules() if not _is_known(m, m is model))
    kind, where = type(module).__name__, name or "the model"
    if has_own_call(module):
        return f"{where}, {kind}, has hooks or a forward of its own"
    return f"{where} is {kind} of {type(module).__module__}, which runs its own forward"


def _is_known(module: nn.Module, is_root: bool) -> bool:
    kind = type(module)
    if kind in CONTAINERS:
        return True
    if is_root and kind not in FORWARDS:
        return not has_own_call(module) and not _overrides(module)
    return is_plain_embedding(module) if kind is nn.Embedding else kind in FORWARDS and is_plain(module, kind)


def _overrides(model: nn.Module) -> bool:
    """Return whether a model's class or the model itself replaces a method of the class declared by `fusable`."""
    kind = type(model)
    base = next((base for base in kind.__mro__ if base in FORWARDS), None)
    if base is None or base.forward is not FORWARDS[base]:
        return True
    methods = [name for name, value in vars(base).items() if callable(value) or isinstance(value, property)]
    return any(
        name in model.__dict__ or (name != "__init__" and getattr(kind, name) is not getattr(base, name))
        for name in methods
    )


def _addresses(modules: Sequence[nn.Module]) -> list[int]:
    """Return where the parameters and buffers of modules are in memory."""
    tensors = chain.from_iterable((*m._parameters.values(), *m._buffers.values()) for m in modules)
    return [t.data_ptr() for t in tensors if t is not None]


def _active(modules: Sequence[nn.Module]) -> list[str]:
    """Return which adapter each layer with adapters has active (engine/model/lora.py)."""
    return [active for module in modules if (active := module.__dict__.get("active")) is not None]


class Snapshot:
    """The modules and weights of a model at one time: whether what was built from it then still stands for it."""

    def __init__(self, model: nn.Module):
        """The model is not kept alive."""
        self.change, self._model, modules = change_of(model), weakref.ref(model), walk(model)
        self._modules, self._active = [weakref.ref(module) for module in modules], _active(modules)
        self._addresses = [] if self.change else _addresses(modules)

    @property
    def model(self) -> nn.Module | None:
        """The model; None if it is gone."""
        return self._model()

    @property
    def is_current(self) -> bool:
        """Whether the model has the same modules, which run as before, and if all are plain, weights in the same place.

        True once the model is gone.
        """
        model = self.model
        if model is None:
            return True
        modules = walk(model)
        if [ref() for ref in self._modules] != modules or (self.change is None) != (change_of(model) is None):
            return False
        if self._active != _active(modules):
            return False
        return self.change is not None or self._addresses == _addresses(modules)
