"""Ops: what one is, and how a call reaches a backend.

A contract file declares an op with `@op` on its eager function. Plain tensors take a direct call to the backend that
backends.py chooses, gradients.py being its autograd. Under torch.compile, fake tensors, dispatch modes and for tensor
subclasses the same contract runs as `torch.ops.peakgpt.<op>`, which library_op.py defines. Under torch.func's
transforms and forward-mode differentiation, which no backend knows, the eager function runs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from peakgpt.kernels.core import backends, library_op
from peakgpt.kernels.core.autocast import autocasts, cast_for, no_autocast
from peakgpt.kernels.core.autograd import Fused
from peakgpt.kernels.core.backends import HOME, PRIORITY, forced_backend, interpreted, load, use_backend

__all__ = [
    "HOME",
    "OPS",
    "PRIORITY",
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

OPS: dict[str, Op] = {}
_seeds: Callable[[torch.device], Tensor] | None = None


class Cost(NamedTuple):
    """What one call must do at least: work FLOPs and bytes of device memory, forward and backward.

    Forward is what a call under no_grad must do; writing what backward keeps counts with backward.
    """

    flops: int
    bytes: int
    backward_flops: int
    backward_bytes: int
    written: int  # of bytes: the outputs, or what the op mutates
    backward_written: int  # of backward_bytes: the gradients, and what forward keeps for backward


def draw_seed(device: torch.device) -> Tensor:
    """A seed for a random op: (1,) int64 on the device, from torch's generator of that device."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


@contextlib.contextmanager
def seeds_from(source: Callable[[torch.device], Tensor]) -> Iterator[None]:
    """Take the seeds of random ops from source(device), which stands for draw_seed; eager too is then seeded.

    For what runs a forward pass again and must meet the same masks, without winding back torch's generator: that can
    not be done while a CUDA graph is captured.
    """
    global _seeds
    before, _seeds = _seeds, source
    try:
        yield
    finally:
        _seeds = before


def short_lived(like: Tensor, *shape: int) -> Tensor:
    """New memory for a result that dies before tensors made after it: 128 bytes more than it needs.

    glibc's posix_memalign looks for 96 bytes more than it is asked for, so what it has freed holds nothing of the same
    size, and would stay a hole between tensors that live on: 84 MiB of a float32 training step of GPT-2 124M.
    """
    return like.new_empty(math.prod(shape) + 128 // like.element_size()).resize_(shape)


class Op:
    """An op: the contract's eager function, callable by users, with whatever backends exist for it."""

    def __init__(
        self, eager: Callable[..., Any], *, alloc, check, cost, sample, typical, keeps, outputs, autocast, mutates,
        early, random, gradient, exact,
    ):  # fmt: skip
        functools.update_wrapper(self, eager)
        self.name, self.eager = eager.__name__, eager
        self.alloc, self.check, self.cost, self.sample, self.typical = alloc, check, cost, sample, dict(typical)
        self.outputs, self.autocast, self.mutates = outputs, autocast, frozenset(mutates)
        self.exact = frozenset(exact)
        self.early, self.random, self.gradient = early, random, gradient and not mutates
        self.signature = inspect.signature(eager, eval_str=True)
        arguments = self.signature.parameters
        self.tensor_names = tuple(n for n, a in arguments.items() if a.annotation in (Tensor, Tensor | None))
        self._required = frozenset(n for n in self.tensor_names if arguments[n].annotation is Tensor)
        self.param_names = tuple(n for n in arguments if n not in self.tensor_names)
        self._params = frozenset(self.param_names)
        self._names = tuple(arguments)
        self._seed_at = self.tensor_names.index("seed") if random else None
        self._positional = sum(a.kind is a.POSITIONAL_OR_KEYWORD for a in arguments.values())
        self._defaults = {n: a.default for n, a in arguments.items() if a.default is not a.empty}
        self._param_defaults = {n: v for n, v in self._defaults.items() if n in self.param_names}
        self._tensors_first = self._names[: len(self.tensor_names)] == self.tensor_names
        self._keeps, self._kept_always = keeps, None if callable(keeps) else self._flags(keeps)
        self._library_op = library_op.register(self)
        OPS[self.name] = self

    def __call__(self, *args, **kwargs):
        tensors, params = self._bind(args, kwargs)
        for name, tensor in zip(self.tensor_names, tensors, strict=True):
            if not isinstance(tensor, Tensor) and (tensor is not None or name in self._required):
                raise TypeError(f"{self.name}: {name} is {type(tensor).__name__}, expected a Tensor")
        kind = tensors[0].device.type
        autocasting, forced = autocasts(kind), forced_backend()
        cast = cast_for(self, tensors, kind) if autocasting else tensors
        if not (self.gradient or self.mutates) and any(_needs(cast)):
            raise NotImplementedError(f"{self.name}: a gradient is wanted, expected a call under torch.no_grad()")
        self.check(*cast, **params)
        if torch.compiler.is_compiling():
            return self._traced(forced, tensors, cast, params)
        if _transformed():
            if forced not in (None, "eager"):
                raise NotImplementedError(f"{self.name}: backend {forced!r} is forced under a transform of torch.func")
            return self.run_eager(tensors, params)
        if not _plain(tensors):
            return self._traced(forced, tensors, cast, params)
        needs = _needs(cast)
        backend = backends.choose(self, forced, cast, params, needs)
        if backend is None:
            return self.run_eager(tensors if _seeds is None else self._seeded(tensors, params), params)
        cast = self._seeded(cast, params)
        if autocasting:  # keep it away from what the backend calls inside
            with torch.autocast(kind, enabled=False):
                return self._direct(backend, cast, params, needs)
        return self._direct(backend, cast, params, needs)

    def explain(self, *args, **kwargs) -> dict[str, str | None]:
        """Each backend's objection to this call in the order of PRIORITY; None where it would take it."""
        tensors, params = self._bind(args, kwargs)
        forced, needs = forced_backend(), _needs(tensors)
        return {name: backends.objection(self, name, tensors, params, forced, needs) for name in PRIORITY}

    def kept(self, tensors: Sequence[Tensor | None]) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """Which inputs, and which outputs, backward of this call reads."""
        return self._kept_always or self._flags(self._keeps(*tensors))

    def _flags(self, keeps: Sequence[str]) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        return tuple(n in keeps for n in self.tensor_names), tuple(n in keeps for n in self.outputs)

    def _bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
        if self._tensors_first and len(args) == len(self.tensor_names):  # how layers call: 2 us less
            params = {**self._param_defaults, **kwargs}
            if params.keys() == self._params:
                return tuple(args), params
        values = {**self._defaults, **dict(zip(self._names, args, strict=False)), **kwargs}
        if len(args) > self._positional or len(values) != len(self._names) or len(args) + len(kwargs) > len(values):
            try:
                self.signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{self.name}: {error}, expected {', '.join(self._names)}") from None
        return tuple(values[n] for n in self.tensor_names), {n: values[n] for n in self.param_names}

    def _direct(self, backend: ModuleType, tensors, params, needs):
        if any(needs):
            return self._result(Fused.apply(self, backend, params, needs, *tensors))
        results, saved = self.alloc(*tensors, needs=needs, **params)
        backend.forward(results, saved, *tensors, **params)
        return self._result(results)

    def _seeded(self, tensors, params):
        """The tensors with a seed where the op is random and came without.

        Drawn outside of the op, which stays a function of its inputs: a backward, a replay and a compiled graph see the
        mask of the forward, a checkpoint that restores torch's generator draws the same seed again, and a captured step
        keeps it in device memory.
        """
        if self.random is None or params[self.random] == 0 or tensors[self._seed_at] is not None:
            return tensors
        seed = (_seeds or draw_seed)(tensors[0].device)
        return *tensors[: self._seed_at], seed, *tensors[self._seed_at + 1 :]

    def run_eager(self, tensors, params):
        return self.eager(**dict(zip(self.tensor_names, tensors, strict=True)), **params)

    def _result(self, results: Sequence[Tensor]):
        return None if self.mutates else results[0] if len(self.outputs) == 1 else tuple(results)

    def _traced(self, forced: str | None, tensors, cast, params):
        if forced == "eager":
            return self.run_eager(tensors, params)
        cast = self._seeded(cast, params)
        values = dict(zip(self.tensor_names, cast, strict=True)) | params
        ordered = [values[n] for n in (*self.tensor_names, *self.param_names)]
        with no_autocast(cast):
            results = self._library_op(*ordered, forced or "", list(_needs(cast)))
        return None if self.mutates else self._result(results[: len(self.outputs)])


def op(
    *,
    cost: Callable[..., Cost],
    sample: Callable[..., tuple[Tensor, ...]],
    check: Callable[..., None],
    alloc: Callable[..., tuple[Sequence[Tensor], Sequence[Tensor]]] = lambda *_, **__: ((), ()),
    typical: Mapping[str, Any] = MappingProxyType({}),
    keeps: Sequence[str] | Callable[..., Sequence[str]] = (),
    outputs: Sequence[str] = ("out",),
    autocast: str | None = None,
    mutates: Sequence[str] = (),
    early: Callable[..., Sequence[str]] | None = None,
    random: str | None = None,
    gradient: bool = True,
    exact: Sequence[str] = (),
) -> Callable[[Callable[..., Any]], Op]:
    """Make an op of an eager function; arguments annotated `Tensor` or `Tensor | None` are tensors, others parameters.

    Args:
        cost: (*tensors, **params) -> Cost of one call.
        sample: sizes by keyword, GPT-2 124M's at 4 x 256 tokens by default, dtype and device -> the tensors of a call.
        typical: parameters without a default, as in GPT-2 124M.
        check: (*tensors, **params), raises ValueError with got and expected.
        alloc: (*tensors, needs, **params) -> (outputs, saved): new tensors for the results and for what backward
            keeps. `needs` tells which gradients are wanted. It is the fake implementation too.
        keeps: names of the inputs and outputs whose values backward reads, or (*tensors) -> those of this call.
        outputs: names of the results.
        autocast: "lower" casts to autocast's dtype as torch does for matrix products; "norm" as it does for norms.
        mutates: names of the tensors changed in place; such an op returns None and has no gradient.
        early: (**params) -> names of the tensors whose gradients the forward pass of a scalar result forms, at
            gradient 1, and may add to their sinks.
        random: the parameter that makes the op random where it is not 0; such an op has a tensor `seed`, (1,) int64,
            drawn from torch's generator where the caller gives none.
        gradient: False for an op that raises where a gradient is wanted.
        exact: names of the tensors that autocast leaves as they are.
    """
    return lambda eager: Op(
        eager, alloc=alloc, check=check, cost=cost, sample=sample, typical=typical, keeps=keeps,
        outputs=() if mutates else outputs, autocast=autocast, mutates=mutates, early=early, random=random,
        gradient=gradient, exact=exact,
    )  # fmt: skip


def _plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a direct call is safe: no subclass (a DTensor has no data pointer), no dispatch mode."""
    return (
        all(t is None or type(t) is Tensor or type(t) is Parameter for t in tensors)
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _needs(tensors: Sequence[Tensor | None]) -> tuple[bool, ...]:
    if not torch.is_grad_enabled():
        return (False,) * len(tensors)
    return tuple(t is not None and t.requires_grad for t in tensors)
