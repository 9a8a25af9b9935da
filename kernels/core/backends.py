"""Backends of an op: what one is, which exist on this machine, and which runs.

A backend of an op is a module `<op>.py` of pure functions anywhere below `kernels/<backend>/`; this is the registry:

    NO_GRADIENT                                       optional: names of tensors that it gives no gradient for
    objection(*tensors, **params) -> str | None       why it can not take this call, or None; reads sizes, dtypes and
                                                      strides only, which are the same while tracing and when it runs
    declines(*tensors, **params) -> str | None        optional: a measured reason to decline the call (another backend
                                                      is faster), or None; ignored if the backend is forced
    forward(outputs, saved, *tensors, **params)       fills what the contract's `alloc` made
    backward(grads, inputs, outputs, saved, needs, **params) -> one gradient (or None) per tensor

forward (of an op that forms gradients there) and backward may take `into` too: see `gradients.accumulate_into`.
`inputs` and `outputs` hold None where the contract's `keeps` does not name them; an entry of `grads` is None where
nothing flows into that output. The first backend of PRIORITY without an objection runs; a forced backend that objects
raises.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from peakgpt.kernels.core.dispatch import Op

PRIORITY = ("hopper", "gpu", "cpu", "eager")
HOME = {"hopper": "cuda", "gpu": "cuda", "cpu": "cpu"}

_forced: str | None = None  # a module global: torch.compile guards on it, a ContextVar breaks the graph


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op inside the block onto one backend; it raises where that backend objects.

    Args:
        name: one of PRIORITY ("hopper", "gpu", "cpu", "eager"). The setting is global to the process.
    Raises:
        ValueError: an unknown name.
    """
    global _forced
    if name not in PRIORITY:
        raise ValueError(f"unknown backend: got {name!r}, expected one of {', '.join(PRIORITY)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced_backend() -> str | None:
    """The backend that `use_backend` asks for, or None."""
    return _forced


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _unavailable(backend: str) -> str | None:
    """Why a whole backend is out on this machine; importing Triton costs 0.4 s, so ask before."""
    if backend == "cpu" or (backend == "gpu" and interpreted()):
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    if backend == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        return f"needs sm_90, got sm_{''.join(map(str, torch.cuda.get_device_capability()))}"
    return None


@functools.cache
def module_names(backend: str) -> dict[str, str]:
    """Map the file names below `kernels/<backend>/` to the names of their modules; imports nothing."""
    root = Path(__file__).parents[1] / backend
    files = (file.relative_to(root).with_suffix("") for file in root.rglob("*.py"))
    return {file.name: ".".join(("peakgpt.kernels", backend, *file.parts)) for file in files}


@functools.cache
def load(backend: str, op_name: str) -> ModuleType | str:
    """The backend's module for an op, or the reason why there is none."""
    if reason := _unavailable(backend):
        return reason
    path = module_names(backend).get(op_name)
    if path is None:
        return f"no {backend} kernel for {op_name} yet"
    try:
        return importlib.import_module(path)
    except ImportError as error:
        return str(error)


@functools.cache
def _at_home(op_name: str, kind: str) -> list[ModuleType]:
    """The backends of an op that take this kind of device, in the order of PRIORITY."""
    modules = [load(backend, op_name) for backend, home in HOME.items() if home == kind]
    return [module for module in modules if not isinstance(module, str)]


def _objects(op: Op, module: ModuleType, tensors, params, needs, forced: str | None = None) -> str | None:
    for name in getattr(module, "NO_GRADIENT", ()):
        if needs[op.tensor_names.index(name)]:
            return f"has no gradient for {name} yet"
    reason = module.objection(*tensors, **params)
    declines = getattr(module, "declines", None)
    return declines(*tensors, **params) if reason is None and declines and not forced else reason


def objection(op: Op, backend: str, tensors, params, forced: str | None, needs) -> str | None:
    """Why a backend does not take a call, or None."""
    if backend == "eager":
        return None
    module = load(backend, op.name)
    if isinstance(module, str):
        return module
    kind = tensors[0].device.type
    if kind != HOME[backend] and not (forced == backend == "gpu" and kind == "cpu" and interpreted()):
        return f"takes {HOME[backend]} tensors, got {kind}"
    return _objects(op, module, tensors, params, needs, forced)


def choose(op: Op, forced: str | None, tensors, params, needs) -> ModuleType | None:
    """The backend's module; None means eager."""
    if forced:
        if reason := objection(op, forced, tensors, params, forced, needs):
            raise NotImplementedError(f"{op.name}: backend {forced!r} is forced but objects: {reason}")
        return None if forced == "eager" else load(forced, op.name)
    for module in _at_home(op.name, tensors[0].device.type):
        if _objects(op, module, tensors, params, needs) is None:
            return module
    return None
