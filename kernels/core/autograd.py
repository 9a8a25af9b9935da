"""Autograd of a direct call, and gradient accumulation into given buffers."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peakgpt.kernels.core.autocast import autocast_disabled
from peakgpt.kernels.core.backends import run_backward, run_forward
from peakgpt.kernels.core.spec import OpSpec, Tensors

_buffers: Mapping[Tensor, Tensor] = MappingProxyType({})


@contextlib.contextmanager
def accumulate_into(buffers: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Add gradients of parameters directly to their buffers, in direct calls: no temporary tensor, no second pass.

    This is Megatron-LM's gradient accumulation fusion, for training loops. Autograd receives None for such a parameter:
    its hooks do not run and torch.autograd.grad does not find a gradient. Run forward and backward inside, once each. A
    loss may add its gradient already in the forward pass, as if the incoming gradient were 1; its backward raises
    RuntimeError if another value arrives.

    A backend function that takes `into` gets one buffer or None for each tensor. It adds to the buffer and returns the
    buffer, or returns a gradient, which is then added here.

    Args:
        buffers: the buffer of each parameter, with the parameter's shape, strides, dtype and device.
    """
    global _buffers
    before, _buffers = _buffers, buffers
    try:
        yield
    finally:
        _buffers = before


def may_overwrite_saved() -> bool:
    """Whether a backend's backward may overwrite saved tensors: in a direct call whose graph is not retained.

    A copy of a gradient of the vocabulary's size would touch fresh pages, which takes longer than its arithmetic.
    """
    library_op = torch._C._dispatch_tls_local_exclude_set().has(torch._C.DispatchKey.AutogradFunctionality)
    running = torch._C._current_graph_task_id() >= 0
    return running and not library_op and not torch._C._autograd._get_current_graph_task_keep_graph()


class PeakgptOp(torch.autograd.Function):
    """A backend's forward and backward as one autograd node. Profilers show it by this name."""

    @staticmethod
    def forward(ctx, op: OpSpec, backend: ModuleType, params: dict[str, Any], needs: tuple[bool, ...], *tensors):
        ctx.set_materialize_grads(False)
        into = tuple(_buffers.get(t) if n else None for t, n in zip(tensors, needs, strict=True))
        extra, ctx.accumulated = {}, ()
        if op.grad_in_forward and _takes_into(backend.forward):
            names = op.grad_in_forward(**params)
            named = zip(_contiguous(into), op.tensor_names, strict=True)
            forward_into = tuple(b if n in names else None for b, n in named)
            extra, ctx.accumulated = {"into": forward_into}, tuple(b for b in forward_into if b is not None)
            needs = tuple(n and b is None for n, b in zip(needs, forward_into, strict=True))
        outputs, saved = op.alloc(*tensors, needs=needs, **params)
        run_forward(op, backend, outputs, saved, tensors, {**extra, **params})
        torch.autograd.graph.increment_version(ctx.accumulated)
        ctx.call, ctx.into = (op, backend, params, needs, len(tensors), len(outputs)), into
        save_inputs, save_outputs = op.saved_flags(tensors)
        ctx.save_for_backward(*_select(tensors, save_inputs), *_select(outputs, save_outputs), *saved)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        op, backend, params, needs, n_in, n_out = ctx.call
        if ctx.accumulated and (grads[0] is None or grads[0].item() != 1.0):
            raise RuntimeError(
                f"{op.name}: the loss has gradient {grads[0]}, expected 1: "
                "inside accumulate_into its forward has already added the gradients"
            )
        if all(g is None for g in grads):  # a later autograd.Function returned None
            return (None,) * (4 + n_in)
        tensors = ctx.saved_tensors
        inputs, outputs, saved = tensors[:n_in], tensors[n_in : n_in + n_out], tensors[n_in + n_out :]
        extra = {"into": _contiguous(ctx.into)} if _takes_into(backend.backward) else {}
        with autocast_disabled(grads):
            results = run_backward(op, backend, grads, inputs, outputs, saved, needs, {**extra, **params})
        results = tuple(_accumulate(g, b) if n else None for g, b, n in zip(results, ctx.into, needs, strict=True))
        return None, None, None, None, *results


@functools.cache
def _takes_into(function: Callable[..., Any]) -> bool:
    return "into" in inspect.signature(function).parameters


def _contiguous(buffers: Tensors) -> Tensors:
    """Return the buffers that a kernel may write to; the gradients of the others are added here."""
    return tuple(b if b is not None and b.is_contiguous() else None for b in buffers)


def _accumulate(grad: Tensor | None, buffer: Tensor | None) -> Tensor | None:
    """Add the gradient to its buffer, unless the backend did, and return the gradient for autograd."""
    if buffer is None or grad is None:
        return grad
    if grad is not buffer:
        buffer.add_(grad)
    torch.autograd.graph.increment_version(buffer)  # autograd does not see what a kernel writes
    return None


def _select(tensors: Tensors, flags: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(t if flag else None for t, flag in zip(tensors, flags, strict=True))
