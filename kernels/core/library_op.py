"""`torch.ops.peakgpt.<op>`: an op's contract for torch.compile, fake tensors, dispatch modes and subclasses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peakgpt.kernels.core import backends

if TYPE_CHECKING:
    from peakgpt.kernels.core.dispatch import Op

_library = torch.library.Library("peakgpt", "DEF")
_SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", int: "int", float: "float", str: "str",
           int | None: "SymInt?", float | None: "float?"}  # fmt: skip


def _schema(op: Op) -> str:
    letters = iter("abcdefghijklmnop")
    kinds = {n: _SCHEMA[op.signature.parameters[n].annotation] for n in (*op.tensor_names, *op.param_names)}
    for name in op.tensor_names:
        if name in op.mutates:
            kinds[name] = kinds[name].replace("Tensor", f"Tensor({next(letters)}!)")
    return ", ".join(f"{kind} {name}" for name, kind in kinds.items())


def register(op: Op) -> torch._ops.OpOverload:
    """Define the library op and, where it has a gradient, its backward op; returns the callable."""
    n_in, n_out = len(op.tensor_names), len(op.outputs)
    tags = (torch.Tag.needs_exact_strides,)
    replay = _Replay(op)

    def choose(forced: str, tensors, params, needs):
        return backends.choose(op, forced or None, tensors, params, needs) or replay

    def split(args):
        *values, forced, needs = args
        return tuple(values[:n_in]), dict(zip(op.param_names, values[n_in:], strict=True)), forced, needs

    def forward(*args):
        tensors, params, forced, needs = split(args)
        op.check(*tensors, **params)  # again: while tracing nobody sees values, and an id out of range writes anywhere
        outputs, saved = op.alloc(*tensors, needs=needs, **params)
        choose(forced, tensors, params, needs).forward(outputs, saved, *tensors, **params)
        return None if op.mutates else [*outputs, *saved]

    def fake(*args):
        tensors, params, _, needs = split(args)
        outputs, saved = op.alloc(*tensors, needs=needs, **params)
        return None if op.mutates else [*outputs, *saved]

    _library.define(
        f"{op.name}({_schema(op)}, str backend, bool[] needs) -> {'()' if op.mutates else 'Tensor[]'}", tags=tags
    )
    _library.impl(op.name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"peakgpt::{op.name}", fake, lib=_library)
    library_op = getattr(torch.ops.peakgpt, op.name).default
    if not op.gradient:
        return library_op

    def backward(grads, inputs, outputs, saved, *rest):
        *values, forced, needs = rest
        params = dict(zip(op.param_names, values, strict=True))
        with torch._C._AutoDispatchBelowAutograd():  # as in forward; here no autograd kernel came first
            found = choose(forced, inputs, params, needs).backward(grads, inputs, outputs, saved, needs, **params)
        return _distinct([_laid_out_like(t, g) for t, g, need in zip(inputs, found, needs, strict=True) if need])

    def fake_backward(grads, inputs, outputs, saved, *rest):
        return [torch.empty_like(t) for t, need in zip(inputs, rest[-1], strict=True) if need]

    lists = "Tensor?[] grads, Tensor?[] inputs, Tensor[] outputs, Tensor[] saved"
    arguments = ", ".join([lists, *_schema(op).split(", ")[n_in:], "str backend, bool[] needs"])
    _library.define(f"{op.name}_backward({arguments}) -> Tensor[]", tags=tags)
    _library.impl(f"{op.name}_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"peakgpt::{op.name}_backward", fake_backward, lib=_library)
    library_backward = getattr(torch.ops.peakgpt, f"{op.name}_backward").default

    def setup(ctx, inputs, output):
        tensors, *_ = split(inputs)
        ctx.rest, ctx.needs = inputs[n_in:], inputs[-1]
        ctx.present = [t is not None for t in tensors]
        ctx.save_for_backward(*(t for t in tensors if t is not None), *output)

    def gradient(ctx, grads):
        held = iter(ctx.saved_tensors)
        inputs = [next(held) if there else None for there in ctx.present]
        held = list(held)
        found = iter(library_backward(list(grads[:n_out]), inputs, held[:n_out], held[n_out:], *ctx.rest))
        return *(next(found) if need else None for need in ctx.needs), *(None for _ in ctx.rest)

    torch.library.register_autograd(f"peakgpt::{op.name}", gradient, setup_context=setup, lib=_library)
    return library_op


class _Replay:
    """Eager as a backend of the library op: backward runs the eager function again, under autograd."""

    def __init__(self, op: Op):
        self.op = op

    def forward(self, outputs, saved, *tensors, **params):
        results = self.op.run_eager(tensors, params)
        if not self.op.mutates:
            for output, result in zip(outputs, results if len(outputs) > 1 else (results,), strict=True):
                output.copy_(result)
            for tensor in saved:  # never read by the replay, but what a library op returns must be defined
                tensor.zero_()

    def backward(self, grads, inputs, outputs, saved, needs, **params):
        leaves = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(inputs, needs, strict=True)]
        with _autograd_keys(), torch.enable_grad():
            results = self.op.run_eager(leaves, params)
            results = results if len(grads) > 1 else (results,)
            pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
            wanted = [t for t, need in zip(leaves, needs, strict=True) if need]
            found = iter(torch.autograd.grad([r for r, _ in pairs], wanted, [g for _, g in pairs]))
        return [next(found) if need else None for need in needs]


def _autograd_keys():
    """Bring autograd back inside a library op, which runs with its dispatch key excluded."""
    excluded = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.AutogradFunctionality)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _laid_out_like(tensor: Tensor, grad: Tensor) -> Tensor:
    """The gradient with the strides that the fake backward promised."""
    promised = torch.empty_like(tensor, device="meta")
    if grad.stride() == promised.stride():
        return grad
    return grad.new_empty_strided(promised.shape, promised.stride()).copy_(grad)


def _distinct(grads: list[Tensor]) -> list[Tensor]:
    """A library op may not return one tensor twice, as a sum's gradient would be."""
    return [g.clone() if any(g is before for before in grads[:i]) else g for i, g in enumerate(grads)]
