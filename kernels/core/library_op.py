"""`torch.ops.peakgpt.<op>`, generated from an op's contract for torch.compile, fake tensors, modes and subclasses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peakgpt.kernels.core import backends, flops
from peakgpt.kernels.core.autograd import autograd_keys, differentiable_gradients, needs_autograd
from peakgpt.kernels.core.spec import OpSpec, Params, Tensors

_library = torch.library.Library("peakgpt", "DEF")
_SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", int: "int", float: "float", str: "str",
           int | None: "SymInt?", float | None: "float?",
           tuple[float, float, float]: "float[3]", tuple[int, ...] | None: "int[]?"}  # fmt: skip


def register(op: OpSpec) -> torch._ops.OpOverload:
    """Define the library op and, if the op has a gradient, its backward op. Return the library op."""

    def forward(*args):
        tensors, params, forced, needs = _split(op, args)
        # Checked again, because tracing has no values. With an id out of range C++ would write outside of its buffer.
        op.check(*tensors, **params)
        outputs, saved = op.alloc(*tensors, needs=needs, **params)
        module = _choose(op, forced, tensors, params, needs)
        backends.run_forward(op, module, outputs, saved, tensors, params)
        if op.mutates:
            op.increment_versions(tensors)
        return None if op.mutates else [*outputs, *saved]

    def fake(*args):
        flops.give_to_counters()  # compiled code does not call the op
        tensors, params, _, needs = _split(op, args)
        outputs, saved = op.alloc(*tensors, needs=needs, **params)
        return None if op.mutates else [*outputs, *saved]

    schema = f"({_schema(op)}, str backend, bool[] needs) -> {'()' if op.mutates else 'Tensor[]'}"
    library_op = _define(op.name, schema, forward, fake)
    flops.add_forward(op, lambda *args: _split(op, args)[:2])
    if op.gradient:
        _register_autograd(op, _register_backward(op))
        flops.add_backward(op)
    return library_op


def _register_backward(op: OpSpec) -> torch._ops.OpOverload:
    """Define the op that computes the gradients of the tensors that need one."""

    def backward(grads, inputs, outputs, saved, *rest):
        *values, forced, needs = rest
        params = dict(zip(op.param_names, values, strict=True))
        with torch._C._AutoDispatchBelowAutograd():  # as forward's autograd kernel does; backward has no such kernel
            module = _choose(op, forced, inputs, params, needs)
            results = backends.run_backward(op, module, grads, inputs, outputs, saved, needs, params)
        return _distinct([_with_fake_strides(t, g) for t, g, need in zip(inputs, results, needs, strict=True) if need])

    def fake(grads, inputs, outputs, saved, *rest):
        return [torch.empty_like(t) for t, need in zip(inputs, rest[-1], strict=True) if need]

    lists = "Tensor?[] grads, Tensor?[] inputs, Tensor[] outputs, Tensor[] saved"
    params = _schema(op).split(", ")[len(op.tensor_names) :]
    arguments = ", ".join([lists, *params, "str backend, bool[] needs"])
    return _define(f"{op.name}_backward", f"({arguments}) -> Tensor[]", backward, fake)


def _register_autograd(op: OpSpec, library_backward: torch._ops.OpOverload) -> None:
    n_in, n_out = len(op.tensor_names), len(op.outputs)

    def setup(ctx, inputs, output):
        tensors, *_ = _split(op, inputs)
        ctx.rest, ctx.needs = inputs[n_in:], inputs[-1]
        ctx.present = [t is not None for t in tensors]
        ctx.save_for_backward(*(t for t in tensors if t is not None), *output)

    def gradient(ctx, grads):
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors) if present else None for present in ctx.present]
        outputs = list(tensors)
        if needs_autograd(grads):
            params = dict(zip(op.param_names, ctx.rest[: len(op.param_names)], strict=True))
            gradients = differentiable_gradients(op, inputs, params, grads[:n_out], ctx.needs)
            return *gradients, *(None for _ in ctx.rest)
        results = iter(library_backward(list(grads[:n_out]), inputs, outputs[:n_out], outputs[n_out:], *ctx.rest))
        return *(next(results) if need else None for need in ctx.needs), *(None for _ in ctx.rest)

    torch.library.register_autograd(f"peakgpt::{op.name}", gradient, setup_context=setup, lib=_library)


def _define(
    name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> torch._ops.OpOverload:
    _library.define(f"{name}{schema}", tags=(torch.Tag.needs_exact_strides,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"peakgpt::{name}", fake, lib=_library)
    return getattr(torch.ops.peakgpt, name).default


def _split(op: OpSpec, args: Sequence[Any]) -> tuple[Tensors, Params, str, Sequence[bool]]:
    """Split the arguments of the library op into tensors, parameters, the forced backend and needs."""
    *values, forced, needs = args
    count = len(op.tensor_names)
    return tuple(values[:count]), dict(zip(op.param_names, values[count:], strict=True)), forced, needs


def _choose(op: OpSpec, forced: str, tensors: Tensors, params: Params, needs: Sequence[bool]):
    """Return the module of the backend that runs the call, or the eager function as a backend."""
    return backends.choose(op, forced or None, tensors, params, needs) or _EagerBackend(op)


def _schema(op: OpSpec) -> str:
    letters = iter("abcdefghijklmnop")
    kinds = {n: _SCHEMA[op.signature.parameters[n].annotation] for n in (*op.tensor_names, *op.param_names)}
    for name in op.tensor_names:
        if name in op.mutates:
            kinds[name] = kinds[name].replace("Tensor", f"Tensor({next(letters)}!)")
    return ", ".join(f"{kind} {name}" for name, kind in kinds.items())


class _EagerBackend:
    """The eager function as a backend of the library op. Backward runs it again under autograd."""

    def __init__(self, op: OpSpec):
        self.op = op

    def forward(self, outputs, saved, *tensors, **params):
        results = self.op.run_eager(tensors, params)
        if not self.op.mutates:
            for output, result in zip(outputs, results if len(outputs) > 1 else (results,), strict=True):
                output.copy_(result)
            for tensor in saved:  # backward does not read them, but a library op must return defined values
                tensor.zero_()

    def backward(self, grads, inputs, outputs, saved, needs, **params):
        leaves = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(inputs, needs, strict=True)]
        with autograd_keys(), torch.enable_grad():
            results = self.op.run_eager(leaves, params)
            results = results if len(grads) > 1 else (results,)
            pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
            differentiated = [t for t, need in zip(leaves, needs, strict=True) if need]
            gradients = iter(torch.autograd.grad([r for r, _ in pairs], differentiated, [g for _, g in pairs]))
        return [next(gradients) if need else None for need in needs]


def _with_fake_strides(tensor: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient with the strides that the fake backward has."""
    expected = torch.empty_like(tensor, device="meta")
    if grad.stride() == expected.stride():
        return grad
    return grad.new_empty_strided(expected.shape, expected.stride()).copy_(grad)


def _distinct(grads: list[Tensor]) -> list[Tensor]:
    """Clone repeated tensors, for example the gradients of a sum: a library op may not return one tensor twice."""
    return [g.clone() if any(g is earlier for earlier in grads[:i]) else g for i, g in enumerate(grads)]
