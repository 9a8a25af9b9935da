"""Ops: the `@op` decorator, and how a call reaches a backend.

A contract file declares an op with `@op` on its eager function.

    plain tensors                                        a direct call to the backend that backends.py chooses, with
                                                         the autograd of autograd.py
    torch.compile, fake tensors, dispatch modes, tensor  `torch.ops.peakgpt.<op>`, which library_op.py generates from
    subclasses                                           the same contract
    torch.func transforms, forward-mode AD,              the eager function, in operations that torch can
    gradients of gradients                               differentiate: no backend supports them

Other layers import the names in `__all__` from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from peakgpt.kernels.core import backends, flops, library_op
from peakgpt.kernels.core.autocast import autocast_disabled, autocast_enabled, cast_inputs
from peakgpt.kernels.core.autograd import autograd_function, transformed
from peakgpt.kernels.core.backends import BACKENDS, forced_backend, interpreted, load, use_backend
from peakgpt.kernels.core.recording import is_recording
from peakgpt.kernels.core.seeds import draw_seed, seeds_from, source_is_set, with_seed
from peakgpt.kernels.core.spec import Cost, OpSpec, Params, Tensors, short_lived

__all__ = [
    "BACKENDS",
    "OPS",
    "Cost",
    "Op",
    "draw_seed",
    "forced_backend",
    "interpreted",
    "load",
    "op",
    "seeds_from",
    "short_lived",
    "use_backend",
]

P = ParamSpec("P")
R = TypeVar("R")

OPS: dict[str, Op[..., Any]] = {}

_PLAIN = frozenset({Tensor, Parameter, type(None)})
_profiler_enabled, _dispatch_modes = torch._C._autograd._profiler_enabled, torch._C._len_torch_dispatch_stack


class Op(OpSpec, Generic[P, R]):
    """An op: a function with the signature of the eager function, which runs on the backend that supports the call."""

    eager: Callable[P, R]

    def __init__(self, eager: Callable[P, R], **contract: Any):
        super().__init__(eager, **contract)
        self.library_op = library_op.register(self)
        self.autograd_function = autograd_function(self.name)
        OPS[self.name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        tensors, params = self.bind(args, kwargs)
        for name, tensor in zip(self.tensor_names, tensors, strict=True):
            if not isinstance(tensor, Tensor) and (tensor is not None or name in self.required):
                raise TypeError(f"{self.name}: {name} is {type(tensor).__name__}, expected a Tensor")
        device_type, compiling = tensors[0].device.type, torch.compiler.is_compiling()
        autocasting, forced = autocast_enabled(device_type), forced_backend(compiling=compiling)
        cast = cast_inputs(self, tensors, device_type) if autocasting else tensors
        if not (self.gradient or self.mutates) and any(_needs(cast)):
            raise NotImplementedError(
                f"{self.name}: an input requires grad but the op has no gradient, expected a call under torch.no_grad()"
            )
        self.check(*cast, **params)
        if compiling:
            return self._traced(forced, tensors, cast, params)
        if transformed():
            if forced not in (None, "eager"):
                raise NotImplementedError(f"{self.name}: backend {forced!r} is forced under a transform of torch.func")
            return self.run_differentiable(tensors, params)
        if not is_plain(tensors):
            flops.give_to_counters()
            return self._traced(forced, tensors, cast, params)
        needs = _needs(cast)
        backend = backends.choose(self, forced, cast, params, needs)
        if backend is None:
            return self.run_eager(with_seed(self, tensors, params) if source_is_set() else tensors, params)
        cast = with_seed(self, cast, params)
        if autocasting:  # the backend computes in the dtypes of its inputs
            with torch.autocast(device_type, enabled=False):
                return self._direct(backend, cast, params, needs)
        return self._direct(backend, cast, params, needs)

    def __reduce__(self) -> str:
        """Pickle and copy the op as a function: by its name."""
        return self.name

    def explain(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, str | None]:
        """Return each backend's objection to this call, None if it supports it, in order of priority."""
        tensors, params = self.bind(args, kwargs)
        forced, needs = forced_backend(), _needs(tensors)
        return {name: backends.objection(self, name, tensors, params, forced, needs) for name in BACKENDS}

    def _direct(self, backend: ModuleType, tensors: Tensors, params: Params, needs: tuple[bool, ...]) -> Any:
        if True in needs:
            return self._result(self.autograd_function.apply(self, backend, params, needs, *tensors))
        if _profiler_enabled():  # record_function costs 10 us without a profiler, too
            with torch.profiler.record_function(f"peakgpt::{self.name}"):
                return self._forward(backend, tensors, params, needs)
        return self._forward(backend, tensors, params, needs)

    def _forward(self, backend: ModuleType, tensors: Tensors, params: Params, needs: tuple[bool, ...]) -> Any:
        results, saved = self.alloc(*tensors, needs=needs, **params)
        backends.run_forward(self, backend, results, saved, tensors, params)
        if self.mutates:
            self.increment_versions(tensors)
        return self._result(results)

    def _traced(self, forced: str | None, tensors: Tensors, cast: Tensors, params: Params) -> Any:
        if forced == "eager":
            return self.run_eager(tensors, params)
        cast = with_seed(self, cast, params)
        values = dict(zip(self.tensor_names, cast, strict=True)) | params
        ordered = [values[n] for n in (*self.tensor_names, *self.param_names)]
        with autocast_disabled(cast):
            results = self.library_op(*ordered, forced or "", list(_needs(cast)))
        return None if self.mutates else self._result(results[: len(self.outputs)])

    def _result(self, results: Sequence[Tensor]) -> Any:
        return None if self.mutates else results[0] if len(self.outputs) == 1 else tuple(results)


def op(
    *,
    cost: Callable[..., Cost],
    sample: Callable[..., tuple[Any, ...]],
    check: Callable[..., None],
    alloc: Callable[..., tuple[Sequence[Tensor], Sequence[Tensor]]] = lambda *_, **__: ((), ()),
    typical: Mapping[str, Any] = MappingProxyType({}),
    saved_for_backward: Sequence[str] | Callable[..., Sequence[str]] = (),
    strided: Sequence[str] = (),
    outputs: Sequence[str] = ("out",),
    autocast: str | None = None,
    autocast_exempt: Sequence[str] = (),
    mutates: Sequence[str] = (),
    grad_in_forward: Callable[..., Sequence[str]] | None = None,
    random_param: str | None = None,
    gradient: bool = True,
    differentiable: Callable[..., Any] | None = None,
    restore: Callable[[Tensors, Sequence[Tensor | None]], Tensors] = lambda inputs, outputs: inputs,
    matmul_flops: Callable[..., int] | None = None,
    counted_as: Params = MappingProxyType({}),
    counted: Callable[..., Any] | None = None,
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Declare an op. Arguments annotated `Tensor` or `Tensor | None` are tensors, all others are parameters.

    Args:
        cost: (*tensors, **params) -> Cost of one call.
        sample: sizes by keyword, dtype and device -> the tensors of a call. The default sizes are those of GPT-2 124M
            with 4 x 256 tokens.
        check: (*tensors, **params), raises ValueError with got and expected.
        alloc: (*tensors, needs, **params) -> (outputs, saved): new tensors for the results and for what forward saves.
            `needs` has one bool per tensor: whether its gradient is required. This is also the fake implementation.
        typical: values for the parameters that have no default, as in GPT-2 124M.
        saved_for_backward: names of the inputs and outputs that backward reads, or (*tensors, **params) -> names.
        strided: names of the inputs, and of the outputs for their gradients, that backends take with any strides. A
            backend receives all other inputs and gradients contiguous.
        outputs: names of the results.
        autocast: "lower" casts to autocast's dtype as torch does for matrix products, "norm" casts as for norms.
        autocast_exempt: names of the tensors that autocast does not cast.
        mutates: names of the tensors changed in place. Such an op returns None and has no gradient.
        grad_in_forward: for a scalar result: (**params) -> names of the tensors whose gradients forward computes, for
            an incoming gradient of 1. Forward may add them to the buffers of `accumulate_into`.
        random_param: name of the parameter that makes the op random if it is not 0. Such an op has a tensor `seed`,
            (1,) int64, drawn from torch's generator if the caller gives none.
        gradient: False for an op that raises if a gradient is required.
        differentiable: the eager function in operations that torch can differentiate twice and in forward mode.
            Default: the eager function.
        restore: (inputs, outputs), of which backward has those in `saved_for_backward` -> inputs for which the eager
            function has the same gradients, for gradients of gradients. An input that is still None counts as zero.
        matmul_flops: (*tensors, **params) -> FLOPs of a forward pass's matrix products, for torch's FlopCounterMode.
            Default: those of the eager function on fake tensors, for an op whose eager function reads no values.
        counted_as: parameters of a call with the same FLOPs, for parameters with which fake tensors cannot run.
        counted: a function with the same signature and matrix products, for an eager function that reads values.
    """
    return lambda eager: Op(
        eager, cost=cost, sample=sample, check=check, alloc=alloc, typical=typical,
        saved_for_backward=saved_for_backward, strided=strided, outputs=outputs, autocast=autocast,
        autocast_exempt=autocast_exempt, mutates=mutates, grad_in_forward=grad_in_forward,
        random_param=random_param, gradient=gradient, differentiable=differentiable, restore=restore,
        matmul_flops=matmul_flops, counted_as=counted_as, counted=counted,
    )  # fmt: skip


def is_plain(tensors: Tensors) -> bool:
    """Whether a direct call is safe: no tensor subclass (a DTensor has no data pointer) and no dispatch mode.

    The mode of a recording is no obstacle, because the kernels of a direct call are recorded.
    """
    for tensor in tensors:  # a loop, because all() adds 0.3 us to every op call
        if type(tensor) not in _PLAIN:
            return False
    return _dispatch_modes() == 0 or (is_recording() and _dispatch_modes() == 1)


def _needs(tensors: Tensors) -> tuple[bool, ...]:
    """Whether each tensor requires a gradient."""
    if not torch.is_grad_enabled():
        return (False,) * len(tensors)
    return tuple([t is not None and t.requires_grad for t in tensors])  # a list: 0.2 us faster than a generator
