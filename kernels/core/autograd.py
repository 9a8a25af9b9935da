"""Autograd of a direct call, gradients of gradients, and gradient accumulation into given buffers."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from peakgpt.kernels.core.autocast import autocast_disabled
from peakgpt.kernels.core.backends import run_backward, run_forward
from peakgpt.kernels.core.recording import run_or_record
from peakgpt.kernels.core.spec import OpSpec, Params, Tensors
from peakgpt.kernels.core.thread_state import ThreadState

_buffers: ThreadState[Mapping[Tensor, Tensor]] = ThreadState("gradient_buffers", MappingProxyType({}))
_peek_interpreter_stack = torch._C._functorch.peek_interpreter_stack


def accumulate_into(buffers: Mapping[Tensor, Tensor]) -> contextlib.AbstractContextManager[None]:
    """Add gradients of parameters directly to their buffers, in direct calls: no temporary tensor, no second pass.

    This is Megatron-LM's gradient accumulation fusion, for training loops. Autograd receives None for such a parameter:
    its hooks do not run and torch.autograd.grad does not find a gradient. Run forward and backward inside, once each,
    in this thread. A loss may add its gradient already in the forward pass, as if the incoming gradient were 1; its
    backward raises RuntimeError if another value arrives. So does a backward with create_graph=True.

    A backend function that takes `into` gets one buffer or None for each tensor. It adds to the buffer and returns the
    buffer, or returns a gradient, which is then added here.

    Args:
        buffers: the buffer of each parameter, with the parameter's shape, strides, dtype and device.
    """
    return _buffers.set_to(buffers)


def may_overwrite_saved() -> bool:
    """Whether a backend's backward may overwrite saved tensors: in a direct call whose graph is not retained.

    A copy of a gradient of the vocabulary's size would touch fresh pages, which takes longer than its arithmetic.
    """
    library_op = torch._C._dispatch_tls_local_exclude_set().has(torch._C.DispatchKey.AutogradFunctionality)
    running = torch._C._current_graph_task_id() >= 0
    return running and not library_op and not torch._C._autograd._get_current_graph_task_keep_graph()


def transformed() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp) or forward-mode AD is active."""
    return _peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def needs_autograd(grads: Sequence[Tensor | None]) -> bool:
    """Whether gradients must be computed by autograd: they are differentiated again, transformed or batched."""
    if torch.is_grad_enabled() or transformed():
        return True
    return any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads)  # is_grads_batched


class PeakgptOp(torch.autograd.Function):
    """A backend's forward and backward as one autograd node. `autograd_function` makes a subclass for each op."""

    @staticmethod
    def forward(ctx, op: OpSpec, backend: ModuleType, params: dict[str, Any], needs: tuple[bool, ...], *tensors):
        ctx.set_materialize_grads(False)
        buffers = _buffers.get_eagerly()
        into = (None,) * len(tensors)
        if buffers:  # rare, and hashing tensors takes 0.1 us each
            into = tuple([buffers.get(t) if n else None for t, n in zip(tensors, needs, strict=True)])
        options, ctx.accumulated = params, ()
        if op.grad_in_forward and _takes_into(backend.forward):
            names = op.grad_in_forward(**params)
            named = zip(_contiguous(into), op.tensor_names, strict=True)
            forward_into = tuple(b if n in names else None for b, n in named)
            options, ctx.accumulated = {"into": forward_into, **params}, tuple(b for b in forward_into if b is not None)
            needs = tuple(n and b is None for n, b in zip(needs, forward_into, strict=True))
        outputs, saved = op.alloc(*tensors, needs=needs, **params)
        run_forward(op, backend, outputs, saved, tensors, options)
        torch.autograd.graph.increment_version(ctx.accumulated)
        ctx.call, ctx.into = (op, backend, params, needs, len(tensors), len(outputs)), into
        save_inputs, save_outputs = op.saved_flags(tensors, params)
        ctx.save_for_backward(*_select(tensors, save_inputs), *_select(outputs, save_outputs), *saved)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        op, backend, params, needs, n_in, n_out = ctx.call
        if ctx.accumulated:
            run_or_record(_expect_one, op.name, grads[0])
        if all(g is None for g in grads):  # a later autograd.Function returned None
            return (None,) * (4 + n_in)
        tensors = ctx.saved_tensors
        inputs, outputs, saved = tensors[:n_in], tensors[n_in : n_in + n_out], tensors[n_in + n_out :]
        if needs_autograd(grads):
            return None, None, None, None, *_differentiable_backward(ctx, grads, inputs, outputs)
        extra = {"into": _contiguous(ctx.into)} if _takes_into(backend.backward) else {}
        with autocast_disabled(grads):
            results = run_backward(op, backend, grads, inputs, outputs, saved, needs, {**extra, **params})
        results = tuple(_accumulate(g, b) if n else None for g, b, n in zip(results, ctx.into, needs, strict=True))
        return None, None, None, None, *results


def autograd_keys() -> contextlib.AbstractContextManager[None]:
    """Enable autograd inside a library op, which runs with autograd's dispatch key excluded."""
    excluded = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.AutogradFunctionality)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the backward of an autograd.Function that computes values only: under create_graph=True it raises.

    torch's once_differentiable returns detached gradients there unless the incoming gradient requires a gradient.
    """

    @functools.wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            name = backward.__qualname__.removesuffix(".backward").lstrip("_")
            raise RuntimeError(f"{name}: got create_graph=True, expected False: it has no second derivative")
        return backward(ctx, *grads)

    return checked


def autograd_function(name: str) -> type[PeakgptOp]:
    """Return the autograd function of an op. Profilers show its class name, and this name + "Backward"."""
    return type(f"peakgpt::{name}", (PeakgptOp,), {"__doc__": PeakgptOp.__doc__})


def differentiable_gradients(
    op: OpSpec, inputs: Tensors, params: Params, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Compute a call's gradients by autograd through the eager function, which supports everything that torch does.

    Backends compute values only: where `needs_autograd`, they would return gradients that are detached from the graph,
    and lose tangents.

    Args:
        inputs: tensors of the call.
        grads: gradient of each output, None without gradient flow.
        needs: whether each input needs a gradient.
    Returns:
        The gradient of each input, or None. They can be differentiated again if grad mode is enabled.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), autocast_disabled(inputs):
        # Distinct tensors, because one tensor may be several inputs. A view keeps the connection to the graph.
        leaves = [_leaf(t) if need else t for t, need in zip(inputs, needs, strict=True)]
        results = op.run_differentiable(leaves, params)
        results = results if len(op.outputs) > 1 else (results,)
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None and r.requires_grad]
        found = torch.autograd.grad(
            [r for r, _ in pairs], [t for t, need in zip(leaves, needs, strict=True) if need], [g for _, g in pairs],
            create_graph=create_graph, allow_unused=True,
        )  # fmt: skip
    remaining = iter(found)
    return tuple(next(remaining) if need else None for need in needs)


def _differentiable_backward(ctx, grads: Sequence[Tensor | None], inputs: Tensors, outputs: Tensors):
    op, _, params, needs, *_ = ctx.call
    if any(buffer is not None for buffer in ctx.into):
        raise RuntimeError(
            f"{op.name}: got a backward with create_graph=True or under torch.func inside accumulate_into, expected "
            "neither: gradients that are added to buffers cannot be differentiated"
        )
    edges = iter([edge for edge in ctx.next_functions if edge[0] is not None])  # of the inputs that need a gradient
    sources = [next(edges) if need else None for need in needs]
    # Gradients do not depend on the value of an input that backends do not save, so it may be zero.
    inputs = [
        _zeros(*source) if t is None and source is not None else t
        for t, source in zip(op.restore(inputs, outputs), sources, strict=True)
    ]
    return differentiable_gradients(op, inputs, params, grads, needs)


def _zeros(node: torch.autograd.graph.Node, output: int) -> Tensor:
    like = node._input_metadata[output]
    return torch.zeros(tuple(like.shape), dtype=like.dtype, device=like.device)


def _leaf(tensor: Tensor) -> Tensor:
    view = tensor.view_as(tensor)
    return view if view.requires_grad else view.requires_grad_()


def _expect_one(name: str, grad: Tensor | None) -> None:
    if grad is None or grad.item() != 1.0:
        raise RuntimeError(
            f"{name}: the loss has gradient {grad}, expected 1: "
            "inside accumulate_into its forward has already added the gradients"
        )


@functools.cache
def _takes_into(function: Callable[..., Any]) -> bool:
    return "into" in inspect.signature(function).parameters


def _contiguous(buffers: Tensors) -> Tensors:
    """Return the buffers that a kernel may write to; the gradients of the others are added here."""
    return tuple([b if b is not None and b.is_contiguous() else None for b in buffers])


def _accumulate(grad: Tensor | None, buffer: Tensor | None) -> Tensor | None:
    """Add the gradient to its buffer, unless the backend did, and return the gradient for autograd."""
    if buffer is None or grad is None:
        return grad
    if grad is not buffer:
        buffer.add_(grad)
    torch.autograd.graph.increment_version(buffer)  # autograd does not see what a kernel writes
    return None


def _select(tensors: Tensors, flags: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple([t if flag else None for t, flag in zip(tensors, flags, strict=True)])
