"""Backends of an op: the table of backends, the module that implements an op, and the choice for a call.

A backend of an op is a module `<op>.py` of pure functions anywhere below `kernels/<backend>/`. Its path registers it.

    NO_GRADIENT                                       optional: names of tensors for which it computes no gradient
    objection(*tensors, **params) -> str | None       why it does not support this call, or None. It reads sizes, dtypes
                                                      and strides only: these are the same while tracing and at run time
    declines(*tensors, **params) -> str | None        optional: a measured reason to decline the call (another backend
                                                      is faster), or None; not called for a forced backend
    forward(outputs, saved, *tensors, **params)       fills the tensors that the contract's `alloc` made
    backward(grads, inputs, outputs, saved, needs, **params) -> one gradient (or None) per tensor

forward and backward receive contiguous tensors, except those in the contract's `strided`, which may have any strides.

backward may also take `into`, and so may forward if the contract has `grad_in_forward`: see `autograd.accumulate_into`.
An entry of `inputs` or `outputs` is None unless the contract names it in `saved_for_backward`. An entry of `grads` is
None if no gradient flows into that output. The first backend in the table without an objection runs. A forced backend
with an objection raises.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from peakgpt.kernels.core.spec import OpSpec, Params, Tensors
from peakgpt.kernels.core.thread_state import ThreadState

# Backends in order of priority -> the device type of the tensors that each supports. Eager supports all.
BACKENDS: dict[str, str | None] = {"gpu": "cuda", "cpu": "cpu", "eager": None}

_forced: ThreadState[str | None] = ThreadState("backend", None)


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Run every op inside the block on one backend. An op that the backend does not support raises.

    Args:
        name: "gpu", "cpu" or "eager". It applies to the calls of this thread only.
    Raises:
        ValueError: unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend: got {name!r}, expected one of {', '.join(BACKENDS)}")
    return _forced.set_to(name)


def forced_backend(*, compiling: bool | None = None) -> str | None:
    """Return the backend that `use_backend` has set for this thread, or None.

    Args:
        compiling: torch.compiler.is_compiling(), if the caller knows it.
    """
    return _forced.get_eagerly() if compiling is False else _forced.get()


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def module_names(backend: str) -> dict[str, str]:
    """Map op names to module names for all files below `kernels/<backend>/`. Imports nothing."""
    root = Path(__file__).parents[1] / backend
    files = (file.relative_to(root).with_suffix("") for file in root.rglob("*.py"))
    return {file.name: ".".join(("peakgpt.kernels", backend, *file.parts)) for file in files}


@functools.cache
def load(backend: str, op_name: str) -> ModuleType | str:
    """Import the backend's module for an op, or return the reason why that is not possible."""
    # Checked before the import, because importing Triton takes 0.4 s.
    if backend == "gpu" and not interpreted() and not torch.cuda.is_available():
        return "no CUDA device"
    path = module_names(backend).get(op_name)
    if path is None:
        return f"no {backend} kernel for {op_name} yet"
    try:
        return importlib.import_module(path)
    except ImportError as error:
        return str(error)


def choose(op: OpSpec, forced: str | None, tensors: Tensors, params: Params, needs: tuple[bool, ...]):
    """Return the module of the backend that runs this call, or None for eager.

    Raises:
        NotImplementedError: the forced backend objects.
    """
    if forced:
        if reason := objection(op, forced, tensors, params, forced, needs):
            raise NotImplementedError(f"{op.name}: backend {forced!r} is forced but objects: {reason}")
        return None if forced == "eager" else load(forced, op.name)
    for module in _modules(op.name, tensors[0].device.type):
        if module_objection(op, module, tensors, params, needs) is None:
            return module
    return None


def objection(
    op: OpSpec, backend: str, tensors: Tensors, params: Params, forced: str | None, needs: tuple[bool, ...]
) -> str | None:
    """Return the reason why a backend does not run a call, or None."""
    if backend == "eager":
        return None
    module = load(backend, op.name)
    if isinstance(module, str):
        return module
    device_type, supported = tensors[0].device.type, BACKENDS[backend]
    if device_type != supported and not (forced == backend == "gpu" and device_type == "cpu" and interpreted()):
        return f"takes {supported} tensors, got {device_type}"
    return module_objection(op, module, tensors, params, needs, forced)


@functools.cache
def _modules(op_name: str, device_type: str) -> list[ModuleType]:
    """The modules of an op for a device type, in order of priority."""
    modules = [load(backend, op_name) for backend, supported in BACKENDS.items() if supported == device_type]
    return [module for module in modules if not isinstance(module, str)]


def run_forward(
    op: OpSpec, module: ModuleType, outputs: Tensors, saved: Tensors, tensors: Tensors, params: Params
) -> None:
    """Call a backend's forward, with the inputs in the layout that the contract promises to backends."""
    module.forward(outputs, saved, *_contiguous(tensors, op.contiguous_inputs), **params)


def run_backward(
    op: OpSpec, module: ModuleType, grads: Tensors, inputs: Tensors, outputs: Tensors, saved: Tensors,
    needs: Sequence[bool], params: Params,
) -> Sequence[Tensor | None]:  # fmt: skip
    """Call a backend's backward, with gradients and inputs in the layout that the contract promises to backends."""
    grads, inputs = _contiguous(grads, op.contiguous_grads), _contiguous(inputs, op.contiguous_inputs)
    return module.backward(grads, inputs, outputs, saved, needs, **params)


def _contiguous(tensors: Tensors, indices: Sequence[int]) -> Tensors:
    """Return the tensors with those at the indices contiguous: copies only where the strides require it."""
    for i in indices:
        tensor = tensors[i]
        if tensor is not None and not tensor.is_contiguous():
            tensors = *tensors[:i], tensor.contiguous(), *tensors[i + 1 :]
    return tensors


def module_objection(
    op: OpSpec, module: ModuleType, tensors: Tensors, params: Params, needs: tuple[bool, ...], forced: str | None = None
) -> str | None:
    for name in getattr(module, "NO_GRADIENT", ()):
        if needs[op.tensor_names.index(name)]:
            return f"has no gradient for {name} yet"
    reason = module.objection(*tensors, **params)
    declines = getattr(module, "declines", None)
    return declines(*tensors, **params) if reason is None and declines and not forced else reason
