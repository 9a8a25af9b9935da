"""Autograd of a direct call, and where its gradients go."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peakgpt.kernels.core.autocast import no_autocast

if TYPE_CHECKING:
    from peakgpt.kernels.core.dispatch import Op

_sinks: Mapping[Tensor, Tensor] = MappingProxyType({})


@contextlib.contextmanager
def accumulate_into(sinks: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Add gradients of parameters to where they are kept, while ops run in direct calls: no temporary, no second pass.

    Megatron-LM's gradient accumulation fusion. For training loops that know what they do: autograd gets None for such
    a parameter, so that its hooks do not run and torch.autograd.grad finds nothing. Forward and backward both belong
    inside, once each: a loss may add its part in the forward pass, at gradient 1, and raises where another one arrives.

    A backend whose backward (or forward, where that forms the gradients) takes `into` gets one sink or None for each
    tensor; it adds to the sink and returns it, or returns a gradient, which is added here.

    Args:
        sinks: where to add by parameter, each of its parameter's shape, strides, dtype and device.
    """
    global _sinks
    before, _sinks = _sinks, sinks
    try:
        yield
    finally:
        _sinks = before


def may_overwrite_saved() -> bool:
    """Whether a backend's backward may reuse what was saved: in a direct call whose graph is not kept.

    Fresh pages for a gradient the size of the vocabulary cost more than the arithmetic on it.
    """
    library_op = torch._C._dispatch_tls_local_exclude_set().has(torch._C.DispatchKey.AutogradFunctionality)
    running = torch._C._current_graph_task_id() >= 0
    return running and not library_op and not torch._C._autograd._get_current_graph_task_keep_graph()


class Fused(torch.autograd.Function):
    """The direct path: a backend's forward and backward as one autograd node."""

    @staticmethod
    def forward(ctx, op: Op, backend: ModuleType, params: dict[str, Any], needs: tuple[bool, ...], *tensors):
        ctx.set_materialize_grads(False)
        into = tuple(_sinks.get(t) if n else None for t, n in zip(tensors, needs, strict=True))
        extra, ctx.added = {}, ()
        if op.early and _takes_into(backend.forward):
            names = op.early(**params)
            early = tuple(s if n in names else None for s, n in zip(into, op.tensor_names, strict=True))
            extra, ctx.added = {"into": early}, tuple(s for s in early if s is not None)
            needs = tuple(n and s is None for n, s in zip(needs, early, strict=True))
        outputs, saved = op.alloc(*tensors, needs=needs, **params)
        backend.forward(outputs, saved, *tensors, **extra, **params)
        torch.autograd.graph.increment_version(ctx.added)
        ctx.call, ctx.into = (op, backend, params, needs, len(tensors), len(outputs)), into
        keep_inputs, keep_outputs = op.kept(tensors)
        ctx.save_for_backward(*_keep(tensors, keep_inputs), *_keep(outputs, keep_outputs), *saved)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        op, backend, params, needs, n_in, n_out = ctx.call
        if ctx.added and (grads[0] is None or grads[0].item() != 1.0):
            raise RuntimeError(f"{op.name}: a gradient of {grads[0]} arrived, expected 1: accumulate_into has added it")
        if all(g is None for g in grads):  # nothing flows: a Function further on returned None
            return (None,) * (4 + n_in)
        held = ctx.saved_tensors
        inputs, outputs, saved = held[:n_in], held[n_in : n_in + n_out], held[n_in + n_out :]
        extra = {"into": ctx.into} if _takes_into(backend.backward) else {}
        with no_autocast(grads):
            found = backend.backward(grads, inputs, outputs, saved, needs, **extra, **params)
        found = tuple(_sunk(g, s) if n else None for g, s, n in zip(found, ctx.into, needs, strict=True))
        return None, None, None, None, *found


@functools.cache
def _takes_into(function: Callable[..., Any]) -> bool:
    return "into" in inspect.signature(function).parameters


def _sunk(grad: Tensor | None, sink: Tensor | None) -> Tensor | None:
    """What autograd gets: None where the gradient has gone, or goes here, into its sink."""
    if sink is None or grad is None:
        return grad
    if grad is not sink:
        sink.add_(grad)
    torch.autograd.graph.increment_version(sink)  # a kernel that writes to an address leaves no trace
    return None


def _keep(tensors: Sequence[Tensor | None], kept: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(t if k else None for t, k in zip(tensors, kept, strict=True))
